"""Time the tiles that a product of packed codes can work in, to choose those of linear/tiles.py:

    python -m benchmarks.gpu_tiles --output build/tiles.json           on a machine with a GPU
    python -m benchmarks.gpu_tiles --compile-only 90                   anywhere: what would be tried
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_linear
from benchmarks.gpu_linear import Bench, Problem
from qc.backends.triton.compile import compile_launch
from qc.backends.triton.kernel import Call, Launch
from qc.backends.triton.linear import tiles
from qc.backends.triton.linear.tiles import Tiling
from qc.ir.node import Node
from qc.runtime.cuda.driver import find_driver

SHAPES = ((14336, 4096), (4096, 4096), (4096, 14336))
FORMAT = "int4·g128"


def candidates(rows: int) -> Iterator[Tiling]:
    """Yield the tiles to try for a number of rows."""
    through_shared = Tiling(64, rows, 4, 3, 256 if rows <= 16 else 128)
    yield through_shared
    for outputs, warps, width, stages, parts in product(
        (64, 128), (4, 8), (128, 256), (2, 3), (None, 1)
    ):
        if outputs // 16 >= warps and (rows > 4 or (outputs == 64 and stages == 3)):
            yield Tiling(outputs, rows, warps, stages, width, 1, True, parts)
    if rows > 16:
        return
    for lanes, outputs, width in product((2, 4, 8), (16, 32, 64), (256, 512)):
        height, stages = lanes * outputs // 16, 3 if width == 256 else 2
        if lanes * rows > 64 or not 4 <= height <= 16:
            continue
        for warps in {4, height}:
            if 4 <= warps <= height <= 2 * warps and warps in (4, 8, 16):
                yield Tiling(outputs, rows, warps, stages, width, lanes, True, 1)


def call_with(problem: Problem, node: Node, tiling: Tiling, architecture: int) -> Call:
    """Return the call of a linear whose main loop works in a tile."""
    kept = tiles.coded_tiling
    tiles.coded_tiling = lambda *_: tiling  # type: ignore[assignment]
    try:
        return problem.call(node, architecture)
    finally:
        tiles.coded_tiling = kept


def compile_one(item: tuple[Problem, int, Tiling, int]) -> tuple[int, int, int] | str:
    """Compile the launches of a candidate; return what the first one takes, or why not."""
    problem, rows, tiling, architecture = item
    torch.set_num_threads(1)
    try:
        call = call_with(problem, problem.node(problem.planned()), tiling, architecture)
        made = [compile_launch(each, architecture) for each in launches_of(call, rows)]
    except Exception as error:  # noqa: BLE001  a tile that the compiler refuses is no candidate
        return f"{type(error).__name__}: {error}"[:300]
    return made[0].registers, made[0].spills, made[0].shared_bytes


def launches_of(call: Call, rows: int) -> tuple[Launch, ...]:
    return call.variant(rows).launches


def main() -> None:
    """Compile all, then time all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("build/tiles.json"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--format", default=FORMAT)
    parser.add_argument("--shapes", type=int, default=len(SHAPES))
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=300, help="stop timing after so many")
    parser.add_argument("--compile-only", type=int)
    options = parser.parse_args()
    driver = None if options.compile_only else find_driver()
    architecture = options.compile_only or find_driver().capability
    problems = [Problem(options.format, *shape) for shape in SHAPES[: options.shapes]]
    items = [
        (problem, rows, tiling, architecture)
        for problem in problems
        for rows in options.rows
        for tiling in candidates(rows)
    ]
    start = time.perf_counter()
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        taken = list(pool.map(compile_one, items))
    print(f"{len(items)} candidates compiled in {time.perf_counter() - start:.0f} s", flush=True)
    found: list[dict[str, Any]] = []
    if driver is not None:
        found.append({"copy_bytes_per_second": gpu_linear.copy_bandwidth()})
        print(found[0], flush=True)
    bench: Bench | None = None
    start = time.perf_counter()
    for (problem, rows, tiling, _), resources in zip(items, taken, strict=True):
        row: dict[str, Any] = {
            "outer": problem.outer, "inner": problem.inner, "rows": rows,
            "tiling": [tiling.outputs, tiling.warps, tiling.stages, tiling.width, tiling.lanes,
                       tiling.registers, tiling.parts],
            "resources": resources,
        }  # fmt: skip
        if driver is not None and not isinstance(resources, str):
            if time.perf_counter() - start > options.seconds:
                break
            if bench is None or bench.problem != problem:
                bench = None
                torch.cuda.empty_cache()
                bench = Bench(problem, driver)
            call = call_with(problem, bench.node, tiling, architecture)
            row["error"] = bench.check(rows, call)
            row["microseconds"] = bench.time(rows, call).seconds * 1e6
        found.append(row)
        print(json.dumps(row), flush=True)
        options.output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
