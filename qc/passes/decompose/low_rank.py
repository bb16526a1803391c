"""Low rank: of a weight in front of quantization, or of the error behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from qc.errors import FormatError
from qc.ir.device import CPU, here, moved
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.threads import side_by_side
from qc.ir.weights.low_rank import LowRankFormat, balanced_factors, low_rank_term
from qc.ir.weights.notation import parse_term
from qc.ir.weights.weight import Term, Weight, WeightFormat
from qc.passes.calibration.statistics import Hessian, Statistic
from qc.passes.decompose.replacing import (
    changed_pairs,
    chosen_linears,
    replaced_weights,
    weight_of,
    with_terms,
)
from qc.passes.pipeline import Context, Pass, Refusal
from qc.passes.quantize.nearby import nearest_accepted
from qc.passes.quantize.remainder import LEFT, decomposed, remainder, with_parts
from qc.passes.stage import CANONICAL, QUANTIZED, Stage
from qc.passes.transform.linears import values_of


def whitened_factors(values: Tensor, rank: int, hessian: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return up [out, rank] and down [rank, in] that minimise ||(W - up down) H^(1/2)||_F.

    SVD of W H^(1/2), with H^(-1/2) behind it; without H, of W. L2QER (Zhang et al. 2024), section
    3.2, with the whole H in place of its diagonal.
    """
    if hessian is None:
        return balanced_factors(values, rank)
    root, inverse = roots(hessian)
    up, down = balanced_factors((values.double() @ root).float(), rank)
    return up, (down.double() @ inverse).float()


def roots(hessian: Tensor, damping: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Return H^(1/2) and H^(-1/2) in float64, H with `damping` of its mean eigenvalue added: dead
    directions would divide by zero."""
    wide = hessian.double()
    wide = wide + damping * wide.diagonal().mean() * torch.eye(len(wide), dtype=wide.dtype)
    found, vectors = torch.linalg.eigh(wide)
    values = found.clamp_min(1e-30).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


@dataclass(frozen=True)
class SplitLowRank(Pass):
    """Take the leading singular directions out of weights, in front of quantization.

        linear(%x, dense f32)  -->  linear(%x, dense f32 + rank32)

    What is left, W - L, has no large directions and rounds finer. With `whiten`, directions are
    those of the outputs on data. Lossy: rounds the factors, which what is left makes up for.
    SVDQuant (Li et al. 2024), section 4.2.
    """

    name: ClassVar[str] = "split_low_rank"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL
    exact: ClassVar[bool] = True
    format: str = "rank32"
    whiten: bool = False
    targets: tuple[str, ...] = ("linears",)

    def refusals(self, graph: Graph) -> list[Refusal]:
        return refused_ranks(graph, self.format, self.targets)

    def preview(self, graph: Graph) -> Graph:
        """Return the graph with formats in place of stored values."""
        linears, format = chosen_linears(graph, self.targets), rank_format(self.format)
        return replaced_weights(graph, linears, lambda n: planned_split(n, format), self.name)

    def run(self, graph: Graph, context: Context) -> Graph:
        require_none(self.refusals(graph))
        linears = chosen_linears(graph, self.targets)
        hessians = context.data(self).measure(graph, of_inputs(linears)) if self.whiten else {}

        def split(linear: Node) -> Weight:
            values = remainder(weight_of(linear))
            format = rank_format(self.format)
            hessian = moved(hessians.get((linear.inputs[0], Hessian())), here())
            term = low_rank_term(format, *whitened_factors(values, format.rank, hessian))
            return decomposed(weight_of(linear), values - term.dense(), (term,))

        return replaced_weights(graph, linears, split, self.name)


@dataclass(frozen=True)
class CompensateError(Pass):
    """Add the leading singular directions of the error of a quantization to what it stored.

        linear(%x, int3·g64)  -->  linear(%x, int3·g64 + rank8)

    `inner` is the pass that quantizes. With `whiten`, directions are those of the outputs on data.
    Lossy: minimises ||(W - Q - up down) H^(1/2)||_F, H = 1 without `whiten`. ZeroQuant-V2 (Yao et
    al. 2023), section 5 (LoRC).
    """

    name: ClassVar[str] = "compensate_error"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = QUANTIZED
    exact: ClassVar[bool] = False
    inner: Pass
    format: str = "rank8"
    whiten: bool = False
    targets: tuple[str, ...] = ("linears",)

    def storing(self, format: WeightFormat) -> Self | None:
        changed = self.inner.storing(format)
        return None if changed is None else replace(self, inner=changed)

    def resized(self, bits: int | None, group: int | None) -> Self | None:
        changed = self.inner.resized(bits, group)
        return None if changed is None else replace(self, inner=changed)

    def refusals(self, graph: Graph) -> list[Refusal]:
        return self.inner.refusals(graph) or refused_ranks(graph, self.format, self.targets)

    def preview(self, graph: Graph) -> Graph | None:
        """Return the graph with formats in place of stored values."""
        inner = self.inner.preview(graph)
        if inner is None:
            return None
        format = rank_format(self.format)
        chosen = changed_pairs(graph, inner, chosen_linears(graph, self.targets))
        terms = {new: format.planned(weight_of(new).shape) for _, new in chosen}
        return with_terms(inner, terms, self.name)

    def run(self, graph: Graph, context: Context) -> Graph:
        require_none(self.refusals(graph))
        linears = chosen_linears(graph, self.targets)
        hessians = context.data(self).measure(graph, of_inputs(linears)) if self.whiten else {}
        stored = self.inner.run(graph, context)
        format = rank_format(self.format)

        def compensate(pair: tuple[Node, Node]) -> Term:
            old, new = pair
            error = values_of(old) - values_of(new)
            hessian = moved(hessians.get((old.inputs[0], Hessian())), here())
            term = low_rank_term(format, *whitened_factors(error, format.rank, hessian))
            return moved(term, CPU)

        place = context.data(self).place if self.whiten else CPU
        found = side_by_side(compensate, changed_pairs(graph, stored, linears), place)
        return with_terms(stored, {new: term for (_, new), term in found}, self.name)


def require_none(refused: Sequence[Refusal]) -> None:
    """Raise FormatError for the first refusal."""
    if refused:
        raise FormatError(str(refused[0]))


def of_inputs(linears: Sequence[Node]) -> dict[Node, tuple[Statistic, ...]]:
    """Ask for the Hessians of the values that linears read."""
    return {linear.inputs[0]: (Hessian(),) for linear in linears}


def rank_format(text: str) -> LowRankFormat:
    """Read a format of low rank; FormatError where it is another."""
    found = parse_term(text)
    if not isinstance(found, LowRankFormat):
        raise FormatError(f"{text!r} is no low rank; expected rank16, or rank16·factors(int8·row)")
    return found


def planned_split(linear: Node, format: LowRankFormat) -> Weight:
    """Return the weight of a linear without values, split."""
    weight = weight_of(linear)
    return with_parts(weight, LEFT.planned(weight.shape), (format.planned(weight.shape),))


def refused_ranks(graph: Graph, text: str, targets: Sequence[str]) -> list[Refusal]:
    """List the weights that have not so many directions."""
    format = rank_format(text)
    asked = WeightFormat((format,))
    return [
        Refusal(weight.name, weight.shape, text, reason, str(nearest_accepted(asked, weight.shape)))
        for weight in map(weight_of, chosen_linears(graph, targets))
        if (reason := format.refusal(weight.shape)) is not None
    ]
