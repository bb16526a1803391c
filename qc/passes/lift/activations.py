"""Lift activation functions that are written out, and products that are gates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import rewrite
from qc.passes.lift.algebra import close, either_order, factors, is_number, unary
from qc.passes.pipeline import Context, Pass

TANH_SCALE = math.sqrt(2 / math.pi)
TANH_CUBIC = 0.044715  # Hendrycks and Gimpel 2016, section 2


@dataclass(frozen=True)
class LiftActivations(Pass):
    """Recognise activation functions and gated activations.

        0.5 * x * (1 + tanh(0.79788 * (x + 0.044715 * x^3)))  -->  gelu_tanh(x)
        0.5 * x * (1 + erf(x / sqrt(2)))                      -->  gelu(x)
        x * sigmoid(x)                                        -->  silu(x)
        silu(gate) * up                                       -->  gated(silu)(gate, up)

    Exact. Hendrycks and Gimpel 2016, section 2; Shazeer 2020, section 2.
    """

    name: ClassVar[str] = "lift_activations"

    def run(self, graph: Graph, context: Context) -> Graph:
        return rewrite(graph, RULES, self.name)


def lift_gelu(node: Node) -> Node | None:
    """0.5 * x * (1 + tanh or erf(...)) --> gelu_tanh(x) or gelu(x)"""
    for raised in factors(node)[1]:
        for curve, one in either_order(raised, "add"):
            found = curve_argument(curve) if is_number(one, 1.0) else None
            if found is None:
                continue
            kind, x = found
            value, rest = factors(node, whole=(x, raised))
            if close(value, 0.5) and is_product_of(rest, (x, raised)):
                return same_type(make(ops.Unary(kind), x, origin=node.origin), node)
    return None


def curve_argument(curve: Node) -> tuple[str, Node] | None:
    """Return which GELU has this curve, and of what."""
    inner = unary(curve, "erf")
    if inner is not None:
        value, rest = factors(inner)
        return ("gelu", rest[0]) if len(rest) == 1 and close(value, math.sqrt(0.5)) else None
    inner = unary(curve, "tanh")
    x = cubic_argument(inner) if inner is not None else None
    return None if x is None else ("gelu_tanh", x)


def cubic_argument(node: Node) -> Node | None:
    """Return x where `node` is 0.79788 (x + 0.044715 x^3), also as x (1 + 0.044715 x^2)."""
    value, rest = factors(node)
    if not close(value, TANH_SCALE):
        return None
    for polynomial in rest:
        for low, high in either_order(polynomial, "add"):
            x = polynomial_argument(low, high, rest, polynomial)
            if x is not None:
                return x
    return None


def polynomial_argument(
    low: Node, high: Node, rest: tuple[Node, ...], polynomial: Node
) -> Node | None:
    """Return x where rest = [x + c x^3], or rest = [x, 1 + c x^2]."""
    if rest == (polynomial,):
        coefficient, powers = factors(high, whole=(low,))
        return low if close(coefficient, TANH_CUBIC) and powers == (low,) * 3 else None
    if len(rest) != 2 or not is_number(low, 1.0):
        return None
    x = rest[0] if rest[1] is polynomial else rest[1]
    coefficient, powers = factors(high, whole=(x,))
    return x if close(coefficient, TANH_CUBIC) and powers == (x, x) else None


def is_product_of(found: tuple[Node, ...], expected: tuple[Node, Node]) -> bool:
    """Say whether two factors are the expected ones in either order."""
    return found in (expected, expected[::-1])


def lift_silu(node: Node) -> Node | None:
    """x * sigmoid(x) --> silu(x)"""
    for x, gate in either_order(node, "mul"):
        if unary(gate, "sigmoid") is x:
            return make(ops.Unary("silu"), x, origin=node.origin)
    return None


def lift_gated(node: Node) -> Node | None:
    """silu(gate) * up --> gated(silu)(gate, up)"""
    for activated, up in either_order(node, "mul"):
        op = activated.op
        if not isinstance(op, ops.Unary) or op.kind not in ops.GATES or activated is up:
            continue
        gate = activated.inputs[0]
        if gate.type == up.type:
            return make(ops.GatedActivation(op.kind), gate, up, origin=node.origin)
    return None


def same_type(replacement: Node, node: Node) -> Node | None:
    """Return `replacement` if it has the type of `node`."""
    return replacement if replacement.type == node.type else None


RULES = (lift_gelu, lift_silu, lift_gated)
