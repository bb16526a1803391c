"""How the channels of a value flow: what writes them, what reads them, what leaves them apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.passes.quantize.remainder import is_unrounded


def is_stored(node: Node) -> bool:
    """Say whether a node is a stored tensor of 16 bits or more, which may change."""
    return isinstance(node.op, ops.Parameter) and is_unrounded(node.op.weight)


def is_open_linear(node: Node) -> bool:
    """Say whether a linear's input is in floating point and its weight and bias may change."""
    if not isinstance(node.op, ops.Linear) or node.inputs[0].tensor.format is not None:
        return False
    return all(is_stored(parameter) for parameter in node.inputs[1:])


def stored_values(node: Node) -> Tensor:
    """Return the values of a stored tensor in its logical dtype."""
    assert isinstance(node.op, ops.Parameter)
    return node.op.weight.dense()


def moves_channels_whole(node: Node) -> bool:
    """Say whether channel c of the last axis of a node is channel c of its input, unchanged."""
    if not node.inputs or node.inputs[0].tensor.rank == 0 or node.tensor.rank == 0:
        return False
    last = node.inputs[0].tensor.rank - 1
    match node.op:
        case ops.Slice(axis=axis):
            return axis != last
        case ops.Permute(order=order):
            return order[-1] == last
        case ops.Reshape() | ops.Expand():
            return node.tensor.shape[-1] == node.inputs[0].tensor.shape[-1]
    return False


def linears_reading(graph: Graph, value: Node) -> list[Node] | None:
    """List the linears that read a value, also behind what moves its channels whole; None where
    something else reads it, or a linear whose weight may not change."""
    found: list[Node] = []
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if current in graph.outputs:
            return None
        for user in graph.users[current]:
            if is_open_linear(user) and user.inputs.count(current) == 1:
                found.append(user)
            elif moves_channels_whole(user):
                waiting.append(user)
            else:
                return None
    return found


@dataclass(frozen=True)
class Writer:
    """The node whose stored values can take a factor for each channel of a value: a norm, a
    linear, or a product with a stored vector. Channel c of the value is channel `index[c]` there.
    """

    node: Node
    index: Tensor

    @property
    def channels(self) -> int:
        return int(self.index.max()) + 1

    def shared(self, factors: Tensor) -> Tensor | None:
        """Return one factor a channel of the writer; None where channels of the value that are
        one channel there ask for different ones."""
        own = torch.ones(self.channels, dtype=factors.dtype)
        own[self.index] = factors
        return own if torch.equal(own[self.index], factors) else None


def writer_of(graph: Graph, value: Node, readers: Iterable[Node]) -> Writer | None:
    """Find what writes the channels of a value that nothing but `readers` reads; None where a
    positive factor for each channel cannot be moved there."""
    channels = value.tensor.shape[-1]
    if not isinstance(channels, int):
        return None
    return walk(graph, value, set(readers), torch.arange(channels), 1)


def walk(graph: Graph, node: Node, readers: set[Node], index: Tensor, axes: int) -> Writer | None:
    """Follow a value, whose channels are its last `axes` axes, up to what writes them."""
    if node in graph.outputs or not set(graph.users[node]) <= readers:
        return None
    if writes_channels(node, axes):
        return Writer(node, index)
    for operand in scaled_operands(node, axes):
        found = walk(graph, operand, {node}, index, axes)
        if found is not None:
            return found
    if isinstance(node.op, ops.Reshape):
        around = channel_axes(node, axes)
        return None if around is None else walk(graph, node.inputs[0], {node}, index, around)
    if isinstance(node.op, ops.Attention) and axes == 2:
        return walk(graph, node.inputs[2], {node}, head_channels(node)[index], 2)
    return None


def writes_channels(node: Node, axes: int) -> bool:
    """Say whether a node's stored values can take a factor for each channel."""
    if axes != 1:
        return False
    match node.op:
        case ops.Linear():
            return is_open_linear(node)
        case ops.RMSNorm() | ops.LayerNorm():
            return all(is_stored(vector) for vector in node.inputs[1:])
        case ops.Binary(kind="mul"):
            vector = node.inputs[1]
            return is_stored(vector) and vector.tensor.shape == node.tensor.shape[-1:]
    return False


def scaled_operands(node: Node, axes: int) -> tuple[Node, ...]:
    """List the operands any of which can be multiplied, channel by channel, in place of a node."""
    match node.op:
        case ops.GatedActivation():
            return node.inputs[1:]
        case ops.Unary(kind="relu"):  # for positive factors
            return node.inputs
        case ops.Binary(kind="mul"):
            return tuple(i for i in node.inputs[::-1] if i.tensor.shape == node.tensor.shape)
        case ops.Slice(axis=axis) if axis < node.tensor.rank - axes:
            return node.inputs
        case ops.Permute(order=order):
            kept = node.tensor.rank - axes
            return node.inputs if order[kept:] == tuple(range(kept, len(order))) else ()
    return ()


def channel_axes(reshape: Node, axes: int) -> int | None:
    """Say how many last axes of a reshape's input are the last `axes` of its result: heads are
    split (2 from 1), merged (1 from 2), or stay."""
    before, after = reshape.inputs[0].tensor.shape, reshape.tensor.shape
    wanted = product(after[-axes:])
    fitting = (a for a in (1, 2) if len(before) >= a and product(before[-a:]) == wanted)
    return next(fitting, None)


def product(sizes: Iterable[object]) -> int | None:
    """Multiply sizes known at compile time; None where one is not."""
    total = 1
    for size in sizes:
        if not isinstance(size, int):
            return None
        total *= size
    return total


def head_channels(attention: Node) -> Tensor:
    """Map channels (head, d) of the result of grouped attention to channels (head // repeat, d)
    of its values."""
    heads, groups = attention.inputs[0].tensor.shape[2], attention.inputs[2].tensor.shape[2]
    size = attention.inputs[2].tensor.shape[3]
    assert isinstance(heads, int)
    assert isinstance(groups, int)
    assert isinstance(size, int)
    head = torch.arange(heads) // (heads // groups)
    return (head.unsqueeze(1) * size + torch.arange(size)).flatten()
