"""Bits times factors of rows and columns, looked up three at a time."""

from __future__ import annotations

import pytest

from qc.backends.tvm.linear.bit_factors import bit_products, summands
from qc.backends.tvm.linear.rule import linear_rule
from qc.ir.target import CPUS, host_cpu
from qc.ir.types import ActivationFormat
from qc.ir.weights.expression import COL, ROW
from qc.ir.weights.notation import parse_weights
from tests.backends.tvm.linear.cases import Case, worst_error

FORMATS = ("bitstack1·rank1", "bitstack2·rank4", "bitstack3·rank5")
SHAPES = ((33, 129), (1, 7), (48, 64), (17, 31))
ROWS = (1, 2, 5, 13)


def case(text: str, shape: tuple[int, int], activation: ActivationFormat | None = None) -> Case:
    return Case(*shape, parse_weights(text).terms, activation)


@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_lookups_are_exact_up_to_rounding(turn: int) -> None:
    activations = (None, ActivationFormat(8, 32))
    cases = [
        case(format, shape, activations[(number + turn) % 2])
        for number, (format, shape) in enumerate(zip(FORMATS * 2, SHAPES, strict=False))
    ]
    errors = worst_error(linear_rule, cases, host_cpu(), ROWS)
    assert max(errors.values()) < 1e-5, max(errors, key=lambda each: errors[each])


@pytest.mark.fast_rules
def test_they_are_chosen_by_the_expression() -> None:
    region = case("bitstack1·rank3", (48, 64)).region(CPUS["x86_64-v3"])
    kernel = linear_rule(region)
    assert kernel is not None
    assert kernel.rule == "linear_bit_factors"
    narrow = linear_rule(case("bitstack1·rank3", (48, 64)).region(CPUS["x86_64-v2"]))
    assert narrow is not None
    assert narrow.rule != "linear_bit_factors"


def test_an_expression_is_taken_apart_into_factors() -> None:
    (format,) = parse_weights("bitstack2·rank3").terms
    found = [bit_products(each) for each in summands(format.decode((8, 8), ROW, COL))]
    assert [(each.low, each.high, len(each.factors)) for each in found if each] == [(-1, 1, 3)] * 2


@pytest.mark.parametrize("text", ["planes2·g32", "int4·g32", "lookup4·row"])
def test_other_weights_are_left_to_other_rules(text: str) -> None:
    (format,) = parse_weights(text).terms
    decode = format.decode((32, 64), ROW, COL)
    assert not all(bit_products(each) for each in summands(decode))
