"""AWQ: scale input channels by a power of their magnitude, searched for each group of linears."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from qc.ir.device import CPU, here, moved
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.rewrite import substitute
from qc.ir.threads import side_by_side
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import Term
from qc.passes.calibration.schedule import LinearGroup
from qc.passes.calibration.statistics import Hessian, Moments
from qc.passes.pipeline import Context
from qc.passes.quantize.round_to_nearest import round_to_nearest
from qc.passes.stage import CANONICAL, Stage
from qc.passes.transform.calibrated import ForFormat, changeable_groups, keep_known, shared_mean
from qc.passes.transform.linears import values_of
from qc.passes.transform.smooth_inputs import smoothed_together

Round = Callable[[Tensor], Tensor]
"""A matrix -> the matrix as it would be stored."""

LEAST_SCALE = 1e-4
"""The authors' floor for a^r, in front of the normalization: dead channels have a = 0."""


def power_scales(magnitudes: Tensor, ratio: float) -> Tensor:
    """s = max(a^r, 1e-4) / sqrt(max s min s), in float64 [channels]. AWQ, section 3.2."""
    powers = magnitudes.double().pow(ratio).clamp_min(LEAST_SCALE)
    return powers / (powers.max() * powers.min()).sqrt()


def output_error(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T): the squared error of the outputs, summed over rows, for an error E of a weight
    and H = 2/n sum x x^T (times n / 2)."""
    return float((error @ hessian * error).sum(dtype=torch.float64))


def search_scales(
    weights: Sequence[Tensor], hessian: Tensor, candidates: Sequence[Tensor], store: Round
) -> tuple[int, list[float]]:
    """Return which candidate s minimises sum_W tr(E H E^T), E = Q(W diag(s)) diag(1/s) - W, and
    the error of every one."""
    second = hessian.float()
    errors = []
    for candidate in candidates:
        s = candidate.float()
        errors.append(sum(output_error(store(w * s) / s - w, second) for w in weights))
    return min(range(len(errors)), key=errors.__getitem__), errors


@dataclass(frozen=True)
class AwqScales(ForFormat):
    """Enlarge the input channels of weights whose activations are large, so that they round finer.

        linear(%x, %w)  -->  linear(mul(%x, 1/s), %w s)

    s = a^r, a the mean magnitude of the channel; of `grid` values of r in [0, 1) that with the
    least error of the outputs of the linears that read %x once they are rounded to `format`. r = 0
    leaves them as they are. Query heads that share a value head share s, so that it can be folded.
    Exact; what follows is less lossy: minimises sum_W tr(E H E^T). AWQ (Lin et al. 2023), section
    3.2, with the error of each group of linears in place of that of a module.
    """

    name: ClassVar[str] = "awq_scales"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL
    grid: int = 20
    targets: tuple[str, ...] = ("linears",)

    def run(self, graph: Graph, context: Context) -> Graph:
        calibration = context.data(self)
        groups = changeable_groups(graph, self.targets)
        known = calibration.measure(graph, {g.x: (Hessian(), Moments()) for g in groups})

        def search(group: LinearGroup) -> Tensor:
            magnitudes = shared_mean(graph, group, known[group.x, Moments()].absolute)
            hessian = moved(known[group.x, Hessian()], here())
            return moved(self.best_scales(group, moved(magnitudes, here()), hessian), CPU)

        replacements: dict[Node, Node] = {}
        scales: dict[Node, Tensor] = {}
        for number, (group, found) in enumerate(side_by_side(search, groups, calibration.place)):
            if not bool((found == 1).all()):
                changed = smoothed_together(group.linears, found)
                replacements |= zip(group.linears, changed, strict=True)
                scales[group.x] = found
            context.progress(f"search scales {group.x.origin.module}", (number + 1) / len(groups))
        after = substitute(graph, replacements)
        keep_known(calibration, graph, after, scales)
        return after

    def best_scales(self, group: LinearGroup, magnitudes: Tensor, hessian: Tensor) -> Tensor:
        """Return the best of the candidates, float32 [channels]."""
        format = parse_weights(self.format)

        def store(values: Tensor) -> Tensor:
            return total(round_to_nearest(values, format))

        candidates = [power_scales(magnitudes, i / self.grid) for i in range(self.grid)]
        weights = [values_of(linear) for linear in group.linears]
        best, _ = search_scales(weights, hessian, candidates, store)
        return candidates[best].float()


def total(terms: Sequence[Term]) -> Tensor:
    """Decode a sum of terms, in float32."""
    first, *rest = (term.dense().float() for term in terms)
    return reduce(torch.add, rest, first)
