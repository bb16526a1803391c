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
from dataclasses import asdict
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


LANES = ((4, 16, 4), (8, 16, 8), (4, 32, 8), (16, 16, 16), (8, 16, 4), (2, 16, 2), (2, 32, 4))
"""Lanes, outputs and warps of tiles for few rows."""
LANES_OF_SOME = ((2, 32, 4), (4, 16, 4), (2, 64, 8), (4, 32, 8))
"""The same for 16 rows."""


def candidates(rows: int, inner: int) -> Iterator[Tiling]:
    """Yield the tiles to try for a number of rows."""
    if rows > 64:
        yield from of_many_rows()
    elif rows > 16:
        yield from of_more_rows(rows)
    elif rows > 4:
        yield from of_some_rows(rows, inner)
    else:
        yield from of_few_rows(rows, inner)


def of_few_rows(rows: int, inner: int) -> Iterator[Tiling]:
    """Yield tiles of lanes for up to 4 rows."""
    for (lanes, outputs, warps), width, wider, unit in product(
        LANES, (256, 512, 1024), (1, 2, 4), (64, 128)
    ):
        words = lanes * outputs // 16 // warps * width // 64
        tile = rows * wider
        if inner % (lanes * width) or words > 16 or words < 4 or tile * lanes > 32:
            continue
        if (unit == 128 and wider > 1) or (wider == 4 and words < 8) or (rows > 1 and wider > 1):
            continue
        fit = {2: 64, 4: 72, 8: 64, 16: 64}[warps]
        for most in (None, fit) if words <= 8 else (None, 128):
            if rows == 1 or most is None:
                yield Tiling(outputs, tile, warps, 3, width, lanes, True, most, 1, unit)


def of_some_rows(rows: int, inner: int) -> Iterator[Tiling]:
    """Yield tiles for up to 16 rows, where more than few."""
    for width, parts, unit in product((256, 512, 1024), (None, 1), (64, 128)):
        if inner % width == 0:
            yield Tiling(64, rows, 4, 3, width, 1, True, None, parts, unit)
    for (lanes, outputs, warps), width in product(LANES_OF_SOME, (256, 512, 1024)):
        words = lanes * outputs * width // (1024 * warps)
        if inner % (lanes * width) == 0 and words <= 16:
            yield Tiling(outputs, rows, warps, 3, width, lanes, True, None, 1, 64)


def of_more_rows(rows: int) -> Iterator[Tiling]:
    """Yield tiles for up to 64 rows, where more than 16."""
    for outputs, warps, width, stages, parts, unit, registers in product(
        (64, 128), (4, 8), (128, 256), (2, 3, 4), (None, 1), (64, 128), (False, True)
    ):
        if outputs // 16 >= warps and (width == 128 or stages <= 2 + registers):
            yield Tiling(outputs, rows, warps, stages, width, 1, registers, None, parts, unit)


def of_many_rows() -> Iterator[Tiling]:
    """Yield tiles for any number of rows."""
    for outputs, rows, warps, width, registers, unit in product(
        (64, 128, 256), (64, 128, 256), (4, 8), (128, 256), (False, True), (64, 128)
    ):
        held = outputs * rows // (32 * warps)
        if outputs // 16 >= warps and 32 <= held <= 128 and (width == 128 or rows == 64):
            yield Tiling(outputs, rows, warps, 3, width, 1, registers, None, None, unit)


def call_with(problem: Problem, node: Node, tiling: Tiling, architecture: int) -> Call:
    """Return the call of a linear whose main loop works in a tile."""
    kept = tiles.coded_tilings
    tiles.coded_tilings = lambda *_: iter((tiling,))  # type: ignore[assignment]
    try:
        return problem.call(node, architecture)
    finally:
        tiles.coded_tilings = kept


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
        for tiling in candidates(rows, problem.inner)
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
            "tiling": asdict(tiling), "resources": resources,
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
