"""Online rotations in front of linears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.hadamard import factor_for, rotate
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.weights.dense import dense_weight
from qc.passes.pipeline import Context, Pass
from qc.passes.stage import CANONICAL, Stage
from qc.passes.transform.linears import reading, storing, targeted, values_of


@dataclass(frozen=True)
class RotateInputs(Pass):
    """Rotate what linears read, and their weights with it, so that no channel stands out.

        linear(%x, %w)  -->  linear(hadamard(%x, %f), %w H)

    Of the linears in whose module path the regular expression `targets` is found. `block` channels
    are mixed at a time, all of them by default; linears whose inputs are no multiple of it stay.
    Linears that share an input share its rotation. A table that an embedding shares with a linear
    stays as it is for the embedding.
    Exact: H is orthogonal, so x H (W H)^T = x W^T. QuaRot (Ashkboos et al. 2024), section 4.
    """

    name: ClassVar[str] = "rotate_inputs"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL
    targets: str = ""
    block: int | None = None

    def run(self, graph: Graph, context: Context) -> Graph:
        factors: dict[int, Node] = {}
        inputs: dict[Node, Node] = {}
        weights: dict[Node, Node] = {}
        replacements: dict[Node, Node] = {}
        for linear in targeted(graph, self.targets):
            x, weight = linear.inputs[:2]
            block = self.block or int(weight.tensor.shape[1])
            if weight.tensor.shape[1] % block or isinstance(x.op, ops.Hadamard):
                continue
            factor = factors.setdefault(block, factor_node(block))
            if x not in inputs:
                origin = x.origin.touched_by(self.name)
                inputs[x] = make(ops.Hadamard(block), x, factor, origin=origin)
            if weight not in weights:
                weights[weight] = rotated(linear, factor, block)
            replacements[linear] = reading(linear, inputs[x], weights[weight], self.name)
        return substitute(graph, replacements)


def factor_node(block: int) -> Node:
    """Return the stored factor for transforms of `block` channels."""
    return make(ops.Parameter(dense_weight(f"hadamard.{block}", factor_for(block))))


def rotated(linear: Node, factor: Node, block: int) -> Node:
    """Return the parameter W H of a linear."""
    assert isinstance(factor.op, ops.Parameter)
    # In float64, so that the one rounding is that of the result.
    values = rotate(values_of(linear).double(), factor.op.weight.dense().double(), block)
    return storing(linear.inputs[1], values)
