"""Tables in registers that hashes and codes of 6 bits name."""

from __future__ import annotations

import re

import pytest

from qc.backends.tvm.linear.rule import linear_rule
from qc.backends.tvm.linear.windows import WINDOW
from qc.backends.tvm.linear.word_tables import bound, is_computable
from qc.ir.target import CPUS
from tests.backends.tvm.linear.cases import (
    Case,
    assert_exact,
    build,
    compile_cases,
    in_turns,
    term,
)
from tests.needs import needs

SIZES = ((33, 129), (48, 96), (7, 576), (3, 127), (31, 64), (16, 257))

FORMATS = ("trellis2·w10", "lookup6·tensor", "trellis1.5·d2·w9", "codebook1x6·d2")

TARGET = CPUS["avx512-vnni"]


@needs("avx512")
def test_products_are_exact_up_to_rounding() -> None:
    assert_exact(linear_rule, in_turns(FORMATS, SIZES), TARGET)


@pytest.mark.fast_rules
def test_the_rule_takes_what_registers_hold() -> None:
    kernels = compile_cases(linear_rule, in_turns(FORMATS, SIZES), TARGET)
    assert {kernel.rule for kernel in kernels} == {"linear_word_tables"}


@pytest.mark.fast_rules
def test_words_are_looked_up_in_registers() -> None:
    case = Case(32, 64, (term("trellis2·w10"),))
    assembly = build(compile_cases(linear_rule, [case], TARGET), TARGET).mod.inspect_source("asm")
    assert re.search(r"vperm[it]2w\s.*%zmm", assembly)


def test_sixteen_bits_are_enough_where_what_is_shifted_down_is_known() -> None:
    hashed = (WINDOW * 0x6427) & 0x7FFF
    assert bound(hashed >> 9, 10) == 63
    assert is_computable(hashed >> 9, 10)
    assert bound(WINDOW * 0x6427, 10) is None
    assert not is_computable((WINDOW * 0x6427) >> 9, 10)
    assert bound(WINDOW, 8) == 255
