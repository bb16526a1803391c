"""Residual streams: the values that are added up along a network, found by what touches them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.passes.transform.flow import is_open_linear, is_stored, moves_channels_whole
from qc.passes.transform.fold_gains import is_norm, is_plain


@dataclass
class Stream:
    """All values in one basis of `channels` dimensions, and what takes part in it.

    `writers` are linears, embeddings and stored vectors whose results are in the stream, `readers`
    linears that read it, `norms` plain norms inside it.
    """

    channels: int
    values: set[Node] = field(default_factory=set)
    writers: set[Node] = field(default_factory=set)
    readers: set[Node] = field(default_factory=set)
    norms: set[Node] = field(default_factory=set)


def streams(graph: Graph) -> Iterator[Stream]:
    """Yield every residual stream whose basis can be changed: all that touches it are linears,
    embeddings, sums, plain norms and moves of whole channels."""
    seen: set[Node] = set()
    for node in graph.nodes:
        if not is_norm(node) or node.inputs[0] in seen:
            continue
        channels = node.tensor.shape[-1]
        assert isinstance(channels, int)
        stream = Stream(channels)
        is_closed = explore(graph, node.inputs[0], stream)
        seen |= stream.values
        if is_closed and stream.writers and stream.readers:
            yield stream


def explore(graph: Graph, start: Node, stream: Stream) -> bool:
    """Collect everything in the basis of `start`; False where something needs it as it is."""
    waiting = [start]
    while waiting:
        value = waiting.pop()
        if value in stream.values:
            continue
        stream.values.add(value)
        before, after = sources(value, stream), uses(graph, value, stream)
        if value in graph.outputs or before is None or after is None:
            return False
        waiting += (*before, *after)
    return True


def sources(value: Node, stream: Stream) -> list[Node] | None:
    """List the operands in the same basis as a value, and note writers; None where the value is
    computed in a way that depends on the basis."""
    if is_open_linear(value) or is_table_row(value) or is_stored(value):
        stream.writers.add(value)
        return []
    if isinstance(value.op, ops.RMSNorm | ops.LayerNorm):
        if not is_norm(value) or not is_plain(value):
            return None
        stream.norms.add(value)
        return [value.inputs[0]]
    if isinstance(value.op, ops.Binary):
        return terms(value)
    if isinstance(value.op, ops.Concat) and value.op.axis != value.tensor.rank - 1:
        return list(value.inputs)
    return [value.inputs[0]] if moves_channels_whole(value) else None


def is_table_row(value: Node) -> bool:
    """Say whether a value is looked up in a stored table."""
    return isinstance(value.op, ops.Embedding) and is_stored(value.inputs[1])


def terms(value: Node) -> list[Node] | None:
    """List the vectors of which a sum, or a product with one number a vector, is made."""
    assert isinstance(value.op, ops.Binary)
    width = value.tensor.shape[-1]
    wide = [i for i in value.inputs if i.tensor.rank and i.tensor.shape[-1] == width]
    if value.op.kind in ("add", "sub"):
        return wide if len(wide) == 2 else None
    if value.op.kind == "mul":
        return wide if len(wide) == 1 else None
    if value.op.kind == "div":
        return wide if wide == [value.inputs[0]] else None
    return None


def uses(graph: Graph, value: Node, stream: Stream) -> list[Node] | None:
    """List the results in the same basis as a value, and note readers; None where a linear may
    not change, or multiplies by the value."""
    results: list[Node] = []
    for user in graph.users[value]:
        if not isinstance(user.op, ops.Linear):
            results.append(user)
        elif is_open_linear(user) and user.inputs.count(value) == 1 and user.inputs[0] is value:
            stream.readers.add(user)
        else:
            return None
    return results
