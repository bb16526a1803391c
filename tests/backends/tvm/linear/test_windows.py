"""Weights that windows of a row's bits name: products, and how expressions are taken apart."""

from __future__ import annotations

import pytest

from qc.backends.tvm.linear.rule import linear_rule
from qc.backends.tvm.linear.windows import windows_of
from qc.ir.target import CPUS, host_cpu
from qc.ir.weights.expression import COL, ROW
from tests.backends.tvm.linear.cases import (
    Case,
    assert_exact,
    compile_cases,
    in_turns,
    term,
)

FORMATS = (
    "codebook2x8·d8", "codebook1x8·d2", "trellis2·w10", "lookup6·tensor", "codebook1x12·d8",
    "codebook1x6·d2", "codebook3x5·d4", "trellis1.5·d2·w9", "trellis2.5·d2·w8", "trellis3·w9",
    "lookup7·tensor", "lookup8·tensor", "trellis1·w6",
)  # fmt: skip

SIZES = ((33, 129), (48, 96), (7, 33), (16, 31), (3, 127), (17, 7), (31, 64))


def test_products_are_exact_up_to_rounding() -> None:
    assert_exact(linear_rule, in_turns(FORMATS, SIZES)[:4], host_cpu())


@pytest.mark.slow
@pytest.mark.parametrize("case", in_turns(FORMATS, SIZES), ids=lambda case: str(case.formats[0]))
def test_every_format_is_exact_up_to_rounding(case: Case) -> None:
    for target in (CPUS["x86_64-v2"], host_cpu()):
        assert_exact(linear_rule, [case], target)


@pytest.mark.fast_rules
def test_the_rule_takes_every_case() -> None:
    cases = in_turns(FORMATS, SIZES)
    for kernel in compile_cases(linear_rule, cases, CPUS["x86_64-v3"]):
        assert kernel.rule == "linear_windows"


@pytest.mark.parametrize(
    ("text", "dim", "stride", "bits"),
    [
        ("codebook2x8·d8", 8, 16, [8, 8]),  # one load gives a vector
        ("codebook1x8·d2", 2, 8, [8]),  # two codes are 16 bits: too large a table
        ("codebook1x4·d1", 2, 8, [8]),  # two codes at once
        ("trellis2·w10", 2, 4, [12]),  # neighbouring windows overlap
        ("trellis1.5·d2·w9", 2, 3, [9]),
        ("codebook3x5·d4", 4, 15, [5, 5, 5]),
        ("lookup8·tensor", 1, 8, [8]),
    ],
)
def test_windows_are_as_long_as_small_tables_allow(
    text: str, dim: int, stride: int, bits: list[int]
) -> None:
    format, shape = term(text), (32, 64)
    found = windows_of(format.decode(shape, ROW, COL), shape, format.arrays(shape), 8)
    assert found is not None
    assert (found.dim, found.stride) == (dim, stride)
    assert [part.bits for part in found.parts] == bits


@pytest.mark.parametrize("text", ["lookup4·row", "fp8", "int8·row", "lookup6·tensor·by(g32)"])
def test_tables_of_rows_and_arithmetic_are_left_alone(text: str) -> None:
    format, shape = term(text), (32, 64)
    assert windows_of(format.decode(shape, ROW, COL), shape, format.arrays(shape), 8) is None
