"""The decode language rendered to TIR: one stored element as a scalar expression."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tvm.tirx.script import builder as T

from qc.ir.weights.expression import Arith, Const, Expr, Index, Load, ToFloat

RULES: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": T.floordiv,
    "mod": T.floormod,
    "and": T.bitwise_and,
    "or": T.bitwise_or,
    "shr": T.shift_right,
    "shl": T.shift_left,
    "min": T.min,
}


@dataclass(frozen=True)
class TirRendering:
    """Render expressions for the element (row, col); both are int32.

    `load(name, indices)` returns an element of a stored array, widened to int32 or float32.
    """

    load: Callable[[str, tuple[Any, ...]], Any]
    row: Any
    col: Any
    seen: dict[Expr, Any] = field(default_factory=dict)

    def value(self, expr: Expr) -> Any:
        """Return `expr` as a TIR expression; equal subexpressions are one object."""
        if expr not in self.seen:
            self.seen[expr] = self.compute(expr)
        return self.seen[expr]

    def compute(self, expr: Expr) -> Any:
        """Render one node."""
        match expr:
            case Index(axis):
                return self.row if axis == "row" else self.col
            case Const(value):
                return T.int32(value) if isinstance(value, int) else T.float32(value)
            case Load(array, index):
                return self.load(array, tuple(self.value(i) for i in index))
            case ToFloat(inner):
                return T.Cast("float32", self.value(inner))
            case Arith(kind, left, right):
                return RULES[kind](self.value(left), self.value(right))
        raise TypeError(f"{expr!r} is no expression of the decode language")


def load_from(buffers: Mapping[str, Any]) -> Callable[[str, tuple[Any, ...]], Any]:
    """Return a loader over TIR buffers; int16 buffers hold the bits of bfloat16 values."""

    def load(name: str, indices: tuple[Any, ...]) -> Any:
        stored = buffers[name][[T.Cast("int64", i) for i in indices]]
        dtype = str(buffers[name].dtype)
        if dtype == "int16":
            bits = T.Cast("uint32", T.reinterpret("uint16", stored))
            return T.reinterpret("float32", T.shift_left(bits, T.uint32(16)))
        return T.Cast("float32" if dtype.startswith("float") else "int32", stored)

    return load
