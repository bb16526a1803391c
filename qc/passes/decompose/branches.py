"""Parts of a weight that read their input in floating point while the rest reads codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.weights.weight import Weight
from qc.passes.decompose.replacing import weight_of
from qc.passes.pipeline import Context, Pass
from qc.passes.quantize.remainder import is_decomposed
from qc.passes.stage import CANONICAL, Stage


@dataclass(frozen=True)
class SplitBranches(Pass):
    """Multiply by what a decomposition took out in a linear of its own.

        linear(%x, dense f32 + rank32, %b)  -->  add(linear(%x, dense f32, %b),
                                                     linear(%x, rank32))

    so that the input of the first can be quantized to few bits while the branch reads it whole.
    Exact. SVDQuant (Li et al. 2024), section 4.2.
    """

    name: ClassVar[str] = "split_branches"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL

    def run(self, graph: Graph, context: Context) -> Graph:
        linears = [n for n in graph.nodes if is_split(n)]
        return substitute(graph, {linear: split(linear) for linear in linears})


def is_split(node: Node) -> bool:
    """Say whether a node is a linear whose weight has been decomposed."""
    if not isinstance(node.op, ops.Linear) or not isinstance(node.inputs[1].op, ops.Parameter):
        return False
    return is_decomposed(weight_of(node))


def split(linear: Node) -> Node:
    """Return the sum of two linears."""
    x, parameter, *bias = linear.inputs
    weight = weight_of(linear)
    left = Weight(weight.name, weight.shape, weight.terms[:1], weight.dtype)
    branch = Weight(f"{weight.name}.branch", weight.shape, weight.terms[1:], weight.dtype)
    origin = linear.origin.touched_by("split_branches")
    rest, taken = (make(ops.Parameter(w), origin=parameter.origin) for w in (left, branch))
    wide = make(linear.op, x, rest, *bias, origin=origin)
    return make(ops.Binary("add"), wide, make(linear.op, x, taken, origin=origin), origin=origin)
