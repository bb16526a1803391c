"""Rotary embeddings of whole and of partial heads, in both layouts."""

import pytest

from qc.ir import ops
from qc.ir.node import Node, make
from qc.passes.lift.rope import LiftRope
from tests.passes.lift.drawing import (
    BATCH,
    SEQ,
    add,
    becomes,
    binary,
    concat,
    cut,
    mul,
    permute,
    reshape,
    stays,
    unary,
    value,
)

COS, SIN = value("cos", 1, SEQ, 8), value("sin", 1, SEQ, 8)
X = value("x", BATCH, SEQ, 4, 8)
HEADS_FIRST = value("x", BATCH, 4, SEQ, 8)


def half_turned(x: Node) -> Node:
    half = x.tensor.shape[-1] // 2
    return concat(unary("neg", cut(x, half, 2 * half)), cut(x, 0, half))


def rotated(x: Node, cos: Node, sin: Node) -> Node:
    return add(mul(x, cos), mul(half_turned(x), sin))


def behind_positions(table: Node) -> Node:
    batch, seq, channels = table.tensor.shape
    return reshape(table, batch, seq, 1, channels)


def before_positions(table: Node) -> Node:
    batch, seq, channels = table.tensor.shape
    return reshape(table, batch, 1, seq, channels)


def test_rope_of_positions_first() -> None:
    written = rotated(X, behind_positions(COS), behind_positions(SIN))
    becomes(LiftRope(), written, make(ops.Rope(), X, COS, SIN))


def test_rope_of_heads_first_permutes_around_it() -> None:
    written = rotated(HEADS_FIRST, before_positions(COS), before_positions(SIN))
    turned = make(ops.Rope(), permute(HEADS_FIRST, 0, 2, 1, 3), COS, SIN)
    becomes(LiftRope(), written, permute(turned, 0, 2, 1, 3))


def test_rope_with_tables_of_its_own_for_every_row() -> None:
    cos, sin = value("cos", BATCH, SEQ, 8), value("sin", BATCH, SEQ, 8)
    written = rotated(X, behind_positions(cos), behind_positions(sin))
    becomes(LiftRope(), written, make(ops.Rope(), X, cos, sin))


def test_rope_of_the_first_channels() -> None:
    x = value("x", BATCH, SEQ, 4, 20)
    turned = rotated(cut(x, 0, 8), behind_positions(COS), behind_positions(SIN))
    becomes(LiftRope(), concat(turned, cut(x, 8, 20)), make(ops.Rope(), x, COS, SIN))


def test_rope_of_the_first_channels_of_a_fused_projection() -> None:
    fused = value("x", BATCH, SEQ, 4, 60)
    head, half = cut(fused, 20, 28), (cut(fused, 20, 24), cut(fused, 24, 28))
    partner = concat(unary("neg", half[1]), half[0])
    turned = add(mul(head, behind_positions(COS)), mul(partner, behind_positions(SIN)))
    written = concat(turned, cut(fused, 28, 40))
    becomes(LiftRope(), written, make(ops.Rope(), cut(fused, 20, 40), COS, SIN))


def test_rope_by_halves_of_tables() -> None:
    cos, sin = value("cos", 1, SEQ, 4), value("sin", 1, SEQ, 4)
    c, s = behind_positions(cos), behind_positions(sin)
    x1, x2 = cut(X, 0, 4), cut(X, 4, 8)
    first = binary("sub", mul(x1, c), mul(x2, s))
    second = add(mul(x2, c), mul(x1, s))
    tables = [reshape(concat(t, t), 1, SEQ, 8) for t in (c, s)]
    becomes(LiftRope(), concat(first, second), make(ops.Rope(), X, *tables))


C, S = behind_positions(COS), behind_positions(SIN)
LOW, HIGH = cut(X, 0, 4), cut(X, 4, 8)


@pytest.mark.parametrize(
    "almost",
    [
        add(mul(X, C), mul(concat(LOW, unary("neg", HIGH)), S)),  # the other half is negated
        add(mul(X, C), mul(concat(HIGH, unary("neg", LOW)), S)),  # turns backwards
        add(mul(X, C), mul(concat(HIGH, LOW), S)),  # nothing is negated
        binary("sub", mul(X, C), mul(half_turned(X), S)),
        add(mul(value("y", BATCH, SEQ, 4, 8), C), mul(half_turned(X), S)),
        rotated(X, value("cos", SEQ, 4, 8), value("sin", SEQ, 4, 8)),  # tables of every head
    ],
)
def test_what_only_looks_like_rope_stays(almost: Node) -> None:
    stays(LiftRope(), almost)


def test_halves_with_another_order_stay() -> None:
    cos, sin = value("cos", 1, SEQ, 1, 4), value("sin", 1, SEQ, 1, 4)
    first = binary("sub", mul(LOW, cos), mul(HIGH, sin))
    second = add(mul(LOW, cos), mul(HIGH, sin))
    stays(LiftRope(), concat(first, second))
