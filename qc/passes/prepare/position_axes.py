"""Which axis of a value counts positions, and which ops treat every position alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from math import prod
from typing import Any

import sympy

from qc.ir import ops
from qc.ir.node import Node
from qc.ir.types import Dim, as_dim

ELEMENTWISE = (ops.Unary, ops.Binary, ops.Where, ops.Cast, ops.GatedActivation)
ALONG_LAST_AXIS = (ops.RMSNorm, ops.LayerNorm, ops.Linear, ops.Quantize, ops.FakeQuantize)
ALONG_ONE_AXIS = (ops.Softmax, ops.CumSum, ops.Concat)


def position_axis(node: Node, seq: sympy.Symbol) -> int | None:
    """Return the axis of `node` whose size is `seq`; None where there is none or several."""
    axes = [i for i, d in enumerate(getattr(node.type, "shape", ())) if d == seq]
    return axes[0] if len(axes) == 1 else None


def mentions(value: Any, seq: sympy.Symbol) -> bool:
    """Say whether a dimension, an attribute or a nesting of them depends on `seq`."""
    if isinstance(value, tuple | list):
        return any(mentions(each, seq) for each in value)
    if isinstance(value, sympy.Expr):
        return seq in value.free_symbols
    shape = getattr(value, "shape", None)
    return shape is not None and mentions(shape, seq)


def is_independent(node: Node, seq: sympy.Symbol) -> bool:
    """Say whether neither the type, nor the attributes, nor the operands mention `seq`."""
    types = [node.type, *(i.type for i in node.inputs)]
    shapes = [getattr(t, "items", t) for t in types]
    return not mentions([*shapes, *(getattr(node.op, f.name) for f in fields(node.op))], seq)


def is_positionwise(node: Node, seq: sympy.Symbol) -> bool:
    """Say whether position i of `node` follows from position i of its operands alone, so that
    the op works on any run of positions. Attention is not; leaves and Arange are."""
    if is_independent(node, seq):
        return True
    axis = position_axis(node, seq)
    rule = RULES.get(type(node.op))
    if axis is None or rule is None:
        return False
    axes = [position_axis(i, seq) for i in node.inputs]
    if any(a is None and mentions(i.type, seq) for a, i in zip(axes, node.inputs, strict=True)):
        return False
    return rule(node, axis, axes, seq)


PositionRule = Callable[[Node, int, list[int | None], sympy.Symbol], bool]
"""(node, its position axis, those of its operands, seq) -> each position is treated alone."""


def keeps_aligned(node: Node, axis: int, axes: list[int | None], seq: sympy.Symbol) -> bool:
    """Elementwise: operands are aligned at their last axes."""
    rank = node.tensor.rank
    return all(
        a is None or a - i.tensor.rank == axis - rank
        for a, i in zip(axes, node.inputs, strict=True)
    )


def keeps_leading(node: Node, axis: int, axes: list[int | None], seq: sympy.Symbol) -> bool:
    """Only the last axis is worked on; the other operands are vectors and matrices."""
    return axes[0] == axis < node.tensor.rank - 1 and not any(a is not None for a in axes[1:])


def keeps_other_axis(node: Node, axis: int, axes: list[int | None], seq: sympy.Symbol) -> bool:
    """One axis is worked on, and it is another."""
    worked: int = node.op.axis  # type: ignore[attr-defined]  # the three ops of ALONG_ONE_AXIS
    return worked % node.tensor.rank != axis and all(a == axis for a in axes)


def keeps_row_major(node: Node, axis: int, axes: list[int | None], seq: sympy.Symbol) -> bool:
    """Reshape: as many elements before the positions as before."""
    if axes[0] is None:
        return False
    return elements_before(node, axis) == elements_before(node.inputs[0], axes[0])


def elements_before(node: Node, axis: int) -> Dim:
    """Multiply the dimensions before `axis`."""
    return as_dim(prod(node.tensor.shape[:axis]))


def keeps_permuted(node: Node, axis: int, axes: list[int | None], seq: sympy.Symbol) -> bool:
    """Permute moves the positions as a whole."""
    return isinstance(node.op, ops.Permute) and node.op.order[axis] == axes[0]


def keeps_sliced(node: Node, axis: int, axes: list[int | None], seq: sympy.Symbol) -> bool:
    """Slice takes another axis."""
    return isinstance(node.op, ops.Slice) and axes[0] == axis != node.op.axis


def keeps_reduced(node: Node, axis: int, axes: list[int | None], seq: sympy.Symbol) -> bool:
    """Reduce sums over other axes."""
    if not isinstance(node.op, ops.Reduce) or axes[0] is None or axes[0] in node.op.axes:
        return False
    before = sum(a < axes[0] for a in node.op.axes)
    return axis == (axes[0] if node.op.keepdim else axes[0] - before)


def keeps_looked_up(node: Node, axis: int, axes: list[int | None], seq: sympy.Symbol) -> bool:
    """Embedding: ids have positions, the table has none."""
    return axes == [axis, None]


def keeps_rows(node: Node, axis: int, axes: list[int | None], seq: sympy.Symbol) -> bool:
    """MatMul: positions are rows of the left side, or a batch axis of both."""
    rank, (a, b) = node.tensor.rank, node.inputs
    left, right = (
        None if x is None else x - i.tensor.rank for x, i in zip(axes, (a, b), strict=True)
    )
    if left == -2 and right is None:
        return axis == rank - 2
    return left == right == axis - rank and axis < rank - 2


def keeps_rotated(node: Node, axis: int, axes: list[int | None], seq: sympy.Symbol) -> bool:
    """Rope: heads and tables have their positions at axis 1."""
    return axes == [1, 1, 1]


def always(node: Node, axis: int, axes: list[int | None], seq: sympy.Symbol) -> bool:
    """Leaves: a value a position, or the same value everywhere."""
    return True


RULES: dict[type, PositionRule] = {
    **dict.fromkeys(ELEMENTWISE, keeps_aligned),
    **dict.fromkeys(ALONG_LAST_AXIS, keeps_leading),
    **dict.fromkeys(ALONG_ONE_AXIS, keeps_other_axis),
    **dict.fromkeys((ops.Input, ops.Full), always),
    ops.Expand: keeps_aligned,
    ops.Reshape: keeps_row_major,
    ops.Permute: keeps_permuted,
    ops.Slice: keeps_sliced,
    ops.Reduce: keeps_reduced,
    ops.Embedding: keeps_looked_up,
    ops.MatMul: keeps_rows,
    ops.Rope: keeps_rotated,
}
