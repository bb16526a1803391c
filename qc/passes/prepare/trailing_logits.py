"""Compute logits only for the positions at the end that somebody wants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import sympy

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.op import Op
from qc.ir.types import symbol
from qc.passes.pipeline import Context, Pass
from qc.passes.prepare.position_axes import is_positionwise, position_axis

KEEP = symbol("keep")
LOGITS = "logits"


@dataclass(frozen=True)
class TrailingLogits(Pass):
    """Keep the last `keep` positions of the logits, and of all that only they need.

        logits = linear(rms_norm(x), w)  -->  logits = linear(rms_norm(slice(x, seq - keep:seq)), w)

    The slices stand behind the last attention, and where the other values are needed whole.
    Exact (for the positions that are kept). Kwon et al. 2023 (vLLM), section 4.3, samples from
    the last position of a prompt in the same way.
    """

    name: ClassVar[str] = "trailing_logits"

    def run(self, graph: Graph, context: Context) -> Graph:
        if LOGITS not in graph.output_names:
            return graph
        seq = length_of(graph.output(LOGITS))
        if seq is None:
            return graph
        outputs = dict(zip(graph.output_names, graph.outputs, strict=True))
        outputs[LOGITS] = trailing(graph, seq)
        return graph.with_outputs(outputs.values())


def length_of(logits: Node) -> sympy.Symbol | None:
    """Return the size of axis 1 if it is a symbol of its own."""
    shape = logits.tensor.shape
    seq = shape[1] if len(shape) == 3 else None
    is_new = isinstance(seq, sympy.Symbol) and seq != KEEP and shape.count(seq) == 1
    return seq if is_new else None


def trailing(graph: Graph, seq: sympy.Symbol) -> Node:
    """Return the logits of the last `keep` positions."""
    partial = needed_in_part(graph, seq)
    rebuilt: dict[Node, Node] = {}

    def last_positions(node: Node) -> Node:
        axis = position_axis(node, seq)
        if axis is None:
            return node
        if node not in rebuilt:
            rebuilt[node] = make(ops.Slice(axis, seq - KEEP, seq), node, origin=node.origin)
        return rebuilt[node]

    for node in graph.nodes:
        if node in partial:
            inputs = tuple(last_positions(i) for i in node.inputs)
            rebuilt[node] = make(shortened(node, seq), *inputs, origin=node.origin)
    return last_positions(graph.output(LOGITS))


def needed_in_part(graph: Graph, seq: sympy.Symbol) -> set[Node]:
    """Return the nodes of which only the last positions are needed: they are positionwise, and
    nobody but the logits needs them."""
    pairs = zip(graph.output_names, graph.outputs, strict=True)
    whole = {node for name, node in pairs if name != LOGITS}
    partial = {graph.output(LOGITS)} - whole
    for node in reversed(graph.nodes):
        moves = bool(node.inputs) and is_positionwise(node, seq)
        if node in partial and node not in whole and moves:
            partial.update(node.inputs)
        else:
            whole.update(node.inputs if node in whole | partial else ())
            partial.discard(node)
    return {node for node in partial if position_axis(node, seq) is not None}


def shortened(node: Node, seq: sympy.Symbol) -> Op:
    """Return the op of a node for the last positions alone."""
    op, axis = node.op, position_axis(node, seq)
    if not isinstance(op, ops.Reshape | ops.Expand) or axis is None:
        return op
    shape = (*op.shape[:axis], KEEP, *op.shape[axis + 1 :])
    return replace(op, shape=shape)
