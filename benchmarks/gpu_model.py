"""Fit how long GPU linears take to what was measured, for qc/checking/gpu_times.py:

    python -m benchmarks.gpu_model            prints the coefficients, and where they are wrong

Those of qc are then made longer, bucket by bucket, first those of entries, until nothing is
promised to be faster than 16 bits that was not: what `qc check` promises is meant to be kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_linear import Problem
from qc.checking.gpu import gpu_work, work_of_sixteen_bits
from qc.checking.gpu_times import BUCKETS, GpuWork, bucket_of
from qc.ir.target import parse_machine

MEASURED = Path(__file__).parent / "measured" / "gpu_linears.jsonl"
TARGET = "cuda:sm_90"
ROUNDS = 60
LATE = 0.7
"""Which part of the measured times is to be shorter than the fitted ones: an expectile."""
ENTRIES = 6
"""The feature of listed entries: see GpuWork.features."""
KEPT = 1.04
"""The largest speed-up that may be promised where none was measured: 1.05 is called a gain."""


def measured() -> Iterator[dict[str, Any]]:
    """Yield what was measured."""
    for line in MEASURED.read_text().splitlines():
        row = json.loads(line)
        if row.get("part") == "linears":
            yield row


def problem_of(row: dict[str, Any]) -> Problem:
    """Return the problem that a row is about."""
    format, *rest = row["label"].split(", ")
    return Problem(
        format, row["outer"], row["inner"], "bias SiLU residual" in rest, "int8 inputs" in rest
    )


def works(row: dict[str, Any], known: dict[Problem, tuple[GpuWork, GpuWork]]) -> tuple[Any, Any]:
    """Return what the product of a row has to do, and what it has with 16 bits."""
    problem = problem_of(row)
    if problem not in known:
        node = problem.node(problem.planned())
        call = problem.call(node, 90)
        (weight,) = problem.planned()
        found = gpu_work(weight.format, weight.shape, call)
        assert found is not None
        known[problem] = found, work_of_sixteen_bits(weight.shape)
    return known[problem]


def fitted(
    features: NDArray[np.float64], times: NDArray[np.float64], part: float
) -> NDArray[np.float64]:
    """Return non-negative coefficients for which `part` of the relative errors is negative."""
    scaled, wanted = features / times[:, None], np.ones(len(times))
    weights = np.ones(len(times))
    found = np.zeros(features.shape[1])
    for _ in range(ROUNDS):
        kept = [column for column in range(features.shape[1]) if features[:, column].any()]
        while True:
            found[:] = 0
            root = np.sqrt(weights)[:, None]
            found[kept] = np.linalg.lstsq(root * scaled[:, kept], root[:, 0] * wanted, rcond=None)[
                0
            ]
            if not kept or found.min() >= 0:
                break
            kept.remove(int(found.argmin()))
        weights = np.where(scaled @ found < wanted, part, 1 - part)
    return found


def fit(rows: Sequence[dict[str, Any]]) -> None:
    """Print the coefficients of all buckets."""
    known: dict[Problem, tuple[GpuWork, GpuWork]] = {}
    for number in range(len(BUCKETS) + 1):
        mine = [row for row in rows if bucket_of(row["rows"]) == number]
        own, sixteen = (np.array([time_of(row, which) for row in mine]) for which in (0, 1))
        work, baseline = (
            np.array([works(row, known)[which].features(row["rows"]) for row in mine])
            for which in (0, 1)
        )
        times, others = fitted(work, own, LATE), fitted(baseline, sixteen, 0.5)
        slower = own > sixteen
        listed = slower & (work[:, ENTRIES] > 0)
        short = (baseline @ others)[listed] / KEPT - work[listed] @ times
        times[ENTRIES] += max(0.0, (short / work[listed, ENTRIES]).max(initial=0.0))
        promised = (baseline @ others) / (work @ times)
        times *= max(1.0, promised[slower].max(initial=0.0) / KEPT)
        for name, found in (("TIMES", times), ("SIXTEEN", others)):
            print(name, number, tuple(float(f"{c:.3g}") for c in found))


def time_of(row: dict[str, Any], which: int) -> float:
    """Return the microseconds of a row: of qc, or of torch's product with float16."""
    own = float(row["microseconds"])
    return own if which == 0 else own * float(row["over_float16"])


def main() -> None:
    """Fit, then list what is promised and not kept."""
    rows = list(measured())
    fit(rows)
    known: dict[Problem, tuple[GpuWork, GpuWork]] = {}
    target = parse_machine(TARGET)
    for row in rows:
        work, sixteen = works(row, known)
        promised = sixteen.seconds(row["rows"], target, 1) / work.seconds(row["rows"], target, 1)
        if promised >= 1.05 and row["over_float16"] < 1:
            print(f"{row['label']} {row['outer']} x {row['inner']}, {row['rows']} rows: "
                  f"{promised:.2f} promised, {row['over_float16']:.2f} measured")  # fmt: skip


if __name__ == "__main__":
    main()
