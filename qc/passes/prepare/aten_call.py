"""One ATen call with its arguments by name, and what builders of IR ops need around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import sympy
import torch

from qc.ir import ops
from qc.ir.node import Node, make
from qc.ir.op import Op
from qc.ir.types import Dim, TensorType, as_dim

Builder = Callable[["Call"], "Node | None"]
"""Call -> the node that computes the same, or None: "stays an ATen call"."""


@cache
def schema(overload: str) -> tuple[tuple[str, Any], ...]:
    """Return the argument names of an overload with their defaults."""
    namespace, packet, name = overload.split(".")
    function = getattr(getattr(getattr(torch.ops, namespace), packet), name)
    return tuple((argument.name, argument.default_value) for argument in function._schema.arguments)


@dataclass(frozen=True)
class Call:
    """A `Torch` node, read by argument name."""

    node: Node
    op: ops.Torch

    @cached_property
    def arguments(self) -> Mapping[str, Any]:
        """All arguments, defaults included; templates as in `ops.Torch`."""
        signature = schema(self.op.overload)
        given = dict(zip((name for name, _ in signature), self.op.args, strict=False))
        return {**dict(signature), **given, **dict(self.op.kwargs)}

    @property
    def type(self) -> TensorType:
        return self.node.tensor

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def has(self, name: str) -> bool:
        """Say whether an optional argument is given."""
        return self.arguments.get(name) is not None

    def tensor(self, name: str) -> Node:
        """Return a tensor argument."""
        return self.as_node(self[name])

    def optional(self, *names: str) -> list[Node]:
        """Return those of several tensor arguments that are given."""
        return [self.tensor(name) for name in names if self.has(name)]

    def tensors(self, name: str) -> list[Node]:
        """Return an argument that is a list of tensors."""
        return [self.as_node(each) for each in self[name]]

    def as_node(self, argument: Any) -> Node:
        """Return the node of an argument; numbers become scalars, sizes `Size`."""
        if isinstance(argument, ops.Operand):
            return self.node.inputs[argument.index]
        if isinstance(argument, sympy.Expr):
            return self.make(ops.Size(as_dim(argument)))
        return make(scalar(argument, self.type.dtype), origin=self.node.origin)

    def axis(self, name: str = "dim", of: Node | None = None) -> int:
        """Return an axis argument of `of` (default: `self`), counted from the front."""
        return self.axis_of(self[name], of)

    def axis_of(self, axis: int, of: Node | None = None) -> int:
        """Count an axis of `of` from the front."""
        rank = (of or self.tensor("self")).tensor.rank
        return axis % rank if rank else 0

    def make(self, op: Op, *inputs: Node) -> Node:
        """Build a node that comes from where this call came from."""
        return make(op, *inputs, origin=self.node.origin)

    def cast(self, value: Node, dtype: torch.dtype | None) -> Node:
        """Convert `value` unless it has that dtype."""
        if dtype is None or value.tensor.dtype == dtype:
            return value
        return self.make(ops.Cast(dtype), value)

    def reshape(self, value: Node, shape: tuple[Dim, ...]) -> Node:
        """Reshape `value` unless it has that shape."""
        return value if value.tensor.shape == shape else self.make(ops.Reshape(shape), value)


def scalar(value: float | int | bool, beside: torch.dtype) -> ops.Scalar:
    """Make the scalar that a number stands for in a call whose result has dtype `beside`."""
    if isinstance(value, bool):
        return ops.Scalar(value, torch.bool)
    if beside.is_floating_point or isinstance(value, float):
        wide = beside if beside == torch.float64 else torch.float32
        return ops.Scalar(float(value), wide)
    return ops.Scalar(value, torch.int64)
