"""What passes will make of a graph, before any of them computes a value."""

from __future__ import annotations

from dataclasses import dataclass

from qc.ir import ops
from qc.ir.graph import Graph, map_nodes
from qc.ir.node import Node, make
from qc.ir.rewrite import with_inputs
from qc.passes.pipeline import Pipeline, Refusal


@dataclass(frozen=True)
class Preview:
    """Shapes and formats after some passes, or what they refuse; neither where a pass must read
    values to tell."""

    graph: Graph | None
    refusals: tuple[Refusal, ...] = ()


def preview(pipeline: Pipeline, graph: Graph) -> Preview:
    """Follow the passes on a graph without values, up to the first that refuses a weight."""
    seen: Graph | None = without_values(graph)
    for one in pipeline.passes:
        if seen is None:
            return Preview(None)
        refused = one.refusals(seen)
        if refused:
            return Preview(None, tuple(refused))
        seen = one.preview(seen)
    return Preview(seen)


def without_values(graph: Graph) -> Graph:
    """Return the graph with the matrices' formats in place of their values."""

    def transform(node: Node, inputs: tuple[Node, ...]) -> Node:
        if not isinstance(node.op, ops.Parameter) or node.tensor.rank != 2:
            return with_inputs(node, inputs)
        weight = node.op.weight
        planned = weight.format.planned(weight.name, weight.shape, weight.dtype)
        return make(ops.Parameter(planned), origin=node.origin)

    return map_nodes(graph, transform)
