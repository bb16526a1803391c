"""Products with stored vectors move into what writes the channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.passes.pipeline import Context, Pass
from qc.passes.stage import CANONICAL, Stage
from qc.passes.transform.calibrated import keep_known
from qc.passes.transform.flow import Writer, is_stored, stored_values, writer_of
from qc.passes.transform.linears import storing, storing_as

NAME = "fold_scales"


@dataclass(frozen=True)
class FoldScales(Pass):
    """Let the norm or the linear in front of a product with a stored vector do the product.

        mul(rms_norm(%x, %g), %v)        -->  rms_norm(%x, %g v)
        mul(gated(%a, linear(%x, %w)), %v)  -->  gated(%a, linear(%x, diag(v) %w))

    Through gated activations, relu, token slices and attention: channels of query heads that share
    a value head must ask for the same factor. A product stays where something else reads the value.
    Exact: diag(v) commutes with all of these. SmoothQuant (Xiao et al. 2023), section 4; AWQ (Lin
    et al. 2023), section 3.2.
    """

    name: ClassVar[str] = NAME
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL

    def preview(self, graph: Graph) -> Graph:
        """Return the graph itself: formats and shapes of matrices stay."""
        return graph

    def run(self, graph: Graph, context: Context) -> Graph:
        before = graph
        while (found := first_foldable(graph)) is not None:
            product, writer, factors = found
            scaled = scaled_writer(writer, factors)
            graph = substitute(graph, {writer.node: scaled, product: product.inputs[0]})
        if context.calibration is not None:
            keep_known(context.calibration, before, graph, {})
        return graph


def first_foldable(graph: Graph) -> tuple[Node, Writer, Tensor] | None:
    """Find a product with a stored vector that what writes the channels can do."""
    for node in graph.nodes:
        if not is_scaling(node):
            continue
        writer = writer_of(graph, node.inputs[0], [node])
        factors = None if writer is None else writer.shared(stored_values(node.inputs[1]))
        if writer is not None and factors is not None and bool((factors > 0).all()):
            return node, writer, factors
    return None


def is_scaling(node: Node) -> bool:
    """Say whether a node multiplies a value of its own type by a stored vector [channels]."""
    if node.op != ops.Binary("mul"):
        return False
    value, vector = node.inputs
    return (
        value.type == node.type
        and is_stored(vector)
        and vector.tensor.shape == value.tensor.shape[-1:]
    )


def scaled_writer(writer: Writer, factors: Tensor) -> Node:
    """Return the writer with its channels multiplied by factors [channels]."""
    node = writer.node
    wide = factors.double()
    if isinstance(node.op, ops.Linear):
        weight = storing(node.inputs[1], stored_values(node.inputs[1]) * wide.unsqueeze(1))
        rest = [storing(bias, stored_values(bias) * wide) for bias in node.inputs[2:]]
        operands = [node.inputs[0], weight, *rest]
    else:  # a norm's gain and bias, or the vector of a product
        vectors = [storing_as(v, stored_values(v) * wide) for v in node.inputs[1:]]
        operands = [node.inputs[0], *vectors]
    return make(node.op, *operands, origin=node.origin.touched_by(NAME))
