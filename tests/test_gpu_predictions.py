"""What is promised of GPU linears, against what was measured on one."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gpu_model import TARGET, measured, works
from qc.checking.gpu_times import GpuWork
from qc.checking.roofline import NOTHING_GAINED, speedup
from qc.ir.target import parse_machine

ROWS = list(measured())
FEW = [row for row in ROWS if (row["outer"], row["inner"]) in ((14336, 4096), (576, 576))]


def broken_promises(rows: list[dict[str, Any]]) -> list[str]:
    """List what was promised to be faster than float16 and was slower."""
    known: dict[Any, tuple[GpuWork, GpuWork]] = {}
    target = parse_machine(TARGET)
    found = []
    for row in rows:
        promised = speedup(*works(row, known), row["rows"], target)
        if promised >= NOTHING_GAINED and row["over_float16"] < 1:
            found.append(f"{row['label']} {row['outer']} x {row['inner']}, {row['rows']} rows")
    return found


def test_no_speed_is_promised_that_was_not_measured() -> None:
    plain = [row for row in FEW if row["label"] in ("int4·g128", "int4·g128 + rank32")]
    assert len(plain) >= 15
    assert broken_promises(plain) == []


@pytest.mark.slow
def test_nor_for_any_linear_that_was_measured() -> None:
    assert len(ROWS) > 300
    assert broken_promises(ROWS) == []


def test_what_gains_most_is_promised_a_gain() -> None:
    """A promise of nothing would be kept, too."""
    target, known = parse_machine(TARGET), dict[Any, tuple[GpuWork, GpuWork]]()
    best = [
        row
        for row in FEW
        if row["label"] == "int4·g128" and row["outer"] == 14336 and row["rows"] <= 16
    ]
    assert best
    assert all(speedup(*works(row, known), row["rows"], target) > 1.5 for row in best)
