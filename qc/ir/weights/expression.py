"""The decode language: how one element of a stored matrix is read.

A format writes its decoding once, as an `Expr` over the element's `row` and `col`; every backend
renders it. There is no control flow: about a dozen node kinds, all pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Expr:
    """An expression; operators build larger ones, ints become constants."""

    def __add__(self, other: Expr | int) -> Expr:
        return arith("add", self, other)

    def __sub__(self, other: Expr | int) -> Expr:
        return arith("sub", self, other)

    def __mul__(self, other: Expr | int) -> Expr:
        return arith("mul", self, other)

    def __floordiv__(self, other: Expr | int) -> Expr:
        return self if other == 1 else arith("floordiv", self, other)

    def __mod__(self, other: Expr | int) -> Expr:
        return arith("mod", self, other)

    def __and__(self, other: Expr | int) -> Expr:
        return arith("and", self, other)

    def __or__(self, other: Expr | int) -> Expr:
        return arith("or", self, other)

    def __rshift__(self, other: Expr | int) -> Expr:
        return arith("shr", self, other)

    def __lshift__(self, other: Expr | int) -> Expr:
        return arith("shl", self, other)


@dataclass(frozen=True)
class Index(Expr):
    """The row or the column of the element that is read (i32)."""

    axis: str

    def __str__(self) -> str:
        return self.axis


@dataclass(frozen=True, eq=False)
class Const(Expr):
    """An integer (i32) or a float (f32); 1 and 1.0 are not equal."""

    value: int | float

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> tuple[type, int | float]:
        return type(self.value), self.value

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Load(Expr):
    """An element of a stored array; integers widen to i32, floats to f32."""

    array: str
    index: tuple[Expr, ...]

    def __str__(self) -> str:
        return f"{self.array}[{', '.join(map(str, self.index))}]"


@dataclass(frozen=True)
class Arith(Expr):
    """A binary operation on two i32 or two f32 values."""

    kind: str
    left: Expr
    right: Expr

    def __str__(self) -> str:
        return f"({self.left} {SIGNS[self.kind]} {self.right})"


@dataclass(frozen=True)
class ToFloat(Expr):
    """i32 -> f32."""

    value: Expr

    def __str__(self) -> str:
        return f"float({self.value})"


SIGNS = {
    "add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%",
    "and": "&", "or": "|", "shr": ">>", "shl": "<<", "min": "min",
}  # fmt: skip

ROW, COL = Index("row"), Index("col")


def as_expr(value: Expr | int | float) -> Expr:
    """Wrap a number."""
    return value if isinstance(value, Expr) else Const(value)


def arith(kind: str, left: Expr | int | float, right: Expr | int | float) -> Expr:
    """Build left `kind` right, folding integer constants."""
    left, right = as_expr(left), as_expr(right)
    match left, right:
        case Const(int(a)), Const(int(b)):
            return Const(int(INTEGER_RULES[kind](torch.tensor(a), torch.tensor(b))))
    return Arith(kind, left, right)


def minimum(left: Expr | int, right: Expr | int) -> Expr:
    """Build the smaller of two values."""
    return arith("min", left, right)


INTEGER_RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul,
    "floordiv": torch.floor_divide, "mod": torch.remainder,
    "and": torch.bitwise_and, "or": torch.bitwise_or,
    "shr": torch.bitwise_right_shift, "shl": torch.bitwise_left_shift, "min": torch.minimum,
}  # fmt: skip


@dataclass(frozen=True)
class TorchRendering:
    """Evaluate expressions for whole tensors of rows and columns: the reference rendering."""

    arrays: Mapping[str, Tensor]
    row: Tensor
    col: Tensor

    @cached_property
    def seen(self) -> dict[Expr, Tensor]:
        return {}

    def value(self, expr: Expr) -> Tensor:
        """Return the values of `expr`, shared subexpressions computed once."""
        if expr not in self.seen:
            self.seen[expr] = self.compute(expr)
        return self.seen[expr]

    def compute(self, expr: Expr) -> Tensor:
        """Evaluate one node."""
        match expr:
            case Index(axis):
                return self.row if axis == "row" else self.col
            case Const(value):
                dtype = torch.int32 if isinstance(value, int) else torch.float32
                return torch.tensor(value, dtype=dtype)
            case Load(array, index):
                loaded = self.arrays[array][tuple(self.value(i).long() for i in index)]
                return loaded.float() if loaded.is_floating_point() else loaded.int()
            case ToFloat(inner):
                return self.value(inner).float()
            case Arith(kind, left, right):
                return INTEGER_RULES[kind](self.value(left), self.value(right))
        raise TypeError(f"{expr!r} is no expression of the decode language")


def rename_arrays(expr: Expr, prefix: str) -> Expr:
    """Put `prefix` before every array name, so that terms of a sum keep apart."""
    match expr:
        case Load(array, index):
            return Load(prefix + array, tuple(rename_arrays(i, prefix) for i in index))
        case Arith(kind, left, right):
            return Arith(kind, rename_arrays(left, prefix), rename_arrays(right, prefix))
        case ToFloat(inner):
            return ToFloat(rename_arrays(inner, prefix))
    return expr


def walk(expr: Expr) -> list[Expr]:
    """List all nodes of an expression, operands after users."""
    found, stack = [], [expr]
    while stack:
        node = stack.pop()
        found.append(node)
        stack.extend(v for v in children(node))
    return found


def children(expr: Expr) -> tuple[Any, ...]:
    """Return the operands of one node."""
    match expr:
        case Load(_, index):
            return index
        case Arith(_, left, right):
            return (left, right)
        case ToFloat(inner):
            return (inner,)
    return ()
