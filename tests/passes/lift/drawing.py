"""Draw small graphs by hand: short names for ops, and a graph of whatever a value needs."""

from __future__ import annotations

import torch

from qc.ir import ops
from qc.ir.graph import Graph, topological_order
from qc.ir.node import Node, make
from qc.ir.target import Target
from qc.ir.types import Dim, TensorType, symbol
from qc.ir.weights.dense import dense_weight
from qc.passes.exactness import relative_difference
from qc.passes.pipeline import Context, Pass

BATCH, SEQ = symbol("batch"), symbol("seq")


def value(label: str, *shape: Dim, dtype: torch.dtype = torch.float32) -> Node:
    return make(ops.Input(label, TensorType(shape, dtype)))


def stored(*shape: int) -> Node:
    generator = torch.Generator().manual_seed(sum(shape))
    return make(ops.Parameter(dense_weight("w", torch.randn(shape, generator=generator))))


def table(values: torch.Tensor) -> Node:
    return make(ops.Parameter(dense_weight("table", values)))


def number(value: float | int, dtype: torch.dtype | None = None) -> Node:
    default = torch.int64 if isinstance(value, int) else torch.float32
    return make(ops.Scalar(value, dtype or default))


def unary(kind: str, x: Node) -> Node:
    return make(ops.Unary(kind), x)


def binary(kind: str, a: Node | float, b: Node | float) -> Node:
    a, b = (x if isinstance(x, Node) else number(x) for x in (a, b))
    return make(ops.Binary(kind), a, b)


def add(a: Node | float, b: Node | float) -> Node:
    return binary("add", a, b)


def mul(a: Node | float, b: Node | float) -> Node:
    return binary("mul", a, b)


def mean(x: Node) -> Node:
    return make(ops.Reduce("mean", (x.tensor.rank - 1,), keepdim=True), x)


def square(x: Node) -> Node:
    return binary("pow", x, 2.0)


def permute(x: Node, *order: int) -> Node:
    return make(ops.Permute(order), x)


def reshape(x: Node, *shape: Dim) -> Node:
    return make(ops.Reshape(shape), x)


def expand(x: Node, *shape: Dim) -> Node:
    return make(ops.Expand(shape), x)


def cut(x: Node, start: Dim, stop: Dim, axis: int | None = None) -> Node:
    return make(ops.Slice(x.tensor.rank - 1 if axis is None else axis, start, stop), x)


def concat(*xs: Node, axis: int | None = None) -> Node:
    return make(ops.Concat(xs[0].tensor.rank - 1 if axis is None else axis), *xs)


def arange(length: Dim, start: Dim = 0) -> Node:
    return make(ops.Arange(length, start))


def graph(*outputs: Node, names: tuple[str, ...] = ()) -> Graph:
    found = {n.op.label: n for n in topological_order(outputs) if isinstance(n.op, ops.Input)}
    inputs = tuple(found[label] for label in sorted(found))
    return Graph(inputs, outputs, names or tuple(f"out{i}" for i in range(len(outputs))))


def apply(one: Pass, before: Graph) -> Graph:
    """Run a pass."""
    return one.run(before, Context(Target("any", "any")))


def run(one: Pass, before: Graph) -> Graph:
    """Run a pass, and see that it kept the meaning."""
    after = apply(one, before)
    assert relative_difference(before, after) < 1e-5
    return after


def becomes(one: Pass, before: Node, expected: Node) -> None:
    """Check an equation: the pass turns `before` into `expected`."""
    after, wanted = run(one, graph(before)), graph(expected)
    assert after.same_as(wanted), f"got\n{after}\nexpected\n{wanted}"


def stays(one: Pass, before: Node) -> None:
    """Check that a pass leaves a graph as it is."""
    becomes(one, before, before)
