"""A node of the graph: one op, its inputs, one result. A value IS its node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qc.ir.types import TensorType, TupleType, ValueType

if TYPE_CHECKING:
    from qc.ir.op import Op


@dataclass(frozen=True)
class Origin:
    """Where a node came from: the path in the user's model, and the passes that touched it."""

    module: str = ""
    passes: tuple[str, ...] = ()

    def touched_by(self, pass_name: str) -> Origin:
        """Return this origin with `pass_name` appended, once."""
        if self.passes and self.passes[-1] == pass_name:
            return self
        return Origin(self.module, (*self.passes, pass_name))

    def __str__(self) -> str:
        return " -> ".join(part for part in (self.module, *self.passes) if part)


@dataclass(frozen=True, eq=False)
class Node:
    """One operation and its result. Immutable; equal only to itself."""

    op: Op
    inputs: tuple[Node, ...]
    type: ValueType
    origin: Origin = Origin()

    @property
    def tensor(self) -> TensorType:
        """The type of a node with a single result."""
        if isinstance(self.type, TupleType):
            raise TypeError(f"{self.op.name} of {self.origin} has several results; take an item")
        return self.type

    def __repr__(self) -> str:
        return f"<{self.op} : {self.type} # {self.origin}>"


def make(op: Op, *inputs: Node, origin: Origin | None = None) -> Node:
    """Build a node: infer and check its type. The origin defaults to that of the last input
    that has one, which is the value being transformed in most rewrites."""
    if origin is None:
        origin = next((i.origin for i in reversed(inputs) if i.origin.module), Origin())
    return Node(op, inputs, op.infer(*(i.type for i in inputs)), origin)
