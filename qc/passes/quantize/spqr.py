"""SpQR: tiny groups, their scales quantized in their turn, and single outliers kept exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qc.errors import FormatError
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.weights.parts import MILLION
from qc.ir.weights.rounding import Rounding
from qc.ir.weights.sparse import SparseFormat, sparse_term
from qc.ir.weights.weight import Term
from qc.passes.quantize.calibrated import StoreByData
from qc.passes.quantize.error_feedback import Curvature, feed_back, prepare

SHARE_STEP = 2_500
"""Outliers are stored in room for a multiple of 0.25% of a matrix: every share is a format, and
every format a kernel to compile. Room that is left costs what any entry costs."""


def outlier_threshold(columns: Tensor, curvature: Curvature, tau: float) -> float:
    """Return T = tau mean_i Var(W_i) / U_ii^2 for W^T [in, out]. SpQR, algorithm 1."""
    steps = curvature.factor.diagonal().square()
    spread = columns[curvature.order].var(1, correction=0)
    return tau * float((spread / steps).mean())


def leave_one_out(values: Tensor, steps: Tensor, top: int) -> Tensor:
    """Return what the error of a group would fall by without each of its weights: [group, out].

    values [group, out]; steps U_ii [group]. The grid spans the extremes, of all weights or of the
    others; errors are ((w - q) / U_ii)^2. SpQR, section 4.2, eq. 5.
    """
    base = grid_errors(values, values, steps, top).sum(0)
    gains = torch.empty_like(values)
    for j in range(len(values)):
        others = torch.arange(len(values)) != j
        rest = values[others]
        gains[j] = base - grid_errors(rest, rest, steps[others], top).sum(0)
    return gains


def grid_errors(values: Tensor, spanned: Tensor, steps: Tensor, top: int) -> Tensor:
    """Return ((w - q) / U_ii)^2 for a grid over the extremes of `spanned`, per output."""
    low, high = spanned.amin(0), spanned.amax(0)
    scale = ((high - low) / top).clamp_min(1e-12)
    codes = ((values - low) / scale).round().clamp(0, top)
    return ((codes * scale + low - values) / steps.unsqueeze(1)).square()


def without_outliers(values: Tensor, outliers: Tensor) -> Tensor:
    """Put the mean of the other weights of a group in place of its outliers."""
    kept = ~outliers
    mean = (values * kept).sum(0) / kept.sum(0).clamp_min(1)
    return torch.where(outliers, mean, values)


def spqr(
    values: Tensor, curvature: Curvature, rounding: Rounding, tau: float, search: bool
) -> tuple[Term, Tensor, Tensor]:
    """Store a matrix [out, in] but its outliers; return the term, the outliers' places [out, in]
    and the values that the matrix has in all."""
    columns = values.T.contiguous()
    threshold = outlier_threshold(columns, curvature, tau)
    chosen = torch.zeros(columns.shape, dtype=torch.bool)
    diagonal, top = curvature.factor.diagonal(), rounding.levels - 1

    def entering(column: int, seen: Tensor, steps: Tensor) -> Tensor:
        if not search:
            return seen
        return without_outliers(seen, leave_one_out(seen, steps, top) > threshold)

    def exempt(column: int, wanted: Tensor, rounded: Tensor) -> Tensor:
        chosen[column] = ((wanted - rounded) / diagonal[column]).square() > threshold
        return chosen[column]

    result, _ = feed_back(
        columns, curvature, rounding, fitted=False, exempt=exempt, entering=entering
    )
    return rounding.term(), chosen.T, result.T


def outlier_terms(dense: Term, chosen: Tensor, wanted: Tensor) -> tuple[Term, ...]:
    """Return what makes `dense` the wanted values where they are chosen: the differences, so that
    adding and replacing are the same."""
    count = int(chosen.sum())
    if not count:
        return (dense,)
    share = -(-count * MILLION // chosen.numel())
    format = SparseFormat(min(MILLION, -(-share // SHARE_STEP) * SHARE_STEP))
    return dense, sparse_term(format, wanted - dense.dense().float(), chosen)


@dataclass(frozen=True)
class Spqr(StoreByData):
    """Store the weights of linears in few bits with the sensitive ones beside them.

        %w = weight dense f32    -->  %w = weight int3·g16·min·scale(...)·minimum(...) + sparse1%
        linear(%x, %w)                linear(%x, %w)

    Lossy: minimises ||X W^T - X Q^T||^2 greedily, without the weights whose own share of it is
    above `tau` times the mean of one column; these are kept in float16. Dettmers et al. 2023
    (SpQR), algorithm 1. Columns stay in their order: groups of permuted inputs would need the
    permutation at run time. `search` leaves each weight of a group out in turn to see what it costs
    the others.
    """

    name: ClassVar[str] = "spqr"
    format: str = "int3·g16·min·scale(int3·o16·min)·minimum(int3·o16·min)"
    tau: float = 0.2
    damping: float = 1.0
    search: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        rounding = self.weights.terms[0].rounding((64, 64))
        if len(self.weights.terms) != 1 or rounding is None or not rounding.levels:
            raise FormatError(f"SpQR stores one term of integer codes in groups, not {self.format}")

    def preview(self, graph: Graph) -> Graph | None:
        return None  # how many outliers there are depends on the values

    def prepare(self, hessian: Tensor, name: str) -> Curvature:
        return prepare(hessian, self.damping, sort=False, name=name)

    def store(self, values: Tensor, prepared: Curvature, parameter: Node) -> tuple[Term, ...]:
        rounding = self.weights.terms[0].rounding((values.shape[0], values.shape[1]))
        assert rounding is not None
        return outlier_terms(*spqr(values, prepared, rounding, self.tau, self.search))
