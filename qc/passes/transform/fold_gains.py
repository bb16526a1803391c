"""The gains and biases of norms move into the linears that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.weights.dense import dense_weight
from qc.passes.pipeline import Context, Pass
from qc.passes.stage import CANONICAL, Stage
from qc.passes.transform.flow import is_stored, linears_reading, stored_values
from qc.passes.transform.linears import parameter_name, storing, storing_as

NAME = "fold_gains"


@dataclass(frozen=True)
class FoldGains(Pass):
    """Leave norms without gains of their own where linears alone read them.

        linear(rms_norm(%x, %g), %w)           -->  linear(rms_norm(%x, 1), %w diag(%g))
        linear(layer_norm(%x, %g, %b), %w, %c) -->  linear(layer_norm(%x, 1, 0), %w diag(%g),
                                                           %c + %w %b)

    Exact. QuaRot (Ashkboos et al. 2024), section 4, in front of a rotation.
    """

    name: ClassVar[str] = NAME
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL

    def preview(self, graph: Graph) -> Graph:
        """Return the graph itself: formats and shapes of matrices stay."""
        return graph

    def run(self, graph: Graph, context: Context) -> Graph:
        replacements: dict[Node, Node] = {}
        for norm in graph.nodes:
            if not is_norm(norm) or is_plain(norm):
                continue
            for linear in linears_reading(graph, norm) or ():
                replacements[linear] = scaled_by(linear, norm)
                replacements[norm] = plain_norm(norm)
        return substitute(graph, replacements)


def is_norm(node: Node) -> bool:
    """Say whether a node is a norm with a stored gain."""
    if not isinstance(node.op, ops.RMSNorm | ops.LayerNorm):
        return False
    return all(is_stored(vector) for vector in node.inputs[1:])


def is_plain(norm: Node) -> bool:
    """Say whether a norm treats all channels alike: one gain, and no bias."""
    gain, *biases = (stored_values(vector) for vector in norm.inputs[1:])
    return bool((gain == gain[0]).all()) and not any(bool(b.any()) for b in biases)


def plain_norm(norm: Node) -> Node:
    """Return the norm with gain 1 and bias 0."""
    gain, *biases = norm.inputs[1:]
    ones = storing_as(gain, torch.ones_like(stored_values(gain)))
    zeros = [storing_as(bias, torch.zeros_like(stored_values(bias))) for bias in biases]
    return make(norm.op, norm.inputs[0], ones, *zeros, origin=norm.origin.touched_by(NAME))


def scaled_by(linear: Node, norm: Node) -> Node:
    """Return the linear that does what a norm's gain and bias did."""
    x, weight, *bias = linear.inputs
    values = stored_values(weight).double()
    gain, *shift = (stored_values(vector).double() for vector in norm.inputs[1:])
    operands = [x, storing(weight, values * gain), *bias]
    if shift:
        operands[2:] = [with_shift(linear, values @ shift[0])]
    return make(linear.op, *operands, origin=linear.origin.touched_by(NAME))


def with_shift(linear: Node, shift: Tensor) -> Node:
    """Return the bias of a linear and `shift` [out]."""
    if len(linear.inputs) == 3:
        bias = linear.inputs[2]
        return storing(bias, stored_values(bias).double() + shift)
    name = f"{parameter_name(linear)}.shift"
    return make(ops.Parameter(dense_weight(name, shift.float())), origin=linear.origin)
