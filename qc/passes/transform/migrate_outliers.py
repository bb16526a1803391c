"""SVDQuant's smoothing: ranges move to weights whose large part stays in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qc.ir.device import CPU, here, moved
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.quantized import quantize_activation
from qc.ir.rewrite import substitute
from qc.ir.threads import side_by_side
from qc.ir.types import ActivationFormat
from qc.ir.weights.notation import parse_weights
from qc.passes.calibration.schedule import LinearGroup
from qc.passes.calibration.statistics import AbsMax, Samples
from qc.passes.pipeline import Context
from qc.passes.quantize.round_to_nearest import round_to_nearest
from qc.passes.stage import CANONICAL, Stage
from qc.passes.transform.awq import Round, total
from qc.passes.transform.calibrated import ForFormat, changeable_groups, keep_known, shared_mean
from qc.passes.transform.linears import values_of
from qc.passes.transform.smooth_inputs import smoothed_together

SAMPLES = Samples(per_sequence=8)
"""Tokens on which candidates are compared: as many as one linear has inputs, about."""


def exponents(grid: int) -> Iterator[tuple[float, float]]:
    """Yield (alpha, beta): none, then activations alone and both, alpha = i / grid. The authors'
    search: 2 grid - 1 candidates."""
    yield 0.0, 0.0
    for i in range(1, grid):
        yield i / grid, 0.0
        yield i / grid, 1 - i / grid


def migrated(activations: Tensor, weights: Tensor, alpha: float, beta: float) -> Tensor:
    """s = max|X|^alpha / max|W|^beta, 1 where this is 0 or no number. Float32 [in]."""
    scales = activations.double().pow(alpha) / weights.double().pow(beta)
    usable = torch.isfinite(scales) & (scales > 0)
    return torch.where(usable, scales, 1.0).float()


def leading_part(values: Tensor, rank: int, seed: int = 0) -> Tensor:
    """Return the best approximation of W [out, in] of a rank, nearly: a random range finder with
    two power iterations (Halko, Martinsson and Tropp 2011, algorithm 4.4), for comparing only."""
    if rank == 0:
        return torch.zeros_like(values)
    width = min(rank + 8, *values.shape)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(values.shape[1], width, generator=generator, device=CPU).to(values.device)
    basis = values @ drawn
    for _ in range(2):
        basis = torch.linalg.qr(basis).Q
        basis = values @ torch.linalg.qr(values.T @ basis).Q
    basis = torch.linalg.qr(basis).Q
    inside = basis.T @ values
    vectors = torch.linalg.eigh((inside @ inside.T).double()).eigenvectors[:, -rank:].float()
    found: Tensor = basis @ (vectors @ (vectors.T @ inside))
    return found


def pipeline_error(
    x: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], scales: Tensor, rank: int, store: Round,
    activations: ActivationFormat | None,
) -> float:  # fmt: skip
    """Return sum_W |y - (Q(x/s) R^T + (x/s) L^T)|^2 for pairs of W and y = x W^T, L the leading
    part of W s and R what is stored of the rest. SVDQuant, section 4."""
    narrowed = x / scales
    rounded = narrowed
    if activations is not None:
        rounded = quantize_activation(narrowed, activations).dequantize()
    error = 0.0
    for weight, wanted in pairs:
        grown = weight * scales
        large = leading_part(grown, rank)
        found = rounded @ store(grown - large).T + narrowed @ large.T
        error += float((found - wanted).square().sum(dtype=torch.float64))
    return error


@dataclass(frozen=True)
class MigrateOutliers(ForFormat):
    """Smooth inputs for weights that will be split into a low rank and a rest of few bits.

        linear(%x, %w)  -->  linear(mul(%x, 1/s), %w s)

    s = max|X|^alpha / max|W|^beta, the best of 2 `grid` - 1 pairs for what follows: a part of rank
    `rank` in 16 bits, the rest in `format`, its inputs in `activations` (None: floating point).
    Query heads that share a value head share s. Exact; the choice minimises the squared error of
    the outputs on some tokens. SVDQuant (Li et al. 2024), section 4.1 and the authors' search, with
    a branch for each weight where they join those of one input.
    """

    name: ClassVar[str] = "migrate_outliers"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL
    format: str = "int4·g64"
    rank: int = 32
    activations: ActivationFormat | None = None
    grid: int = 20
    targets: tuple[str, ...] = ("linears",)

    def run(self, graph: Graph, context: Context) -> Graph:
        calibration = context.data(self)
        groups = changeable_groups(graph, self.targets)
        known = calibration.measure(graph, {g.x: (AbsMax(), SAMPLES) for g in groups})

        def search(group: LinearGroup) -> Tensor:
            largest = shared_mean(graph, group, known[group.x, AbsMax()])
            samples = moved(known[group.x, SAMPLES], here())
            return moved(self.best_scales(group, moved(largest, here()), samples, graph), CPU)

        replacements: dict[Node, Node] = {}
        scales: dict[Node, Tensor] = {}
        for number, (group, found) in enumerate(side_by_side(search, groups, calibration.place)):
            scales[group.x] = found
            changed = smoothed_together(group.linears, found)
            replacements |= zip(group.linears, changed, strict=True)
            context.progress(f"migrate {group.x.origin.module}", (number + 1) / len(groups))
        after = substitute(graph, replacements)
        keep_known(calibration, graph, after, scales)
        return after

    def best_scales(self, group: LinearGroup, largest: Tensor, x: Tensor, graph: Graph) -> Tensor:
        """Return the scales with the least error of what follows."""
        format = parse_weights(self.format)
        weights = [values_of(linear) for linear in group.linears]
        spans = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
        pairs = [(w, x @ w.T) for w in weights]

        def store(values: Tensor) -> Tensor:
            return total(round_to_nearest(values, format))

        def scales_for(pair: tuple[float, float]) -> Tensor:
            logs = migrated(largest, spans, *pair).log()
            return shared_mean(graph, group, logs).exp()

        def error(pair: tuple[float, float]) -> float:
            scales = scales_for(pair)
            return pipeline_error(x, pairs, scales, self.rank, store, self.activations)

        return scales_for(min(exponents(self.grid), key=error))
