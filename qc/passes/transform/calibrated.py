"""What transforms that look at data share: which linears they change, and what stays known of the
inputs that they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import WeightFormat
from qc.passes.calibration import Calibration
from qc.passes.calibration.schedule import LinearGroup, linear_groups
from qc.passes.calibration.selection import is_head, select_linears
from qc.passes.calibration.statistics import (
    AbsMax,
    Hessian,
    Moments,
    MomentValues,
    Samples,
    Statistic,
)
from qc.passes.pipeline import Pass
from qc.passes.quantize.round_to_nearest import resized
from qc.passes.transform.flow import is_open_linear, writer_of


@dataclass(frozen=True)
class ForFormat(Pass):
    """A pass that prepares weights for the format in which a later one stores them, as printed."""

    looks_ahead: ClassVar[bool] = True
    format: str = "int4·g64·zero"

    def storing(self, format: WeightFormat) -> Self:
        return replace(self, format=str(format))

    def resized(self, bits: int | None, group: int | None) -> Self:
        return replace(self, format=str(resized(parse_weights(self.format), bits, group)))

    def preview(self, graph: Graph) -> Graph:
        """Return the graph itself: shapes and formats stay."""
        return graph


def changeable_groups(graph: Graph, targets: Sequence[str]) -> tuple[LinearGroup, ...]:
    """Return the linears whose weights may change, but heads, by the value that they read."""
    open_linears = [n for n in graph.nodes if is_open_linear(n) and not is_head(graph, n)]
    return linear_groups(graph, select_linears(graph, targets, (), open_linears))


def shared_mean(graph: Graph, group: LinearGroup, magnitudes: Tensor) -> Tensor:
    """Return magnitudes [channels], averaged where channels must get one factor so that it can be
    folded: query heads that share a value head."""
    writer = writer_of(graph, group.x, group.linears)
    if writer is None:
        return magnitudes
    size, index = writer.channels, writer.index.to(magnitudes.device)
    total = magnitudes.new_zeros(size).index_add_(0, index, magnitudes)
    count = torch.bincount(index, minlength=size)
    return (total / count)[index]


def first_sequences(calibration: Calibration, count: int) -> Calibration:
    """Return a calibration on the first `count` sequences, or records of inputs, alone, that knows
    nothing yet."""
    return replace(
        calibration, drawn=calibration.samples()[:count], checkpoint=None, coverage={},
        memory=WeakKeyDictionary(), felt={},
    )  # fmt: skip


def keep_known(
    calibration: Calibration, before: Graph, after: Graph, scales: Mapping[Node, Tensor]
) -> None:
    """Let an exact change keep what is known of the linears' inputs: the value behind x is now
    x / scales[x], or x where it is not named. It is forgotten at the old nodes, for it is large."""
    moved: dict[Node, Node] = {}
    for old, new in zip(linears_of(before), linears_of(after), strict=True):
        moved.setdefault(old.inputs[0], new.inputs[0])
    for x, successor in moved.items():
        if successor is x:
            continue
        known = calibration.remembered(x)
        scale = scales.get(x)
        found = dict(known) if scale is None else divided(known, scale)
        known.clear()
        calibration.remembered(successor).update(found)


def linears_of(graph: Graph) -> list[Node]:
    """List the linears in order; exact changes of inputs keep it."""
    return [node for node in graph.nodes if isinstance(node.op, ops.Linear)]


def divided(known: Mapping[Statistic, Any], scale: Tensor) -> dict[Statistic, Any]:
    """Return the statistics of x / scale [channels] from those of x, whose memory is reused."""
    wide = scale.double()
    changed: dict[Statistic, Any] = {}
    for statistic, result in known.items():
        match statistic, result:
            case Hessian(), Tensor():
                changed[statistic] = result.div_(wide.outer(wide))
            case AbsMax() | Samples(), Tensor():
                changed[statistic] = result / scale
            case Moments(), MomentValues(tokens, mean, absolute, square):
                changed[statistic] = MomentValues(
                    tokens, mean / wide, absolute / wide, square / wide.square()
                )
    return changed
