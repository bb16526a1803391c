"""Split linears whose result is only read in parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.types import Dim
from qc.passes.pipeline import Context, Pass


@dataclass(frozen=True)
class Part:
    """A slice of a linear's result: which rows of the weight it needs, and its own shape."""

    node: Node
    linear: Node
    rows: torch.Tensor


@dataclass(frozen=True)
class SplitLinears(Pass):
    """Give each part of a fused projection its own linear, so that each is quantized alone.

        slice(linear(x, w[a + b, in]), 0:a)  -->  linear(x, w[0:a])
        slice(reshape[.., heads, 3 * d](linear(x, w)), axis=3, 0:d)
                                             -->  reshape[.., heads, d](linear(x, rows of w))

    Only where every reader of the linear is such a slice, no row is in two of them, and the
    format of the weight can take rows apart.
    The planner joins linears that read the same value again. Exact: the rows of a matrix product
    are independent (Golub and Van Loan 2013, section 1.1).
    """

    name: ClassVar[str] = "split_linears"

    def run(self, graph: Graph, context: Context) -> Graph:
        replacements: dict[Node, Node] = {}
        for node in graph.nodes:
            if isinstance(node.op, ops.Linear):
                replacements |= replaced_parts(node, graph)
        return substitute(graph, replacements) if replacements else graph


def replaced_parts(linear: Node, graph: Graph) -> dict[Node, Node]:
    """Return a linear of its own for every part of `linear`; nothing where that cannot be."""
    found = list(parts_of(linear, graph))
    parts = [part for part in found if part is not None]
    if len(parts) < len(found) or not is_partition(parts, linear):
        return {}
    replacements = {part.node: split(part) for part in parts}
    known = {node: narrow for node, narrow in replacements.items() if narrow is not None}
    return known if len(known) == len(replacements) else {}


def parts_of(linear: Node, graph: Graph) -> Iterator[Part | None]:
    """List what reads `linear`; None for a reader that is no slice of its channels."""
    if linear in graph.outputs:
        yield None
    out = linear.tensor.shape[-1]
    if not isinstance(out, int):
        return
    rows = torch.arange(out)
    for reader in graph.users[linear]:
        if isinstance(reader.op, ops.Reshape) and splits_last_axis(linear, reader):
            heads = rows.reshape(reader.tensor.shape[-2:])
            yield from (part(r, linear, heads) for r in graph.users[reader])
            if reader in graph.outputs:
                yield None
        else:
            yield part(reader, linear, rows)


def splits_last_axis(x: Node, reshape: Node) -> bool:
    """Say whether a reshape only makes two axes of the last one, of sizes known now."""
    before, after = x.tensor.shape, reshape.tensor.shape
    known = all(isinstance(d, int) for d in after[-2:])
    return known and after[:-2] == before[:-1]


def part(reader: Node, linear: Node, rows: torch.Tensor) -> Part | None:
    """Read a slice of the last axis of rows [channels] or [heads, channels]; None if it is none."""
    op = reader.op
    if not isinstance(op, ops.Slice) or op.axis != reader.tensor.rank - 1:
        return None
    if not isinstance(op.start, int) or not isinstance(op.stop, int):
        return None
    return Part(reader, linear, rows[..., op.start : op.stop : op.step])


def is_partition(parts: list[Part], linear: Node) -> bool:
    """Say whether no row is in two parts."""
    return sum(p.rows.numel() for p in parts) <= linear.inputs[1].tensor.shape[0]


def split(part: Part) -> Node | None:
    """Return the linear of one part in the shape of the slice that it replaces; None where the
    weight cannot be taken apart."""
    x, *stored = part.linear.inputs
    chosen = [with_rows(each, part.rows.flatten()) for each in stored]
    known = [each for each in chosen if each is not None]
    if len(known) < len(chosen):
        return None
    narrow = make(ops.Linear(), x, *known, origin=part.linear.origin)
    shape: tuple[Dim, ...] = part.node.tensor.shape
    return narrow if narrow.tensor.shape == shape else make(ops.Reshape(shape), narrow)


def with_rows(stored: Node, rows: torch.Tensor) -> Node | None:
    """Return a stored tensor with only these rows, named `qkv.weight[0:64]` after the first and
    the last; None where it cannot be taken apart."""
    if not isinstance(stored.op, ops.Parameter):
        return None
    weight = stored.op.weight
    name = f"{weight.name}[{int(rows[0])}:{int(rows[-1]) + 1}]"
    chosen = weight.rows(rows, name)
    return None if chosen is None else make(ops.Parameter(chosen), origin=stored.origin)
