"""SmoothQuant: the range of activations moves into the weights; SmoothQuant+ searches how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.threads import side_by_side
from qc.ir.weights.notation import parse_weights
from qc.passes.calibration import Calibration
from qc.passes.calibration.schedule import LinearGroup
from qc.passes.calibration.statistics import AbsMax, Samples
from qc.passes.pipeline import Context, Pass
from qc.passes.quantize.round_to_nearest import round_to_nearest
from qc.passes.stage import CANONICAL, Stage
from qc.passes.transform.awq import total
from qc.passes.transform.calibrated import (
    ForFormat,
    changeable_groups,
    first_sequences,
    keep_known,
    linears_of,
    shared_mean,
)
from qc.passes.transform.linears import storing, values_of
from qc.passes.transform.smooth_inputs import smoothed_together

LEAST = 1e-5
"""The authors' floor for ranges and scales."""


def migration_scales(activations: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), float32 [in]. SmoothQuant, equation 4.

    A dead channel, of activations or of weights, gets 1: any factor is right there.
    """
    largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    x, w = (values.double().clamp_min(LEAST) for values in (activations, largest))
    scales = (x.pow(alpha) / w.pow(1 - alpha)).clamp_min(LEAST).float()
    return torch.where((activations > 0) & (largest > 0), scales, 1.0)


@dataclass(frozen=True)
class SmoothActivations(Pass):
    """Give activations and weights like ranges, channel by channel.

        linear(%x, %w)  -->  linear(mul(%x, 1/s), %w s)

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) over all weights that read %x. Query heads that
    share a value head share s, so that it can be folded.
    Exact. SmoothQuant (Xiao et al. 2023), equation 4.
    """

    name: ClassVar[str] = "smooth_activations"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL
    alpha: float = 0.5
    targets: tuple[str, ...] = ("linears",)

    def preview(self, graph: Graph) -> Graph:
        """Return the graph itself: products by vectors change neither shapes nor formats."""
        return graph

    def run(self, graph: Graph, context: Context) -> Graph:
        return smoothed_by(graph, context.data(self), self.alpha, self.targets)


def smoothed_by(
    graph: Graph, calibration: Calibration, alpha: float, targets: Sequence[str]
) -> Graph:
    """Return the graph with all inputs of linears smoothed."""
    groups = changeable_groups(graph, targets)
    scales = scales_by(graph, groups, ranges_of(graph, groups, calibration), alpha)
    after = divided_by(graph, groups, scales)
    keep_known(calibration, graph, after, scales)
    return after


def ranges_of(
    graph: Graph, groups: Sequence[LinearGroup], calibration: Calibration
) -> dict[Node, Tensor]:
    """Return max|X| of what every group reads."""
    known = calibration.measure(graph, {group.x: (AbsMax(),) for group in groups})
    return {group.x: known[group.x, AbsMax()] for group in groups}


def scales_by(
    graph: Graph, groups: Sequence[LinearGroup], ranges: Mapping[Node, Tensor], alpha: float
) -> dict[Node, Tensor]:
    """Return the scales of what every group reads."""
    return {group.x: scales_of(graph, group, ranges[group.x], alpha) for group in groups}


def divided_by(graph: Graph, groups: Sequence[LinearGroup], scales: Mapping[Node, Tensor]) -> Graph:
    """Return the graph with inputs divided by scales that the weights take in."""
    replacements: dict[Node, Node] = {}
    for group in groups:
        changed = smoothed_together(group.linears, scales[group.x])
        replacements |= zip(group.linears, changed, strict=True)
    return substitute(graph, replacements)


def scales_of(graph: Graph, group: LinearGroup, largest: Tensor, alpha: float) -> Tensor:
    """Return the scales of the linears that read one value."""
    weights = [values_of(linear) for linear in group.linears]
    scales = migration_scales(largest, weights, alpha)
    return shared_mean(graph, group, scales.log()).exp()


@dataclass(frozen=True)
class SearchSmoothing(ForFormat):
    """Smooth with the one alpha that makes the whole model lose least once it is rounded.

        linear(%x, %w)  -->  linear(mul(%x, 1/s), %w s)        or nothing, where that is best

    For every alpha = i / `steps`, and for no smoothing at all, the model is smoothed, rounded to
    `format` and run on the first `samples` sequences: errors reach the layers behind. Exact; the
    choice minimises the squared error of the outputs of all linears, each relative to its own
    square. SmoothQuant+ (Pan et al. 2023), section 3.
    """

    name: ClassVar[str] = "search_smoothing"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL
    steps: int = 20
    samples: int = 4
    targets: tuple[str, ...] = ("linears",)

    def run(self, graph: Graph, context: Context) -> Graph:
        calibration = context.data(self)
        groups = changeable_groups(graph, self.targets)
        ranges = ranges_of(graph, groups, calibration)  # once: a smoothed graph takes them along
        few = first_sequences(calibration, self.samples)
        reference = outputs_of(graph, few, self.targets)
        losses: dict[float | None, float] = {None: self.loss(graph, few, reference)}
        for i in range(self.steps + 1):
            alpha = i / self.steps
            smooth = divided_by(graph, groups, scales_by(graph, groups, ranges, alpha))
            losses[alpha] = self.loss(smooth, few, reference)
            context.progress(f"alpha {alpha:.2f}: loss {losses[alpha]:.4g}", alpha)
        best = min(losses, key=losses.__getitem__)
        return graph if best is None else smoothed_by(graph, calibration, best, self.targets)

    def loss(self, smooth: Graph, few: Calibration, reference: Sequence[Tensor]) -> float:
        """Return the error of the linears' outputs in a rounded graph, relative to theirs."""
        rounded = self.rounded(smooth)
        found = outputs_of(rounded, few, self.targets)
        return sum(relative_square(a, b) for a, b in zip(reference, found, strict=True))

    def rounded(self, graph: Graph) -> Graph:
        """Return the graph with the values of the linears as they would be stored."""
        format = parse_weights(self.format)

        def store(linear: Node) -> Node:
            x, weight, *rest = linear.inputs
            values = total(round_to_nearest(values_of(linear), format))
            return make(linear.op, x, storing(weight, values), *rest, origin=linear.origin)

        return substitute(graph, dict(side_by_side(store, linears_in(graph, self.targets))))


def relative_square(reference: Tensor, other: Tensor) -> float:
    """Return |other - reference|^2 / |reference|^2."""
    return float((other - reference).square().sum() / reference.square().sum().clamp_min(1e-12))


OUTPUT = Samples(per_sequence=64)
"""Of every linear's output: enough tokens for a sum over all layers, few enough to keep."""


def linears_in(graph: Graph, targets: Sequence[str]) -> list[Node]:
    """List the linears that are smoothed, in the order of the graph."""
    chosen = {linear for group in changeable_groups(graph, targets) for linear in group.linears}
    return [linear for linear in linears_of(graph) if linear in chosen]


def outputs_of(graph: Graph, few: Calibration, targets: Sequence[str]) -> list[Tensor]:
    """Return samples of the outputs of all linears that are smoothed."""
    linears = linears_in(graph, targets)
    measured = few.measure(graph, dict.fromkeys(linears, (OUTPUT,)))
    return [measured[node, OUTPUT] for node in linears]
