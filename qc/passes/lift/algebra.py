"""Read nodes as algebra: constants, the factors of a product, operands in either order."""

from __future__ import annotations

from collections.abc import Container

from qc.ir import ops
from qc.ir.node import Node, make
from qc.ir.types import Dim, TensorType, as_dim

MULTIPLICATIONS = 8
"""How many nested multiplications `factors` looks through; a formula has fewer."""


def scalar_of(node: Node) -> float | None:
    """Return the number that `node` is; None where it is not one known at compile time."""
    op = node.op
    if isinstance(op, ops.Scalar) or (isinstance(op, ops.Full) and not op.shape):
        return None if isinstance(op.value, bool) else float(op.value)
    return None


def is_number(node: Node, value: float) -> bool:
    """Say whether `node` is `value` to float32 rounding."""
    found = scalar_of(node)
    return found is not None and close(found, value)


def close(found: float, expected: float) -> bool:
    """Say whether two constants of a formula agree: 1e-6 is what float32 storage leaves of them."""
    return abs(found - expected) <= 1e-6 * abs(expected)


def is_filled(node: Node, value: float) -> bool:
    """Say whether `node` repeats `value`."""
    return isinstance(node.op, ops.Full) and float(node.op.value) == value


def unary(node: Node, kind: str) -> Node | None:
    """Return what the function `kind` is applied to, or None."""
    matches = isinstance(node.op, ops.Unary) and node.op.kind == kind
    return node.inputs[0] if matches else None


def binary(node: Node, kind: str) -> tuple[Node, Node] | None:
    """Return both operands of the function `kind`, in order, or None."""
    matches = isinstance(node.op, ops.Binary) and node.op.kind == kind
    return (node.inputs[0], node.inputs[1]) if matches else None


def either_order(node: Node, kind: str) -> tuple[tuple[Node, Node], ...]:
    """Return the operands of a commutative function in both orders; nothing if it is another."""
    found = binary(node, kind)
    return () if found is None else (found, (found[1], found[0]))


def power(node: Node) -> tuple[Node, float] | None:
    """Return base and constant exponent of `node`, x * x being x^2; None if it is no power."""
    squared = binary(node, "mul")
    if squared is not None and squared[0] is squared[1]:
        return squared[0], 2.0
    raised = binary(node, "pow")
    exponent = scalar_of(raised[1]) if raised is not None else None
    return None if raised is None or exponent is None else (raised[0], exponent)


def inverse_root_of(node: Node) -> Node | None:
    """Return v where `node` is 1 / sqrt(v) in one of its spellings."""
    inverted = unary(node, "reciprocal")
    if inverted is not None:
        return root_of(inverted)
    raised = power(node)
    if raised is not None and raised[1] == -0.5:
        return raised[0]
    return unary(node, "rsqrt")


def root_of(node: Node) -> Node | None:
    """Return v where `node` is sqrt(v)."""
    raised = power(node)
    if raised is not None and raised[1] == 0.5:
        return raised[0]
    return unary(node, "sqrt")


def last_axis_mean(node: Node) -> Node | None:
    """Return x where `node` is the mean of x over its last axis, that axis kept."""
    if not isinstance(node.op, ops.Reduce) or node.op.kind != "mean" or not node.op.keepdim:
        return None
    x = node.inputs[0]
    return x if node.op.axes == (x.tensor.rank - 1,) else None


def factors(
    node: Node, whole: Container[Node] = (), depth: int = MULTIPLICATIONS
) -> tuple[float, tuple[Node, ...]]:
    """Split a product into its constant and its other factors.

    Divisions by a constant, negation, squares and cubes count; the nodes of `whole` stay whole.
    """
    value = scalar_of(node)
    if value is not None:
        return value, ()
    if node in whole or depth == 0:
        return 1.0, (node,)
    return inner_factors(node, whole, depth - 1) or (1.0, (node,))


def inner_factors(
    node: Node, whole: Container[Node], depth: int
) -> tuple[float, tuple[Node, ...]] | None:
    """Return the factors of a product, or None where `node` is none."""
    negated, product, quotient = unary(node, "neg"), binary(node, "mul"), binary(node, "div")
    raised = power(node)
    if negated is not None:
        value, rest = factors(negated, whole, depth)
        return -value, rest
    if raised is not None and raised[1] in (2.0, 3.0):
        return 1.0, (raised[0],) * int(raised[1])
    if product is not None:
        (a, left), (b, right) = (factors(side, whole, depth) for side in product)
        return a * b, (*left, *right)
    divisor = scalar_of(quotient[1]) if quotient is not None else None
    if quotient is not None and divisor:
        value, rest = factors(quotient[0], whole, depth)
        return value / divisor, rest
    return None


def as_vector(node: Node, like: TensorType) -> Node | None:
    """Return `node` as [channels] of `like`, ones before that axis dropped; None if it is not."""
    channels = like.shape[-1:]
    type = node.tensor
    if type.dtype != like.dtype or type.shape[-1:] != channels:
        return None
    if any(d != 1 for d in type.shape[:-1]):
        return None
    return reshaped(node, channels)


def reshaped(node: Node, shape: tuple[Dim, ...]) -> Node:
    """Return `node` under another shape, without reshapes behind each other."""
    shape = tuple(as_dim(d) for d in shape)
    while isinstance(node.op, ops.Reshape):
        node = node.inputs[0]
    return node if node.tensor.shape == shape else make(ops.Reshape(shape), node)


def permuted(node: Node, order: tuple[int, ...]) -> Node:
    """Return `node` with its axes in another order, without permutes behind each other."""
    if isinstance(node.op, ops.Permute):
        inner = node.op.order
        node, order = node.inputs[0], tuple(inner[i] for i in order)
    return node if order == tuple(range(len(order))) else make(ops.Permute(order), node)


def span_of(node: Node) -> tuple[Node, Dim, Dim]:
    """Return the value whose last axis `node` is a run of, and where that starts and stops."""
    start: Dim = 0
    length, last = node.tensor.shape[-1], node.tensor.rank - 1
    op = node.op
    while isinstance(op, ops.Slice) and op.axis == last and op.step == 1:
        node, start = node.inputs[0], as_dim(start + op.start)
        op = node.op
    return node, start, as_dim(start + length)


def joined(first: Node, second: Node) -> tuple[Node, Dim, Dim] | None:
    """Return the run that two runs make up together; None where they do not."""
    (x, start, middle), (y, behind, stop) = span_of(first), span_of(second)
    return (x, start, stop) if x is y and middle == behind else None


def run_of(x: Node, start: Dim, stop: Dim) -> Node:
    """Return a run of the last axis of `x`; `x` itself where that is all of it."""
    last = x.tensor.rank - 1
    if start == 0 and stop == x.tensor.shape[last]:
        return x
    return make(ops.Slice(last, start, stop), x)
