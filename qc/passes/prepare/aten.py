"""Translate ATen calls into the ops of the IR: one table, overload -> builder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qc.ir import ops
from qc.ir.graph import Graph, map_nodes
from qc.ir.node import Node
from qc.ir.rewrite import with_inputs
from qc.ir.types import TupleType
from qc.passes.pipeline import Context, Pass
from qc.passes.prepare.aten_call import Builder, Call
from qc.passes.prepare.aten_elementwise import ELEMENTWISE
from qc.passes.prepare.aten_network import NETWORK
from qc.passes.prepare.aten_shape import PARTS, SHAPE

TABLE: dict[str, Builder] = {**ELEMENTWISE, **SHAPE, **NETWORK}
"""Every overload that has a translation to one result."""


@dataclass(frozen=True)
class TranslateAten(Pass):
    """Turn ATen calls into IR ops; what has no translation stays a call.

        torch(%x, %w, aten.linear.default) --> linear(%x, %w)

    Exact.
    """

    name: ClassVar[str] = "aten"

    def run(self, graph: Graph, context: Context) -> Graph:
        return map_nodes(graph, lambda node, inputs: translate(with_inputs(node, inputs)))


def translate(node: Node) -> Node:
    """Return the node that computes the same without ATen; `node` where there is none."""
    replacement = translation(node)
    if replacement is None:
        return node
    if isinstance(node.type, TupleType) or replacement.type == node.type:
        return replacement
    if replacement.tensor.shape != node.tensor.shape:
        return node
    return Call(node, node.op).cast(replacement, node.tensor.dtype)  # type: ignore[arg-type]


def translation(node: Node) -> Node | None:
    """Ask the table; what a builder or an op refuses with ValueError has no translation."""
    try:
        if isinstance(node.op, ops.Torch) and node.op.overload in TABLE:
            return TABLE[node.op.overload](Call(node, node.op))
        if isinstance(node.op, ops.Item):
            several, call = node.inputs[0], node.inputs[0].op
            if isinstance(call, ops.Torch) and call.overload in PARTS:
                return PARTS[call.overload](Call(several, call))[node.op.index]
    except ValueError:
        return None
    return None
