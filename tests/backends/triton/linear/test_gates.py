"""Sums of several rows in one launch: which there are, and what must hold so that none waits for
ever."""

from __future__ import annotations

import re

import pytest

from qc.backends.triton.compile import compile_launch
from qc.backends.triton.kernel import Launch
from qc.backends.triton.linear.finished import WAVE
from tests.backends.triton.cases import Case, call_of

SUM = "int4·g128 + rank32 + sparse1%"
TOGETHER = (
    Case(SUM, 14336, 4096, 16, epilogue="all"),
    Case(SUM, 4096, 4096, 5, epilogue="all"),
    Case("int4·g128 + rank16", 4096, 4096, 16, dtype="bf16"),
    Case("int4·g128 + rank8 + sparse5%", 576, 576, 16, epilogue="residual"),
)
REGISTERS, SHARED = 65536, 227 << 10
"""Registers, and bytes of shared memory, of a multiprocessor of sm_90. NVIDIA Hopper tuning guide,
section 1.4.1."""
OWN = 1 << 10
"""Bytes of shared memory that the GPU keeps for every program."""


def launches_of(case: Case) -> tuple[Launch, ...]:
    return call_of(case.planned(), case.target).variant(case.rows).launches


@pytest.mark.parametrize("case", TOGETHER, ids=str)
def test_a_sum_is_one_launch_whose_programs_run_at_once(case: Case) -> None:
    """Whoever waits holds a place that a program it waits for may need."""
    (launch,) = launches_of(case)
    cubin, (_, programs, _) = compile_launch(launch, 90), launch.grid
    gpu = case.target.gpu
    assert gpu is not None
    assert programs.count({"rows": case.rows}) <= WAVE * gpu.multiprocessors
    assert WAVE * cubin.registers * 32 * cubin.num_warps <= REGISTERS
    assert WAVE * (cubin.shared_bytes + OWN) <= SHARED
    assert cubin.spills == 0


@pytest.mark.parametrize("case", TOGETHER, ids=str)
def test_those_that_are_waited_for_have_lower_numbers(case: Case) -> None:
    (launch,) = launches_of(case)
    roles = re.findall(r"(\w+)_role\(ROWS", launch.source.split("def together(")[1])
    assert roles[-1] == "linear"
    assert set(roles[:-1]) <= {"step", "across"}
    waiting = [text for text in launch.source.split("@triton.jit") if "turns.enter(" in text]
    assert len(waiting) == 1
    assert waiting[0].lstrip().startswith("def linear_role(")


@pytest.mark.parametrize(
    "case",
    [
        Case(SUM, 14336, 4096, 1),
        Case(SUM, 14336, 4096, 17),
        Case(SUM, 28672, 4096, 16),  # more programs than run at once
        Case(SUM, 4096, 14336, 16),  # by parts
        Case(SUM, 4096, 4096, 16, epilogue="gated"),
        Case(SUM, 4096, 4096, 16, activation=128),
        Case("int4·g128 + sparse1%", 4096, 4096, 16),  # timed: slower
        Case("int8·row + rank32", 4096, 4096, 16),
        Case("int4·g128 + rank32", 4096, 4096, 16, architecture="sm_80"),
        Case("int4·g128 + rank32", 4096, 4096, 16, architecture="sm_80+sm_90"),
    ],
    ids=str,
)
def test_what_was_not_timed_has_no_gates(case: Case) -> None:
    assert all("turns.enter(" not in launch.source for launch in launches_of(case))
