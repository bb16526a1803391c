"""What a value is: a shape of integers and named symbols, a logical dtype, a storage format.

Symbolic dimensions are sympy expressions (`batch`, `seq`, `past + seq`): torch.export speaks
sympy already, so its shapes arrive here as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import TypeAlias

import sympy
import torch

Dim: TypeAlias = int | sympy.Expr
"""One dimension: an int, or a polynomial with integer coefficients over positive symbols."""

DTYPE_NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def symbol(name: str) -> sympy.Symbol:
    """Return the dimension called `name`; equal names are the same dimension."""
    return sympy.Symbol(name, integer=True, positive=True)


def as_dim(value: object) -> Dim:
    """Normalise an int, a torch.SymInt or a sympy expression to a `Dim`."""
    if isinstance(value, torch.SymInt):
        value = value.node.expr
    if isinstance(value, sympy.Expr):
        expanded = sympy.expand(value)
        return int(expanded) if expanded.is_Integer else expanded
    if isinstance(value, int):
        return int(value)
    raise TypeError(f"a dimension is an int or a sympy expression, not {value!r}")


def element_count(shape: tuple[Dim, ...]) -> Dim:
    """Multiply all dimensions of `shape`."""
    return as_dim(prod(shape))


def exact_quotient(numerator: Dim, denominator: Dim) -> Dim | None:
    """Return numerator / denominator where it is a polynomial with integer coefficients."""
    if isinstance(numerator, int) and isinstance(denominator, int):
        return numerator // denominator if denominator and numerator % denominator == 0 else None
    if denominator == 0:
        return None
    quotient = sympy.cancel(sympy.sympify(numerator) / denominator)
    if quotient.is_Rational:
        return int(quotient) if quotient.is_Integer else None
    if not quotient.is_polynomial():
        return None
    if any(not c.is_Integer for c in sympy.Poly(quotient, *quotient.free_symbols).coeffs()):
        return None
    return as_dim(quotient)


def bind_dim(dim: Dim, sizes: dict[str, int]) -> int:
    """Evaluate `dim` with concrete sizes for its symbols; KeyError names a missing one."""
    if isinstance(dim, int):
        return dim
    return int(dim.subs({s: sizes[s.name] for s in dim.free_symbols}))


def dim_symbols(shape: tuple[Dim, ...]) -> set[str]:
    """Return the names of all symbols in `shape`."""
    return {s.name for d in shape if not isinstance(d, int) for s in d.free_symbols}


@lru_cache(maxsize=4096)
def dim_name(dim: Dim) -> str:
    """Print a dimension; graphs have few different ones and print them often."""
    return str(dim)


def shape_text(shape: tuple[Dim, ...]) -> str:
    """Print a shape the way graphs print it: `[batch, past + seq, 576]`."""
    return "[" + ", ".join(dim_name(d) for d in shape) + "]"


@dataclass(frozen=True)
class ActivationFormat:
    """How a quantized activation is stored: symmetric codes with one float32 scale for every
    `group` consecutive channels of a token (`group=None`: one for the whole token). A code is an
    int8, or by `kind` a float: "e4m3" of 8 bits, or "e2m1" of 4, whose scales are e4m3 with a
    float32 factor for each token (NVFP4)."""

    bits: int = 8
    group: int | None = None
    kind: str = "int"

    @property
    def limit(self) -> float:
        """The largest code."""
        known = {"e4m3": 448.0, "e2m1": 6.0}.get(self.kind)
        return float(2 ** (self.bits - 1) - 1) if known is None else known

    @property
    def widest_step(self) -> float:
        """The distance of the two largest values, in units of the largest."""
        return {"e4m3": 1 / 14, "e2m1": 1 / 3}.get(self.kind, 1 / self.limit)

    @property
    def code(self) -> str:
        """The name of the codes: int8, e4m3, e2m1."""
        return f"int{self.bits}" if self.kind == "int" else self.kind

    def takes(self, channels: Dim) -> bool:
        """Say whether tokens of so many channels can be stored: two codes of 4 bits share a byte,
        so that groups of them are whole."""
        group = self.group or channels
        return self.kind != "e2m1" or (isinstance(channels, int) and channels % group == 0)

    def __str__(self) -> str:
        return f"{self.code}/" + ("token" if self.group is None else f"g{self.group}")


@dataclass(frozen=True)
class TensorType:
    """Shape, logical dtype and, for quantized activations, the storage format."""

    shape: tuple[Dim, ...]
    dtype: torch.dtype = torch.float32
    format: ActivationFormat | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point

    def reshaped(self, shape: tuple[Dim, ...]) -> TensorType:
        return replace(self, shape=tuple(as_dim(d) for d in shape))

    def cast(self, dtype: torch.dtype) -> TensorType:
        return replace(self, dtype=dtype, format=None)

    def __str__(self) -> str:
        name = DTYPE_NAMES[self.dtype] if self.format is None else self.format.code
        name = name.replace("int", "i")
        return name + shape_text(self.shape)


@dataclass(frozen=True)
class TupleType:
    """The type of a node with several results (only uninterpreted ATen calls have them)."""

    items: tuple[TensorType, ...]

    def __str__(self) -> str:
        return "(" + ", ".join(str(t) for t in self.items) + ")"


ValueType = TensorType | TupleType


def broadcast_shapes(*shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Apply the broadcasting rule of torch to symbolic shapes; ValueError where they clash."""
    rank = max(len(s) for s in shapes)
    result: list[Dim] = []
    for axis in range(rank):
        dims = {s[axis - rank + len(s)] for s in shapes if axis - rank + len(s) >= 0} - {1}
        if len(dims) > 1:
            listed = " and ".join(shape_text(s) for s in shapes)
            raise ValueError(f"shapes {listed} do not broadcast")
        result.append(dims.pop() if dims else 1)
    return tuple(result)
