"""The stored matrices of a graph, as layers that passes change."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.weights.weight import Weight

BRANCH = ".branch"


@dataclass(frozen=True, eq=False)
class Layer:
    """The linears that multiply by one matrix: one, or one for each part of a sum."""

    name: str
    linears: tuple[Node, ...]

    @property
    def weights(self) -> tuple[Weight, ...]:
        found = (linear.inputs[1].op for linear in self.linears)
        return tuple(op.weight for op in found if isinstance(op, ops.Parameter))

    @property
    def x(self) -> Node:
        """What the layer reads."""
        return self.linears[0].inputs[0]

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.weights[0].shape
        return rows, cols

    @property
    def bits(self) -> float:
        """Stored bits a weight."""
        return sum(w.bits for w in self.weights) / max(1, self.weights[0].elements)

    @property
    def format(self) -> str:
        return " + ".join(str(w.format) for w in self.weights)

    def values(self) -> Tensor:
        """Return the matrix, float32 [out, in]."""
        return reduce(torch.add, (w.dense().float() for w in self.weights))


def layers_of(graph: Graph) -> dict[str, Layer]:
    """Return the layers of a graph by the names of their weights. A weight that several linears
    share counts once."""
    found: dict[str, dict[Node, Node]] = {}
    for node in graph.nodes:
        if isinstance(node.op, ops.Linear) and isinstance(node.inputs[1].op, ops.Parameter):
            name = node.inputs[1].op.weight.name.removesuffix(BRANCH)
            found.setdefault(name, {}).setdefault(node.inputs[1], node)
    return {name: Layer(name, tuple(linears.values())) for name, linears in found.items()}
