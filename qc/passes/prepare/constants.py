"""Compute at compile time what follows from small stored tensors and numbers alone."""

from __future__ import annotations

import math

from qc.ir import ops
from qc.ir.meaning import evaluate_nodes
from qc.ir.node import Node, make
from qc.ir.types import TensorType
from qc.ir.weights.dense import dense_weight

FOLDED_ELEMENTS = 1 << 20
"""The largest tensor that folding reads or makes: gains and tables, not weight matrices."""

FOLDED = (ops.Unary, ops.Binary, ops.Where, ops.Cast, ops.Reshape, ops.Permute, ops.Slice,
          ops.Concat, ops.Reduce)  # fmt: skip
"""Ops that are folded; the others either grow their operands or have no reason to be."""


def fold(node: Node) -> Node | None:
    """`add(%gain, 1.0) --> %gain'`, `mul(2, 3.0) --> 6.0`"""
    if not isinstance(node.op, FOLDED) or not node.inputs or not is_small(node):
        return None
    if all(isinstance(i.op, ops.Scalar) for i in node.inputs):
        return fold_numbers(node)
    names = [i.op.weight.name for i in node.inputs if isinstance(i.op, ops.Parameter)]
    if not names or not all(is_constant(i) and is_small(i) for i in node.inputs):
        return None
    (value,) = evaluate_nodes((node,), {}, {})
    return make(ops.Parameter(dense_weight(f"{names[0]}.{node.op.name}", value.contiguous())))


def fold_numbers(node: Node) -> Node | None:
    """Compute an op on numbers; None where the result is no finite number."""
    if node.tensor.rank:
        return None
    (value,) = evaluate_nodes((node,), {}, {})
    number = value.item()
    if isinstance(number, float) and not math.isfinite(number):
        return None
    return make(ops.Scalar(number, value.dtype), origin=node.origin)


def is_constant(node: Node) -> bool:
    """Say whether a leaf has a value at compile time."""
    return isinstance(node.op, ops.Parameter | ops.Scalar | ops.Full | ops.Arange)


def is_small(node: Node) -> bool:
    """Say whether a value has a known shape of few elements."""
    if not isinstance(node.type, TensorType):
        return False
    sizes = [d for d in node.type.shape if isinstance(d, int)]
    return len(sizes) == node.type.rank and math.prod(sizes) <= FOLDED_ELEMENTS
