"""RMSNorm and LayerNorm in all their spellings, and what only looks like them."""

import pytest

from qc.ir import ops
from qc.ir.node import Node, make
from qc.passes.lift.norms import LiftNorms
from tests.passes.lift.drawing import (
    BATCH,
    SEQ,
    add,
    becomes,
    binary,
    mean,
    mul,
    reshape,
    square,
    stays,
    stored,
    unary,
    value,
)

X = value("x", BATCH, SEQ, 8)
GAIN, BIAS = stored(8), stored(8)
EPS = 1e-6
ONES = make(ops.Full((8,), 1.0))
MOMENT = add(mean(square(X)), EPS)
NORM = mul(X, unary("rsqrt", MOMENT))


@pytest.mark.parametrize(
    "written",
    [
        mul(NORM, GAIN),
        mul(GAIN, NORM),
        mul(mul(X, GAIN), unary("rsqrt", MOMENT)),
        mul(GAIN, mul(unary("rsqrt", add(EPS, mean(mul(X, X)))), X)),
        mul(binary("div", X, unary("sqrt", MOMENT)), GAIN),
        mul(mul(X, binary("pow", MOMENT, -0.5)), GAIN),
        mul(mul(X, unary("reciprocal", unary("sqrt", MOMENT))), GAIN),
        mul(NORM, reshape(GAIN, 1, 1, 8)),
    ],
)
def test_rms_norm_is_found_in_every_spelling(written: Node) -> None:
    becomes(LiftNorms(), written, make(ops.RMSNorm(EPS), X, GAIN))


def test_rms_norm_without_gain_has_a_gain_of_ones() -> None:
    becomes(LiftNorms(), NORM, make(ops.RMSNorm(EPS), X, ONES))


def test_rms_norm_over_heads() -> None:
    x, gain = value("x", BATCH, 4, SEQ, 16), stored(16)
    written = mul(mul(x, unary("rsqrt", add(mean(square(x)), EPS))), gain)
    becomes(LiftNorms(), written, make(ops.RMSNorm(EPS), x, gain))


def test_layer_norm_is_the_norm_of_a_centered_value() -> None:
    centered = binary("sub", X, mean(X))
    root = unary("rsqrt", add(mean(square(centered)), EPS))
    written = add(mul(mul(centered, root), GAIN), BIAS)
    becomes(LiftNorms(), written, make(ops.LayerNorm(EPS), X, GAIN, BIAS))


def test_layer_norm_without_gain_and_bias() -> None:
    centered = binary("sub", X, mean(X))
    written = mul(centered, unary("rsqrt", add(mean(square(centered)), EPS)))
    expected = make(ops.LayerNorm(EPS), X, ONES, make(ops.Full((8,), 0.0)))
    becomes(LiftNorms(), written, expected)


OTHER = value("y", BATCH, SEQ, 8)


@pytest.mark.parametrize(
    "almost",
    [
        mul(OTHER, unary("rsqrt", MOMENT)),  # normalises one value by another
        mul(X, unary("sqrt", MOMENT)),  # multiplies by the root
        mul(X, unary("rsqrt", add(mean(binary("pow", X, 4.0)), EPS))),  # another moment
        mul(X, unary("rsqrt", mean(square(X)))),  # no epsilon
        mul(X, unary("rsqrt", add(make(ops.Reduce("mean", (1,), True), square(X)), EPS))),
        mul(X, unary("rsqrt", add(make(ops.Reduce("sum", (2,), True), square(X)), EPS))),
    ],
)
def test_what_only_looks_like_a_norm_stays(almost: Node) -> None:
    stays(LiftNorms(), almost)


def test_a_gain_per_position_stays_outside() -> None:
    normed = make(ops.RMSNorm(EPS), X, ONES)
    stays(LiftNorms(), mul(normed, value("gain", SEQ, 8)))
