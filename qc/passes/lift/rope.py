"""Lift rotary position embeddings out of their arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, Origin, make
from qc.ir.rewrite import rewrite
from qc.ir.types import Dim
from qc.passes.lift.algebra import (
    binary,
    either_order,
    joined,
    permuted,
    reshaped,
    run_of,
    span_of,
    unary,
)
from qc.passes.pipeline import Context, Pass

SWAP_HEADS_AND_POSITIONS = (0, 2, 1, 3)


@dataclass(frozen=True)
class LiftRope(Pass):
    """Recognise rotary position embeddings of heads, of all their channels or the first ones.

        x * cos + concat(-x[half:], x[:half]) * sin                --> rope(x, cos, sin)
        concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)           --> rope(x, cos|cos, sin|sin)
        concat(rope(x[:rotary], cos, sin), x[rotary:])             --> rope(x, cos, sin)

    Heads that stand before the positions are permuted behind them and back. Exact.
    Su et al. 2021, section 3.4.2; partial rotation: Black et al. 2022, section 2.
    """

    name: ClassVar[str] = "lift_rope"

    def run(self, graph: Graph, context: Context) -> Graph:
        return rewrite(graph, RULES, self.name)


def lift_rope(node: Node) -> Node | None:
    """x cos + rotate_half(x) sin --> rope(x, cos, sin)"""
    for straight, turned in either_order(node, "add"):
        for x, cos in either_order(straight, "mul"):
            for partner, sin in either_order(turned, "mul"):
                if is_rotated_half(partner, x):
                    return make_rope(x, cos, sin, node.origin)
    return None


def lift_rope_of_halves(node: Node) -> Node | None:
    """concat(x1 cos - x2 sin, x2 cos + x1 sin) --> rope(x, concat(cos, cos), concat(sin, sin))"""
    if not joins_last_axis(node, 2):
        return None
    difference, sums = binary(node.inputs[0], "sub"), either_order(node.inputs[1], "add")
    if difference is None:
        return None
    for x1, cos in either_order(difference[0], "mul"):
        for x2, sin in either_order(difference[1], "mul"):
            found = halves(x1, x2)
            if found is not None and any(
                is_product(a, x2, cos) and is_product(b, x1, sin) for a, b in sums
            ):
                return make_rope(run_of(*found), doubled(cos), doubled(sin), node.origin)
    return None


def lift_partial_rope(node: Node) -> Node | None:
    """concat(rope(x[:rotary]), x[rotary:]) --> rope(x)"""
    if not joins_last_axis(node, 2):
        return None
    turned, kept = node.inputs
    if isinstance(turned.op, ops.Rope):
        found = joined(turned.inputs[0], kept)
        if found is not None:
            return make(turned.op, run_of(*found), *turned.inputs[1:], origin=node.origin)
    return None


def is_rotated_half(partner: Node, x: Node) -> bool:
    """Say whether `partner` is concat(-x[half:], x[:half]) over the last axis."""
    if not joins_last_axis(partner, 2):
        return False
    negated = unary(partner.inputs[0], "neg")
    return negated is not None and halves(partner.inputs[1], negated) == span_of(x)


def joins_last_axis(node: Node, parts: int) -> bool:
    """Say whether `node` joins that many values along their last axis."""
    op = node.op
    joins = isinstance(op, ops.Concat) and op.axis == node.tensor.rank - 1
    return joins and len(node.inputs) == parts


def halves(first: Node, second: Node) -> tuple[Node, Dim, Dim] | None:
    """Return the run whose halves these are, or None."""
    return joined(first, second) if first.type == second.type else None


def is_product(node: Node, a: Node, b: Node) -> bool:
    """Say whether `node` is a * b."""
    return (a, b) in either_order(node, "mul")


def doubled(table: Node) -> Node:
    """Return a table for half of the channels, repeated for the other half."""
    return make(ops.Concat(table.tensor.rank - 1), table, table)


def make_rope(x: Node, cos: Node, sin: Node, origin: Origin) -> Node | None:
    """Return rope(x, cos, sin) in the layout of `x`; None where the tables do not fit."""
    if x.tensor.rank != 4 or cos.type != sin.type or cos.tensor.dtype != x.tensor.dtype:
        return None
    batch, a, b, channels = x.tensor.shape
    shape = (1,) * (4 - cos.tensor.rank) + cos.tensor.shape
    if shape[0] not in (1, batch) or shape[3] != channels or not isinstance(channels, int):
        return None
    if channels % 2:
        return None
    tables = [reshaped(t, (shape[0], shape[1] * shape[2], channels)) for t in (cos, sin)]
    if shape[1:3] == (a, 1):
        return make(ops.Rope(), x, *tables, origin=origin)
    if shape[1:3] == (1, b):
        heads_last = permuted(x, SWAP_HEADS_AND_POSITIONS)
        turned = make(ops.Rope(), heads_last, *tables, origin=origin)
        return permuted(turned, SWAP_HEADS_AND_POSITIONS)
    return None


RULES = (lift_rope, lift_rope_of_halves, lift_partial_rope)
