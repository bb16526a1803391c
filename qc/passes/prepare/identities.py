"""Rules that drop ops without effect and merge neighbours that are one op."""

from __future__ import annotations

import sympy
import torch

from qc.ir import ops
from qc.ir.node import Node, make
from qc.ir.rewrite import Rule
from qc.ir.types import Dim, as_dim

NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1, "pow": 1}
COMMUTATIVE = ("add", "mul", "and", "or")


def drop_without_effect(node: Node) -> Node | None:
    """`reshape[batch, seq](%x : [batch, seq]) --> %x`, and so for casts, slices, ..."""
    if len(node.inputs) != 1 or node.type != node.inputs[0].type:
        return None
    match node.op:
        case ops.Reshape() | ops.Expand() | ops.Cast() | ops.Concat():
            return node.inputs[0]
        case ops.Slice(axis, 0, stop, 1) if stop == node.inputs[0].tensor.shape[axis]:
            return node.inputs[0]
        case ops.Permute(order) if order == tuple(range(len(order))):
            return node.inputs[0]
    return None


def drop_neutral_operand(node: Node) -> Node | None:
    """`add(%x, 0) --> %x`, `mul(1, %x) --> %x`, `and(True, %x) --> %x`"""
    if not isinstance(node.op, ops.Binary):
        return None
    kind = node.op.kind
    x, other = node.inputs
    if is_neutral(other, kind) and x.type == node.type:
        return x
    if kind in COMMUTATIVE and is_neutral(x, kind) and other.type == node.type:
        return other
    return x if kind in ("and", "or") and x is other and x.tensor.dtype == torch.bool else None


def is_neutral(node: Node, kind: str) -> bool:
    """Say whether a constant changes nothing as an operand of `kind`."""
    if not isinstance(node.op, ops.Scalar | ops.Full):
        return False
    if kind in ("and", "or"):
        return node.op.value is (kind == "and")
    return kind in NEUTRAL and node.op.value == NEUTRAL[kind]


def choose_known_branch(node: Node) -> Node | None:
    """`where(True, %a, %b) --> %a`"""
    if not isinstance(node.op, ops.Where) or not isinstance(
        node.inputs[0].op, ops.Scalar | ops.Full
    ):
        return None
    chosen = node.inputs[1 if node.inputs[0].op.value else 2]
    return chosen if chosen.type == node.type else None


def merge_reshapes(node: Node) -> Node | None:
    """`reshape(reshape(%x)) --> reshape(%x)`"""
    if not isinstance(node.op, ops.Reshape) or not isinstance(node.inputs[0].op, ops.Reshape):
        return None
    return make(node.op, node.inputs[0].inputs[0], origin=node.origin)


def merge_permutes(node: Node) -> Node | None:
    """`permute(permute(%x)) --> permute(%x)`"""
    inner = node.inputs[0] if node.inputs else None
    if not isinstance(node.op, ops.Permute) or not (inner and isinstance(inner.op, ops.Permute)):
        return None
    first = inner.op.order
    order = tuple(first[axis] for axis in node.op.order)
    return make(ops.Permute(order), inner.inputs[0], origin=node.origin)


def merge_expands(node: Node) -> Node | None:
    """`expand(expand(%x)) --> expand(%x)`"""
    if not isinstance(node.op, ops.Expand) or not isinstance(node.inputs[0].op, ops.Expand):
        return None
    return make(node.op, node.inputs[0].inputs[0], origin=node.origin)


def merge_slices(node: Node) -> Node | None:
    """`slice(slice(%x, 2:8), 1:3) --> slice(%x, 3:5)`"""
    inner = node.inputs[0] if node.inputs else None
    if not isinstance(node.op, ops.Slice) or not (inner and isinstance(inner.op, ops.Slice)):
        return None
    outer, first = node.op, inner.op
    if outer.axis != first.axis or outer.step != 1 or first.step != 1:
        return None
    start, stop = as_dim(first.start + outer.start), as_dim(first.start + outer.stop)
    return make(ops.Slice(outer.axis, start, stop), inner.inputs[0], origin=node.origin)


def slice_one_part(node: Node) -> Node | None:
    """`slice(concat(%a, %b), 0:3) --> slice(%a, 0:3)`, where %a reaches so far"""
    inner = node.inputs[0] if node.inputs else None
    if not isinstance(node.op, ops.Slice) or not (inner and isinstance(inner.op, ops.Concat)):
        return None
    op, begin = node.op, as_dim(0)
    if op.axis != inner.op.axis or op.step != 1:
        return None
    for part in inner.inputs:
        end = as_dim(begin + part.tensor.shape[op.axis])
        if at_most(begin, op.start) and at_most(op.stop, end):
            within = ops.Slice(op.axis, as_dim(op.start - begin), as_dim(op.stop - begin))
            return make(within, part, origin=node.origin)
        begin = end
    return None


def at_most(a: Dim, b: Dim) -> bool:
    """Say whether a <= b holds for all sizes, as far as the signs of coefficients show."""
    difference = as_dim(b - a)
    if isinstance(difference, int):
        return difference >= 0
    coefficients = sympy.expand(difference).as_coefficients_dict()
    return difference.is_polynomial() and all(c >= 0 for c in coefficients.values())


def move_filled(node: Node) -> Node | None:
    """`reshape(full(1)) --> full(1)`, and so for every op that only moves elements or converts."""
    if not isinstance(node.op, ops.Reshape | ops.Expand | ops.Permute | ops.Slice | ops.Cast):
        return None
    source = node.inputs[0].op
    if not isinstance(source, ops.Full | ops.Scalar):
        return None
    value = torch.tensor(source.value, dtype=source.dtype).to(node.tensor.dtype).item()
    if not node.tensor.rank:
        return make(ops.Scalar(value, node.tensor.dtype), origin=node.origin)
    return make(ops.Full(node.tensor.shape, value, node.tensor.dtype), origin=node.origin)


def count_on(node: Node) -> Node | None:
    """`slice(arange(8), 2:4) --> arange(2, start=2)`"""
    inner = node.inputs[0] if node.inputs else None
    if not isinstance(node.op, ops.Slice) or not (inner and isinstance(inner.op, ops.Arange)):
        return None
    if node.op.step != 1:
        return None
    start = as_dim(inner.op.start + node.op.start)
    length = as_dim(node.op.stop - node.op.start)
    return make(ops.Arange(length, start), origin=node.origin)


def know_size(node: Node) -> Node | None:
    """`size(8) --> 8`"""
    if not isinstance(node.op, ops.Size) or not isinstance(node.op.dim, int):
        return None
    return make(ops.Scalar(node.op.dim, torch.int64), origin=node.origin)


IDENTITIES: tuple[Rule, ...] = (
    drop_without_effect,
    drop_neutral_operand,
    choose_known_branch,
    merge_reshapes,
    merge_permutes,
    merge_expands,
    merge_slices,
    slice_one_part,
    move_filled,
    count_on,
    know_size,
)
