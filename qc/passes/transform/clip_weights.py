"""Clipping: a smaller range for each group of weights, searched on data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.device import CPU, here, moved
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.threads import side_by_side
from qc.ir.weights.grouped import GroupedFormat
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import WeightFormat
from qc.passes.calibration.statistics import Hessian
from qc.passes.pipeline import Context
from qc.passes.quantize.round_to_nearest import round_to_nearest
from qc.passes.stage import CANONICAL, Stage
from qc.passes.transform.awq import Round, total
from qc.passes.transform.calibrated import ForFormat, changeable_groups, keep_known
from qc.passes.transform.linears import storing, values_of


def group_errors(error: Tensor, hessian: Tensor, group: int) -> Tensor:
    """e_g = E_g H_gg E_g^T of every row and group of `group` inputs: [out, groups]. The outputs'
    squared error where groups are taken by themselves."""
    parts = []
    for start in range(0, error.shape[1], group):
        part = error[:, start : start + group]
        block = hessian[start : start + group, start : start + group]
        parts.append((part @ block * part).sum(1))
    return torch.stack(parts, 1)


def search_clipping(
    values: Tensor, hessian: Tensor, group: int, store: Round, grid: int = 20, tried: int = 10
) -> Tensor:
    """Return values clamped to +-p max|w| of their group, p = 1 - i / grid for i < tried, the one
    with the least error of the outputs once they are stored. AWQ's code, auto_clip."""
    second = hessian.float()
    largest = group_maxima(values, group)
    best = torch.full_like(largest, torch.inf)
    kept = torch.ones_like(largest)
    for i in range(tried):
        share = 1 - i / grid
        error = store(clamped(values, largest * share, group)) - values
        found = group_errors(error, second, group)
        kept = torch.where(found < best, share, kept)
        best = torch.minimum(found, best)
    return clamped(values, largest * kept, group)


def group_maxima(values: Tensor, group: int) -> Tensor:
    """Return max|w| of every row and group of inputs: [out, groups]."""
    return torch.stack([part.abs().amax(1) for part in values.split(group, 1)], 1)


def clamped(values: Tensor, limits: Tensor, group: int) -> Tensor:
    """Clamp every group of a row to its limit [out, groups]."""
    wide = limits.repeat_interleave(group, 1)[:, : values.shape[1]]
    return torch.minimum(torch.maximum(values, -wide), wide)


@dataclass(frozen=True)
class ClipWeights(ForFormat):
    """Clamp weights where a smaller range rounds the rest of the group so much finer that the
    outputs gain by it.

        linear(%x, %w)  -->  linear(%x, clamp %w)

    Of every row and `group` inputs (those of `format` by default), for rounding to `format`;
    queries and keys stay, as clipping them moves attention. Lossy: minimises the error of a
    linear's outputs, each group of inputs by itself. AWQ (Lin et al. 2023), section 3.2.
    """

    name: ClassVar[str] = "clip_weights"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL
    exact: ClassVar[bool] = False
    group: int | None = None
    targets: tuple[str, ...] = ("linears",)

    def run(self, graph: Graph, context: Context) -> Graph:
        calibration = context.data(self)
        groups = changeable_groups(graph, self.targets)
        known = calibration.measure(graph, {group.x: (Hessian(),) for group in groups})
        kept = matched_by_attention(graph)
        linears = [linear for g in groups for linear in g.linears if linear not in kept]
        format = parse_weights(self.format)

        def clip(linear: Node) -> Node:
            hessian = moved(known[linear.inputs[0], Hessian()], here())
            weight = values_of(linear)
            values = search_clipping(
                weight, hessian, self.group or group_of(format, weight.shape[1]),
                lambda matrix: total(round_to_nearest(matrix, format)),
            )  # fmt: skip
            x, parameter, *rest = linear.inputs
            origin = linear.origin.touched_by(self.name)
            return make(linear.op, x, storing(parameter, moved(values, CPU)), *rest, origin=origin)

        replacements: dict[Node, Node] = {}
        for number, (linear, clipped) in enumerate(side_by_side(clip, linears, calibration.place)):
            replacements[linear] = clipped
            context.progress(f"clip {linear.origin.module}", (number + 1) / len(linears))
        after = substitute(graph, replacements)
        keep_known(calibration, graph, after, {})  # as the linears' inputs before any clipping
        return after


def group_of(format: WeightFormat, cols: int) -> int:
    """Return how many inputs share a scale: the whole row where a format says nothing of groups."""
    for term in format.terms:
        if isinstance(term, GroupedFormat):
            return term.group_size(cols)
    return cols


def matched_by_attention(graph: Graph) -> set[Node]:
    """Return the linears whose results become queries or keys, behind moves and rotations."""
    found: set[Node] = set()
    for node in graph.nodes:
        if not isinstance(node.op, ops.Attention):
            continue
        for operand in node.inputs[:2]:
            value = operand
            while value.inputs and not isinstance(value.op, ops.Linear):
                at = 1 if isinstance(value.op, ops.Append) else 0
                value = value.inputs[at]
            found.add(value)
    return found
