"""Rotations of the values inside attention heads, folded into the linears around."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.threads import side_by_side
from qc.passes.pipeline import Context, Pass
from qc.passes.stage import CANONICAL, Stage
from qc.passes.transform.flow import is_open_linear, stored_values
from qc.passes.transform.linears import storing
from qc.passes.transform.rotate_stream import Map, random_hadamard

NAME = "rotate_heads"


@dataclass(frozen=True)
class RotateHeads(Pass):
    """Rotate the values of every attention head by a random Hadamard matrix R of the head's size.

        attention(%q, %k, linear(%x, %v, %b)) -->  attention(%q, %k, linear(%x, R^T %v, %b R))
        linear(%heads, %o)                         linear(%heads, %o R)

    per head; costs nothing at run time. Heads whose values anything else reads stay.
    Exact: attention mixes values of different tokens, never channels. QuaRot (Ashkboos et al.
    2024), section 4, stage 1b.
    """

    name: ClassVar[str] = NAME
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = CANONICAL
    seed: int = 0

    def preview(self, graph: Graph) -> Graph:
        """Return the graph itself: formats and shapes of matrices stay."""
        return graph

    def run(self, graph: Graph, context: Context) -> Graph:
        ((_, turned),) = side_by_side(self.turned, [graph])  # one thread: the same bits everywhere
        return turned

    def turned(self, graph: Graph) -> Graph:
        """Return the graph with the values of all heads in another basis."""
        replacements: dict[Node, Node] = {}
        for node in graph.nodes:
            if not isinstance(node.op, ops.Attention):
                continue
            writer, readers = value_linear(graph, node), output_linears(graph, node)
            if writer is None or not readers:
                continue
            size = node.tensor.shape[-1]
            assert isinstance(size, int)
            turn = random_hadamard(size, self.seed)
            # a linear may read one attention's heads and write the values of the next
            replacements[writer] = rows_turned(replacements.get(writer, writer), turn, size)
            for reader in readers:
                replacements[reader] = columns_turned(replacements.get(reader, reader), turn, size)
        return substitute(graph, replacements)


def value_linear(graph: Graph, attention: Node) -> Node | None:
    """Return the linear whose result, split into heads, are the values of one attention alone."""
    heads = attention.inputs[2]
    if graph.users[heads] != (attention,) or attention.inputs.count(heads) != 1:
        return None
    split = heads.inputs[0] if isinstance(heads.op, ops.Reshape) else heads
    is_split = heads is not split and splits_heads(heads, split)
    is_alone = graph.users[split] == (heads,) and not {heads, split} & set(graph.outputs)
    return split if is_split and is_alone and is_open_linear(split) else None


def splits_heads(heads: Node, whole: Node) -> bool:
    """Say whether [..., heads * size] becomes [..., heads, size]."""
    count, size = heads.tensor.shape[-2:]
    return whole.tensor.shape[-1] == count * size and whole.tensor.rank == heads.tensor.rank - 1


def output_linears(graph: Graph, attention: Node) -> list[Node] | None:
    """List the linears that alone read the merged heads of an attention; None where there is
    something else."""
    found: list[Node] = []
    waiting = [attention]
    while waiting:
        value = waiting.pop()
        if value in graph.outputs:
            return None
        for user in graph.users[value]:
            if isinstance(user.op, ops.Slice) and user.op.axis < user.tensor.rank - 2:
                waiting.append(user)
            elif not isinstance(user.op, ops.Reshape) or not splits_heads(value, user):
                return None
            else:
                linears = graph.users[user]
                if user in graph.outputs or not all(map(is_open_linear, linears)):
                    return None
                found += linears
    return found


def rows_turned(linear: Node, turn: Map, size: int) -> Node:
    """Return a linear that writes turned heads of `size` channels."""
    x, weight, *biases = linear.inputs
    rows = per_head(stored_values(weight).double().T, turn, size).T
    rest = [storing(bias, per_head(stored_values(bias), turn, size)) for bias in biases]
    return make(linear.op, x, storing(weight, rows), *rest, origin=linear.origin.touched_by(NAME))


def columns_turned(linear: Node, turn: Map, size: int) -> Node:
    """Return a linear that reads turned heads of `size` channels."""
    x, weight, *rest = linear.inputs
    columns = per_head(stored_values(weight), turn, size)
    origin = linear.origin.touched_by(NAME)
    return make(linear.op, x, storing(weight, columns), *rest, origin=origin)


def per_head(vectors: Tensor, turn: Map, size: int) -> Tensor:
    """Turn every `size` channels of the last axis."""
    return turn(vectors.reshape(*vectors.shape[:-1], -1, size)).reshape(vectors.shape)
