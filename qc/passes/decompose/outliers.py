"""Outliers: the weights that matter most, kept in 16 bits beside the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qc.errors import FormatError
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.weights.columns import OnColumnsFormat, columns_term
from qc.ir.weights.dense import DenseFormat
from qc.ir.weights.kept_groups import KeptGroupsFormat, kept_groups_term
from qc.ir.weights.parts import largest, parse_percent
from qc.ir.weights.sparse import SparseFormat, sparse_term
from qc.ir.weights.weight import Term, TermFormat, Weight
from qc.passes.calibration.statistics import Hessian
from qc.passes.decompose.low_rank import of_inputs
from qc.passes.decompose.replacing import chosen_linears, replaced_weights, weight_of
from qc.passes.pipeline import Context, Pass
from qc.passes.quantize.remainder import LEFT, decomposed, remainder, with_parts
from qc.passes.stage import CANONICAL, Stage
from qc.passes.transform.linears import values_of

Criterion = Literal["magnitude", "hessian", "fisher", "gradient", "random"]
Shape = Literal["elements", "rows", "columns"]
Scores = Callable[[Node], Tensor]
"""A linear -> the score of every element of its weight [out, in]."""

HALF = DenseFormat(torch.float16)


def hessian_scores(values: Tensor, hessian: Tensor) -> Tensor:
    """w^2 H_ii: what dropping one weight alone would add to the outputs' squared error."""
    return values.square() * hessian.diagonal().to(values.dtype)


def outlier_format(share: str, shape: Shape, cols: int) -> TermFormat:
    """Return the format that stores a share of the elements, rows or columns in float16."""
    per_million = parse_percent(share.removesuffix("%"))
    if shape == "elements":
        return SparseFormat(per_million)
    if shape == "columns":
        return OnColumnsFormat(HALF, per_million=per_million)
    return KeptGroupsFormat(per_million, cols, HALF)


def outlier_term(format: TermFormat, values: Tensor, scores: Tensor) -> tuple[Term, Tensor]:
    """Store the values with the largest scores (summed along rows or columns where these are
    kept whole); return the term, and the values with zeros there."""
    shape = (values.shape[0], values.shape[1])
    match format:
        case SparseFormat():
            chosen = largest(scores, format.entries(shape))
            return sparse_term(format, values, chosen), values.masked_fill(chosen, 0)
        case OnColumnsFormat():
            index = largest(scores.sum(0), format.channels(shape[1])).nonzero().flatten()
            inner = format.inner.nearest(values[:, index])
            return columns_term(format, shape[1], index, inner), values.index_fill(1, index, 0)
        case KeptGroupsFormat():
            kept = largest(scores.sum(1), format.kept(shape))
            term = kept_groups_term(format, values, kept.unsqueeze(1))
            return term, values.masked_fill(kept.unsqueeze(1), 0)
    raise FormatError(f"{format} stores no outliers")


@dataclass(frozen=True)
class SplitOutliers(Pass):
    """Keep the weights that matter most in float16, in front of quantization.

        linear(%x, dense f32)  -->  linear(%x, dense f32 + sparse1%)

    A `share` of every matrix, of its single elements, whole rows (outputs) or columns (inputs),
    by the largest

        magnitude  |w|                              GPTQ-style outliers, weights alone
        hessian    w^2 H_ii                         SpQR (Dettmers et al. 2023), OBD
        fisher     mean (dL/dw)^2                   SqueezeLLM (Kim et al. 2023), section 4.2
        gradient   mean |dL/dw|                     GWQ (Shao et al. 2024), section 3
        random     nothing                          what the others are compared with

    over the first `samples` sequences. What is left has zeros there, so no grid need span outliers.
    Exact up to float16.
    """

    name: ClassVar[str] = "split_outliers"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL
    exact: ClassVar[bool] = False
    criterion: Criterion = "magnitude"
    share: str = "1%"
    shape: Shape = "elements"
    samples: int = 1
    seed: int = 0
    targets: tuple[str, ...] = ("linears",)

    def preview(self, graph: Graph) -> Graph:
        """Return the graph with formats in place of stored values."""

        def planned(linear: Node) -> Weight:
            weight = weight_of(linear)
            format = outlier_format(self.share, self.shape, weight.shape[1])
            return with_parts(weight, LEFT.planned(weight.shape), (format.planned(weight.shape),))

        return replaced_weights(graph, chosen_linears(graph, self.targets), planned, self.name)

    def run(self, graph: Graph, context: Context) -> Graph:
        linears = chosen_linears(graph, self.targets)
        scores = self.scores(graph, linears, context)

        def split(linear: Node) -> Weight:
            values = remainder(weight_of(linear))
            format = outlier_format(self.share, self.shape, values.shape[1])
            term, left = outlier_term(format, values, scores(linear))
            return decomposed(weight_of(linear), left, (term,))

        return replaced_weights(graph, linears, split, self.name)

    def scores(self, graph: Graph, linears: list[Node], context: Context) -> Scores:
        """Return what gives the score of every element of a linear's weight."""
        if self.criterion == "magnitude":
            return lambda linear: values_of(linear).abs()
        if self.criterion == "random":
            drawn = torch.Generator().manual_seed(self.seed)
            known = {n.inputs[1]: torch.rand(weight_of(n).shape, generator=drawn) for n in linears}
            return lambda linear: known[linear.inputs[1]]
        if self.criterion == "hessian":
            hessians = context.data(self).measure(graph, of_inputs(linears))
            return lambda n: hessian_scores(values_of(n), hessians[n.inputs[0], Hessian()])
        weights = list(dict.fromkeys(linear.inputs[1] for linear in linears))
        found = context.data(self).gradients(graph, weights, self.samples)
        if self.criterion == "fisher":
            return lambda linear: found[linear.inputs[1]].square
        return lambda linear: found[linear.inputs[1]].magnitude
