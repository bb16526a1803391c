"""Move changes of layout towards the outputs until they meet their inverse and vanish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import rewrite
from qc.ir.types import Dim, element_count
from qc.passes.lift.algebra import reshaped
from qc.passes.pipeline import Context, Pass

ELEMENTWISE = (ops.Unary, ops.Binary, ops.Where, ops.Cast, ops.GatedActivation)
ALONG_LAST_AXIS = (ops.RMSNorm, ops.LayerNorm, ops.Linear)
"""Ops that treat every vector of the last axis of their first operand alone."""


@dataclass(frozen=True)
class SinkLayout(Pass):
    """Move Permute, flattening Reshape and Expand behind the ops that do not care.

        f(permute(x), y)                       -->  permute(f(x, y))
        linear(reshape[batch * seq, c](x), w)  -->  reshape(linear(x, w))
        embedding(expand(ids), table)          -->  expand(embedding(ids, table))
        permute(permute(x))                    -->  x, where they are inverse to each other

    Exact. The algebra of layout changes: Chen et al. 2018 (TVM), section 3.
    """

    name: ClassVar[str] = "sink_layout"

    def run(self, graph: Graph, context: Context) -> Graph:
        return rewrite(graph, RULES, self.name)


# ---------------------------------------------------------------- permutations


def sink_below_elementwise(node: Node) -> Node | None:
    """f(permute(x), y) --> permute(f(x, y))"""
    order = order_of_inputs(node)
    if order is None or not isinstance(node.op, ELEMENTWISE) or node.tensor.rank != len(order):
        return None
    operands = [unpermuted(i, order) for i in node.inputs]
    plain = [operand for operand in operands if operand is not None]
    if len(plain) < len(operands):
        return None
    return make(ops.Permute(order), make(node.op, *plain, origin=node.origin))


def sink_below_last_axis(node: Node) -> Node | None:
    """rms_norm(permute(x), gain) --> permute(rms_norm(x, gain))"""
    if not isinstance(node.op, ALONG_LAST_AXIS) or not isinstance(node.inputs[0].op, ops.Permute):
        return None
    order = node.inputs[0].op.order
    if order[-1] != len(order) - 1:
        return None
    inner = make(node.op, node.inputs[0].inputs[0], *node.inputs[1:], origin=node.origin)
    return make(ops.Permute(order), inner)


def sink_below_slice(node: Node) -> Node | None:
    """slice(permute(x)) --> permute(slice(x))"""
    if not isinstance(node.op, ops.Slice) or not isinstance(node.inputs[0].op, ops.Permute):
        return None
    order, op = node.inputs[0].op.order, node.op
    moved = ops.Slice(order[op.axis], op.start, op.stop, op.step)
    return make(ops.Permute(order), make(moved, node.inputs[0].inputs[0], origin=node.origin))


def sink_below_concat(node: Node) -> Node | None:
    """concat(permute(x), permute(y)) --> permute(concat(x, y))"""
    order = order_of_inputs(node)
    if order is None or not isinstance(node.op, ops.Concat):
        return None
    if any(not isinstance(i.op, ops.Permute) or i.op.order != order for i in node.inputs):
        return None
    inner = make(ops.Concat(order[node.op.axis]), *(i.inputs[0] for i in node.inputs))
    return make(ops.Permute(order), inner)


def join_permutes(node: Node) -> Node | None:
    """permute(permute(x)) --> permute(x), or x where nothing moves"""
    if not isinstance(node.op, ops.Permute):
        return None
    x, order = node.inputs[0], node.op.order
    if isinstance(x.op, ops.Permute):
        inner = x.op.order
        x, order = x.inputs[0], tuple(inner[i] for i in order)
    if order == tuple(range(len(order))):
        return x
    if keeps_order(x.tensor.shape, order):
        return reshaped(x, node.tensor.shape)
    return None if x is node.inputs[0] else make(ops.Permute(order), x)


def order_of_inputs(node: Node) -> tuple[int, ...] | None:
    """Return the order of the first operand that is a Permute."""
    return next((i.op.order for i in node.inputs if isinstance(i.op, ops.Permute)), None)


def unpermuted(operand: Node, order: tuple[int, ...]) -> Node | None:
    """Return y with permute(y, order) = operand up to broadcasting; None if that takes a copy."""
    if isinstance(operand.op, ops.Permute) and operand.op.order == order:
        return operand.inputs[0]
    shape = operand.tensor.shape
    if len(shape) == 0 or (len(shape) == 1 and order[-1] == len(order) - 1):
        return operand
    padded = (1,) * (len(order) - len(shape)) + shape
    inverse = tuple(order.index(axis) for axis in range(len(order)))
    if not keeps_order(padded, inverse):
        return None
    return reshaped(operand, tuple(padded[i] for i in inverse))


def keeps_order(shape: tuple[Dim, ...], order: tuple[int, ...]) -> bool:
    """Say whether `order` moves only axes of size 1, so that a Reshape does the same."""
    moved = [axis for axis in order if shape[axis] != 1]
    return moved == sorted(moved)


# ---------------------------------------------------------------- reshapes


def sink_flattening(node: Node) -> Node | None:
    """f(reshape[rows, c](x), y) --> reshape(f(x, y)), where x is [..., c] or reshaped to it"""
    elementwise = isinstance(node.op, ELEMENTWISE)
    if not elementwise and not isinstance(node.op, ALONG_LAST_AXIS):
        return None
    carried = node.inputs if elementwise else node.inputs[:1]
    leading = next((flattened_from(i) for i in carried if flattened_from(i) is not None), None)
    if leading is None:
        return None
    operands = [unflattened(i, leading) for i in carried]
    plain = [operand for operand in operands if operand is not None]
    if len(plain) < len(operands):
        return None
    inner = make(node.op, *plain, *node.inputs[len(carried) :], origin=node.origin)
    result = make(ops.Reshape(node.tensor.shape), inner)
    return result if result.type == node.type else None


def flattened_from(node: Node) -> tuple[Dim, ...] | None:
    """Return the leading axes of its operand that a Reshape to [rows, c] merges into the rows."""
    if not isinstance(node.op, ops.Reshape) or node.tensor.rank != 2:
        return None
    before = node.inputs[0].tensor.shape
    leading = [before[:end] for end in range(2, len(before)) if element_count(before[:end])
               == node.tensor.shape[0]]  # fmt: skip
    return leading[0] if leading else None


def unflattened(operand: Node, leading: tuple[Dim, ...]) -> Node | None:
    """Return an operand as it was before its rows were merged; vectors broadcast as they are."""
    if flattened_from(operand) == leading:
        return reshaped(operand.inputs[0], (*leading, operand.tensor.shape[1]))
    return operand if operand.tensor.rank <= 1 else None


def join_reshapes(node: Node) -> Node | None:
    """reshape(reshape(x)) --> reshape(x), or x where the shape is its own"""
    if not isinstance(node.op, ops.Reshape):
        return None
    x = node.inputs[0]
    if isinstance(x.op, ops.Reshape) or x.tensor.shape == node.tensor.shape:
        return reshaped(x, node.tensor.shape)
    return None


# ---------------------------------------------------------------- repetition


def sink_expand_below_embedding(node: Node) -> Node | None:
    """embedding(expand(ids), table) --> expand(embedding(ids, table))"""
    if not isinstance(node.op, ops.Embedding) or not isinstance(node.inputs[0].op, ops.Expand):
        return None
    inner = make(node.op, node.inputs[0].inputs[0], node.inputs[1], origin=node.origin)
    return make(ops.Expand(node.tensor.shape), inner)


def drop_expand(node: Node) -> Node | None:
    """f(x, expand(y)) --> f(x, y), where x has the whole shape already"""
    if not isinstance(node.op, ops.Binary | ops.Where):
        return None
    for index, operand in enumerate(node.inputs):
        if not isinstance(operand.op, ops.Expand):
            continue
        inputs = (*node.inputs[:index], operand.inputs[0], *node.inputs[index + 1 :])
        plain = make(node.op, *inputs, origin=node.origin)
        if plain.type == node.type:
            return plain
    return None


def drop_empty_parts(node: Node) -> Node | None:
    """concat(x, empty) --> x"""
    if not isinstance(node.op, ops.Concat):
        return None
    axis = node.op.axis
    kept = [i for i in node.inputs if i.tensor.shape[axis] != 0]
    if len(kept) == len(node.inputs) or not kept:
        return None
    return kept[0] if len(kept) == 1 else make(node.op, *kept)


RULES = (
    join_permutes,
    join_reshapes,
    sink_below_elementwise,
    sink_below_last_axis,
    sink_below_slice,
    sink_below_concat,
    sink_flattening,
    sink_expand_below_embedding,
    drop_expand,
    drop_empty_parts,
)
