"""Embedding tables in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.weights.dense import DenseFormat, dense_term
from qc.ir.weights.weight import Weight, WeightFormat
from qc.passes.pipeline import Context, Pass
from qc.passes.stage import CANONICAL, QUANTIZED, Stage


@dataclass(frozen=True)
class StoreTables(Pass):
    """Store the tables that embeddings read in a 16-bit dtype.

        embedding(%ids, dense f32)  -->  embedding(%ids, dense f16)

    Lossy: rounds each element to the nearest value of `dtype`. A table that does not fit the range
    of the dtype stays as it is.
    """

    name: ClassVar[str] = "store_tables"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = QUANTIZED
    exact: ClassVar[bool] = False
    dtype: torch.dtype = torch.float16

    def run(self, graph: Graph, context: Context) -> Graph:
        return self.stored(graph, lambda weight: stored_as(weight, self.dtype))

    def preview(self, graph: Graph) -> Graph:
        """Return the graph with formats in place of stored values, as if every table fitted."""
        return self.stored(graph, lambda weight: planned_as(weight, self.dtype))

    def stored(self, graph: Graph, store: Callable[[Weight], Weight]) -> Graph:
        """Let the embeddings read tables that `store` returns."""
        replacements: dict[Node, Node] = {}
        for node in graph.nodes:
            if not isinstance(node.op, ops.Embedding):
                continue
            table = node.inputs[1].op
            if isinstance(table, ops.Parameter) and table.weight.bits_per_element > 16:
                stored = store(table.weight)
                replacements[node] = make(
                    node.op,
                    node.inputs[0],
                    make(ops.Parameter(stored), origin=node.inputs[1].origin),
                    origin=node.origin.touched_by(self.name),
                )
        return substitute(graph, replacements)


def planned_as(weight: Weight, dtype: torch.dtype) -> Weight:
    """Return `weight` in `dtype` without values."""
    return WeightFormat((DenseFormat(dtype),)).planned(weight.name, weight.shape, weight.dtype)


def stored_as(weight: Weight, dtype: torch.dtype) -> Weight:
    """Return `weight` in `dtype`, or as it is where a value would overflow."""
    values = weight.dense()
    rounded = values.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        return weight
    return Weight(weight.name, weight.shape, (dense_term(rounded),), weight.dtype)
