"""Reordering the channels inside a block, so that groups of weights hold channels of one kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.passes.calibration.schedule import LinearGroup
from qc.passes.calibration.statistics import Hessian
from qc.passes.pipeline import Context, Pass
from qc.passes.stage import CANONICAL, Stage
from qc.passes.transform.calibrated import changeable_groups
from qc.passes.transform.flow import (
    channel_axes,
    head_channels,
    is_open_linear,
    moves_channels_whole,
    stored_values,
)
from qc.passes.transform.linears import storing, values_of

NAME = "permute_channels"


@dataclass(frozen=True)
class Writers:
    """The linears that write the channels of a value, all of which must be reordered together.

    Channel c of the value is channel `index[c]` of each; inside heads of `head` channels alone
    (None: anywhere) the order is free.
    """

    linears: tuple[Node, ...]
    index: Tensor
    head: int | None = None

    def order(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the order of the writers' channels by falling scores (of the value's channels,
        added up where they are one), and that of the value's."""
        size = int(self.index.max()) + 1
        own = scores.new_zeros(size).index_add_(0, self.index, scores)
        width = self.head or size
        within = own.view(-1, width).argsort(dim=1, descending=True, stable=True)
        starts = torch.arange(0, size, width).unsqueeze(1)
        places = (within + starts).flatten()
        channels = torch.arange(len(self.index))
        return places, channels - channels % width + places[self.index] % width


def writers_of(graph: Graph, group: LinearGroup) -> Writers | None:
    """Find the linears whose outputs alone, element by element, make what a group reads; None
    where the order of channels matters to anything between."""
    channels = group.x.tensor.shape[-1]
    if not isinstance(channels, int):
        return None
    found: dict[Node, None] = {}
    crossed = collect(graph, group.x, set(group.linears), 1, found)
    if crossed is None or not found:
        return None
    if not crossed:
        return Writers(tuple(found), torch.arange(channels))
    (attention,) = crossed
    size = attention.tensor.shape[3]
    assert isinstance(size, int)
    return Writers(tuple(found), head_channels(attention), size)


def collect(
    graph: Graph, node: Node, readers: set[Node], axes: int, found: dict[Node, None]
) -> set[Node] | None:
    """Collect the linears behind a value, whose channels are its last `axes` axes; return the
    attentions between, at most one; None where there is something else."""
    if node in graph.outputs or not set(graph.users[node]) <= readers:
        return None
    if axes == 1 and is_open_linear(node):
        found[node] = None
        return set()
    if isinstance(node.op, ops.Reshape):
        around = channel_axes(node, axes)
        return None if around is None else collect(graph, node.inputs[0], {node}, around, found)
    if isinstance(node.op, ops.Attention) and axes == 2:
        behind = collect(graph, node.inputs[2], {node}, 2, found)
        return {node} if behind == set() else None
    operands = mixed_operands(node, axes)
    crossed: set[Node] = set()
    for operand in operands:
        behind = collect(graph, operand, {node}, axes, found)
        if behind is None:
            return None
        crossed |= behind
    is_plain = not crossed or len(operands) == 1  # heads and whole rows do not mix
    return crossed if operands and is_plain else None


def mixed_operands(node: Node, axes: int) -> tuple[Node, ...]:
    """List the operands of which a node is a function element by element, or the one that it
    moves without touching the channels; none for any other node."""
    match node.op:
        case ops.Unary():
            return node.inputs
        case ops.GatedActivation():
            return tuple(dict.fromkeys(node.inputs))
        case ops.Binary(kind="add" | "mul"):
            wide = tuple(i for i in node.inputs if i.tensor.shape == node.tensor.shape)
            rest = [i for i in node.inputs if i not in wide]
            return wide if all(i.tensor.rank == 0 for i in rest) else ()
        case ops.Slice(axis=axis) if axis < node.tensor.rank - axes:
            return node.inputs
    return node.inputs if axes == 1 and moves_channels_whole(node) else ()


@dataclass(frozen=True)
class PermuteChannels(Pass):
    """Sort the channels inside feed-forward blocks and heads, so that those of like weight meet in
    one group of quantization.

        linear(gated(linear(%x, %g), linear(%x, %u)), %d)
            -->  linear(gated(linear(%x, P %g), linear(%x, P %u)), %d P^T)

    By falling score: `by` "magnitude", the largest weight of the channel in the linears that read
    it, or "hessian", H_ii on data (GPTQ's act-order, free at run time). Inside a head of attention
    values are sorted together for all query heads that share it.
    Exact. AutoGPTQ's `desc_act` with the permutation folded away; RPTQ (Yuan et al. 2023) for
    reordering by range.
    """

    name: ClassVar[str] = NAME
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL
    by: Literal["magnitude", "hessian"] = "magnitude"
    targets: tuple[str, ...] = ("linears",)

    def preview(self, graph: Graph) -> Graph:
        """Return the graph itself: formats and shapes of matrices stay."""
        return graph

    def run(self, graph: Graph, context: Context) -> Graph:
        groups = changeable_groups(graph, self.targets)
        free = [(g, found) for g in groups if (found := writers_of(graph, g)) is not None]
        scores = self.scores(graph, [group for group, _ in free], context)
        replacements: dict[Node, Node] = {}
        for (group, writers), score in zip(free, scores, strict=True):
            rows, columns = writers.order(score)
            # a linear may read one value and write another
            for node in writers.linears:
                replacements[node] = with_rows(replacements.get(node, node), rows)
            for node in group.linears:
                replacements[node] = with_columns(replacements.get(node, node), columns)
        return substitute(graph, replacements)

    def scores(self, graph: Graph, groups: Sequence[LinearGroup], context: Context) -> list[Tensor]:
        """Return the score of every channel that each group reads."""
        if self.by == "magnitude":
            return [largest_weights(group) for group in groups]
        known = context.data(self).measure(graph, {group.x: (Hessian(),) for group in groups})
        return [known[group.x, Hessian()].diagonal() for group in groups]


def largest_weights(group: LinearGroup) -> Tensor:
    """Return max |w| of every input channel over the linears that read it."""
    return torch.stack([values_of(linear).abs().amax(0) for linear in group.linears]).amax(0)


def with_rows(linear: Node, order: Tensor) -> Node:
    """Return a linear whose output channel i is channel order[i] of this one's."""
    x, weight, *biases = linear.inputs
    parts = [storing(each, stored_values(each)[order]) for each in (weight, *biases)]
    return make(linear.op, x, *parts, origin=linear.origin.touched_by(NAME))


def with_columns(linear: Node, order: Tensor) -> Node:
    """Return a linear whose input channel i is channel order[i] of this one's."""
    x, weight, *rest = linear.inputs
    turned = storing(weight, stored_values(weight)[:, order])
    return make(linear.op, x, turned, *rest, origin=linear.origin.touched_by(NAME))
