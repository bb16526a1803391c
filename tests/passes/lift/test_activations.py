"""GELU, SiLU and gates, and what only looks like them."""

import math

import pytest

from qc.ir import ops
from qc.ir.node import Node, make
from qc.passes.lift.activations import LiftActivations
from tests.passes.lift.drawing import (
    BATCH,
    SEQ,
    add,
    becomes,
    binary,
    mul,
    stays,
    unary,
    value,
)

X = value("x", BATCH, SEQ, 8)
UP = value("up", BATCH, SEQ, 8)
ROOT = math.sqrt(2 / math.pi)
CUBE = binary("pow", X, 3.0)
RELU = unary("relu", X)


def gelu_tanh(cubic: float = 0.044715, scale: float = ROOT) -> Node:
    inner = mul(add(X, mul(CUBE, cubic)), scale)
    return mul(mul(X, 0.5), add(unary("tanh", inner), 1.0))


def gelu_of_square() -> Node:
    inner = mul(mul(X, ROOT), add(1.0, mul(mul(X, 0.044715), X)))
    return mul(0.5, mul(X, add(1.0, unary("tanh", inner))))


@pytest.mark.parametrize("written", [gelu_tanh(), gelu_of_square()])
def test_gelu_by_tanh(written: Node) -> None:
    becomes(LiftActivations(), written, unary("gelu_tanh", X))


@pytest.mark.parametrize(
    "argument", [binary("div", X, math.sqrt(2)), mul(X, math.sqrt(0.5))], ids=["div", "mul"]
)
def test_gelu_by_erf(argument: Node) -> None:
    written = mul(mul(X, 0.5), add(1.0, unary("erf", argument)))
    becomes(LiftActivations(), written, unary("gelu", X))


def test_gelu_of_a_product() -> None:
    x = mul(X, UP)
    inner = mul(add(x, mul(binary("pow", x, 3.0), 0.044715)), ROOT)
    written = mul(mul(x, 0.5), add(unary("tanh", inner), 1.0))
    becomes(LiftActivations(), written, unary("gelu_tanh", x))


def test_silu() -> None:
    becomes(LiftActivations(), mul(unary("sigmoid", X), X), unary("silu", X))


@pytest.mark.parametrize("kind", ops.GATES)
def test_gates_in_either_order(kind: str) -> None:
    gated = make(ops.GatedActivation(kind), X, UP)
    becomes(LiftActivations(), mul(unary(kind, X), UP), gated)
    becomes(LiftActivations(), mul(UP, unary(kind, X)), gated)


def test_a_gate_that_is_written_out() -> None:
    gated = make(ops.GatedActivation("gelu_tanh"), X, UP)
    becomes(LiftActivations(), mul(gelu_tanh(), UP), gated)


@pytest.mark.parametrize(
    "almost",
    [
        gelu_tanh(cubic=0.0447),
        gelu_tanh(scale=0.8),
        mul(mul(X, 1.0), add(unary("tanh", mul(add(X, mul(CUBE, 0.044715)), ROOT)), 1.0)),
        mul(mul(UP, 0.5), add(unary("tanh", mul(add(X, mul(CUBE, 0.044715)), ROOT)), 1.0)),
        mul(unary("tanh", X), UP),
        mul(unary("relu", X), value("scale", 8)),
        mul(RELU, RELU),
    ],
)
def test_what_only_looks_like_an_activation_stays(almost: Node) -> None:
    stays(LiftActivations(), almost)
