"""Everything that is to be shown on a GPU, by one command:

    python -m benchmarks.gpu --output build/gpu           on a machine with a GPU and Triton
    python -m benchmarks.gpu --only linears,decode        parts of it
    python -m benchmarks.gpu --artifact DIR               with an artifact compiled elsewhere

tests      the GPU part of the test suite
linears    every linear of Llama-3.1-8B and SmolLM2-135M in several formats, for several numbers of
           rows, beside torch's float16 product, its int4 product, and those of gemlite and Marlin
           where they are there (--marlin LIBRARY, see benchmarks/marlin/launch.cu)
decode     whole decode steps of both shapes as CUDA graphs, beside torch in bfloat16
verify     every kernel of an artifact against what it must compute

It asks no network, writes OUTPUT.json and, where matplotlib is there, OUTPUT.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import qc
from benchmarks import gpu_decode, gpu_linear, gpu_peers
from benchmarks.gpu_linear import GOOD, Bench, Problem
from qc.passes.recipes.rounding import INT4
from qc.runtime.cuda.driver import Driver, find_driver

LLAMA = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096))
SMOLLM = ((576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576))
ROWS = (1, 4, 16, 64, 256)
FORMATS = (
    Problem("int4·g128", 0, 0),
    Problem("int4·g64", 0, 0),
    Problem("int4·g128·zero", 0, 0),
    Problem(INT4, 0, 0),
    Problem("int4·g128 + rank32", 0, 0),
    Problem("int4·g128 + sparse1%", 0, 0),
    Problem("int4·g128 + rank32 + sparse1%", 0, 0, epilogue=True),
    Problem("int3·g128", 0, 0),
    Problem("int2·g64·min", 0, 0),
    Problem("nvfp4", 0, 0),
    Problem("mxfp4", 0, 0),
    Problem("int3·g16·min·scale(int3·o16·min)·minimum(int3·o16·min)", 0, 0),
    Problem("int8·g32", 0, 0),
    Problem("int8·row", 0, 0, int8=True),
    Problem("int4·g128", 0, 0, int8=True),
    Problem("e4m3·row", 0, 0),
    Problem("e4m3·row", 0, 0, int8=True),
)
GATED = (
    Problem("int4·g128", 14336, 4096, gated=True),
    Problem(INT4, 14336, 4096, gated=True),
    Problem(INT4, 1536, 576, gated=True),
)
"""Gate and up in one launch: float16 takes twice the time of one of them."""
PLAIN_ONLY = 1 << 28
"""Weights of a matrix from which on only plain formats are measured: others would take long."""
CHECKED = (4096, 4096), (1, 16, 64)


@dataclass
class Report:
    """What was measured, written as it comes."""

    file: Path
    content: dict[str, Any] = field(default_factory=dict)

    def add(self, part: str, row: Any) -> None:
        """Add a row to a part."""
        self.content.setdefault(part, []).append(row)
        print(json.dumps({part: row}, ensure_ascii=False), flush=True)
        if len(self.content[part]) % 25 == 0:
            self.write()

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.content, indent=1, ensure_ascii=False))


# ---------------------------------------------------------------- the parts


def run_tests(report: Report, options: argparse.Namespace) -> None:
    """Run the tests that need a GPU, in processes of their own."""
    root = Path(__file__).parent.parent
    files = ["tests/gpu", "tests/backends/triton/test_linear.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(options.workers), "-k", "gpu"]
    start = time.perf_counter()
    done = subprocess.run([*command, *files], cwd=root, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    report.add(
        "tests",
        {
            "passed": done.returncode == 0, "summary": lines[-1] if lines else done.stderr[-500:],
            "failed": failed, "seconds": time.perf_counter() - start,
        },
    )  # fmt: skip


def problems(options: argparse.Namespace) -> list[Problem]:
    """List all linears."""
    found = []
    for outer, inner in (*LLAMA, *SMOLLM):
        for kind in FORMATS:
            plain = "+" not in kind.format and not kind.int8
            if outer * inner < PLAIN_ONLY or plain:
                found.append(Problem(kind.format, outer, inner, kind.epilogue, kind.int8))
    return [*found, *GATED][:: options.every]


def time_linears(report: Report, options: argparse.Namespace) -> None:
    """Time every linear."""
    driver, listed = find_driver(), problems(options)
    start = time.perf_counter()
    count = gpu_linear.compile_everything(listed, ROWS, driver.capability, options.workers)
    seconds = time.perf_counter() - start
    report.add("machine", {"launches_compiled": count, "seconds": seconds})
    bandwidth = gpu_linear.copy_bandwidth()
    report.add("machine", {"copy_bytes_per_second": bandwidth})
    peers: dict[tuple[int, int, int], dict[str, float]] = {}
    for problem in listed:
        bench = Bench(problem, driver)
        for rows in ROWS:
            key = problem.outer, problem.inner, rows
            if key not in peers:
                peers[key] = dict(
                    gpu_peers.rows(problem.outer, problem.inner, rows, options.marlin)
                )
            part = "gated" if problem.gated else "linears"
            report.add(part, linear_row(bench, rows, bandwidth, peers[key]))
        del bench
        torch.cuda.empty_cache()


def linear_row(
    bench: Bench, rows: int, bandwidth: float, peers: dict[str, float]
) -> dict[str, Any]:
    """Time, and check where that takes no time to speak of."""
    problem = bench.problem
    weights = len(problem.names)
    timing = bench.time(rows)
    checked = (problem.outer, problem.inner) == CHECKED[0] and rows in CHECKED[1]
    error = bench.check(rows) if checked else None
    if error is not None and not error <= GOOD:
        print(f"WRONG: {problem} at {rows} rows is off by {error}", flush=True)
    return {
        "label": problem.label, "outer": problem.outer, "inner": problem.inner, "rows": rows,
        "microseconds": timing.seconds * 1e6, "bytes": timing.bytes,
        "gigabytes_per_second": timing.bytes / timing.seconds / 1e9,
        "of_copy": timing.bytes / timing.seconds / bandwidth,
        "over_float16": weights * peers["torch float16"] / (timing.seconds * 1e6),
        "error": error, "peers": peers,
    }  # fmt: skip


def time_decode(report: Report, options: argparse.Namespace) -> None:
    """Time decode steps."""
    architecture = find_driver().capability
    for shape in gpu_decode.SHAPES:
        for batch in (1, 16):
            for name, seconds in gpu_decode.torch_rows(shape, batch, options.compile):
                report.add("decode", decode_row(shape.name, batch, name, seconds))
            torch.cuda.empty_cache()
        for recipe, weights in (("w4a16", "int4·g128"), ("w4", "int4·g128"), ("w4", None)):
            start = time.perf_counter()
            artifact = gpu_decode.random_artifact(
                shape, recipe, weights, architecture, options.workers
            )
            ready = time.perf_counter() - start
            for batch in (1, 16):
                seconds = gpu_decode.time_decode(artifact, batch)
                row = decode_row(shape.name, batch, f"qc {recipe} {weights or 'as it is'}", seconds)
                report.add("decode", row | {"ready_after": ready} | used_memory())
            del artifact


def decode_row(shape: str, batch: int, name: str, seconds: float) -> dict[str, Any]:
    return {
        "shape": shape, "batch": batch, "name": name, "milliseconds": seconds * 1e3,
        "tokens_per_second": batch / seconds,
    }  # fmt: skip


def used_memory() -> dict[str, int]:
    """Return the bytes of the GPU's memory that are taken."""
    free, total = torch.cuda.mem_get_info()
    return {"bytes_in_use": total - free}


def verify(report: Report, options: argparse.Namespace) -> None:
    """Check an artifact that was compiled on another machine."""
    if options.artifact is None:
        report.add("verify", {"skipped": "no --artifact"})
        return
    found = qc.load(options.artifact).verify()
    report.add("verify", found.to_dict())


PARTS: dict[str, Callable[[Report, argparse.Namespace], None]] = {
    "tests": run_tests, "linears": time_linears, "decode": time_decode, "verify": verify,
}  # fmt: skip


def machine(driver: Driver) -> dict[str, Any]:
    """Say where this was measured."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"gpu": driver.name, "capability": driver.capability, **versions}


def summary(report: Report) -> Iterator[str]:
    """Yield the figures that count, a line each."""
    for row in report.content.get("linears", ()):
        if row["outer"] * row["inner"] >= 4096 * 4096 and row["rows"] in (1, 16, 64):
            yield (
                f"{row['label']:48} {row['outer']:6}x{row['inner']:5} {row['rows']:3} rows "
                f"{row['microseconds']:7.1f} us {row['of_copy']:5.0%} of copy "
                f"{row['over_float16']:5.2f}x float16"
            )
    for row in report.content.get("decode", ()):
        yield (
            f"{row['shape']:14} batch {row['batch']:2} {row['name']:32} "
            f"{row['milliseconds']:7.2f} ms {row['tokens_per_second']:8.0f} tokens/s"
        )
    for part in ("tests", "verify"):
        for row in report.content.get(part, ()):
            yield f"{part}: {row}"


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--output", type=Path, default=Path("build/gpu"))
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--every", type=int, default=1, help="measure every n-th linear")
    parser.add_argument("--marlin", type=Path, help="Marlin's library: see benchmarks/marlin")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too: minutes")
    options = parser.parse_args()
    report = Report(options.output.with_suffix(".json"))
    report.add("machine", machine(find_driver()))
    start = time.perf_counter()
    for name in options.only.split(","):
        PARTS[name](report, options)
        report.write()
    report.add("machine", {"seconds": time.perf_counter() - start})
    report.write()
    print("\n".join(summary(report)))
    gpu_peers.draw(report.content, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
