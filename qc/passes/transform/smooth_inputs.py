"""Moving the range of channels between activations and weights."""

from __future__ import annotations

from collections.abc import Sequence
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
from qc.passes.transform.linears import (
    parameter_name,
    reading,
    storing,
    targeted,
    values_of,
)

NAME = "smooth_inputs"


def scales_of_weights(weights: Sequence[Tensor], beta: float) -> Tensor:
    """Return s_j = (max_i |W_ij|)^-beta over all rows of all weights, divided by its geometric
    mean; 1 for a channel of zeros, for which any scale is right. Float32[in]."""
    largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0).double()
    logs = torch.where(largest > 0, -beta * largest.log(), torch.nan)
    return torch.nan_to_num(logs - logs.nanmean(), nan=0.0).exp().float()


def smoothed(linear: Node, scales: Tensor) -> Node:
    """Return linear(x * (1 / s), W s) for a linear(x, W) and s [in]: what it was, exactly."""
    return smoothed_together([linear], scales)[0]


def smoothed_together(linears: Sequence[Node], scales: Tensor) -> list[Node]:
    """Smooth linears that read the same value, which is multiplied once."""
    x = linears[0].inputs[0]
    # The weight takes the inverse of what is stored, so that rounding 1 / s to the dtype of the
    # activation changes nothing.
    inverse = scales.double().reciprocal().to(x.tensor.dtype)
    name = f"{parameter_name(linears[0])}.smooth"
    vector = make(ops.Parameter(dense_weight(name, inverse)), origin=linears[0].inputs[1].origin)
    narrowed = make(ops.Binary("mul"), x, vector, origin=x.origin.touched_by(NAME))
    grown = [storing(n.inputs[1], values_of(n) / inverse.double()) for n in linears]
    return [reading(n, narrowed, w, NAME) for n, w in zip(linears, grown, strict=True)]


@dataclass(frozen=True)
class SmoothInputs(Pass):
    """Give the input channels of weights like ranges, and the difference to the activations.

        linear(%x, %w)  -->  linear(mul(%x, 1/s), %w s)

    Of the linears in whose module path the regular expression `targets` is found; those that share
    an input share one vector s_j = (max_i |W_ij|)^-beta, divided by its geometric mean: no data.
    Exact: (x / s) (W s)^T = x W^T. SmoothQuant (Xiao et al. 2023), equation 4, with alpha = 0 and
    the exponent of the weights free.
    """

    name: ClassVar[str] = NAME
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL
    beta: float = 0.5
    targets: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        readers: dict[Node, list[Node]] = {}
        for linear in targeted(graph, self.targets):
            readers.setdefault(linear.inputs[0], []).append(linear)
        replacements: dict[Node, Node] = {}
        for linears in readers.values():
            scales = scales_of_weights([values_of(linear) for linear in linears], self.beta)
            smooth = smoothed_together(linears, scales)
            replacements |= zip(linears, smooth, strict=True)
        return substitute(graph, replacements)
