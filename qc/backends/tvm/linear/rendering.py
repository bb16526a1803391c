"""The decode language rendered to vectors: one value for each of several lanes.

An expression over LANE becomes a vector where it depends on LANE and a scalar where it does not.
Loads are scalars, vectors of neighbours, permutations of a table that fits registers, or one load a
lane, as the index says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tvm import tirx
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.vectors import (
    bfloats_to_float,
    halves_to_float,
    lanes_of,
    pure,
    span,
    splat,
    typed,
)
from qc.ir.target import Target
from qc.ir.weights.affine import Affine, affine_of
from qc.ir.weights.expression import (
    LANE,
    Arith,
    AsFloat,
    AsHalf,
    Code,
    Const,
    Expr,
    Index,
    Load,
    Sum,
    ToFloat,
    substitute_indices,
)

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


def less(left: Any, right: Any, lanes: int) -> Any:
    """Return 1 where left < right: the sign of the difference. TVM cannot bind a vector of
    booleans; indices and codes stay far from overflow."""
    sign = T.shift_right(left - right, splat(T.int32(31), lanes))
    return T.bitwise_and(sign, splat(T.int32(1), lanes))


def equal(left: Any, right: Any, lanes: int) -> Any:
    """Return 1 where left == right: neither difference is negative."""
    one = splat(T.int32(1), lanes)
    return one - T.bitwise_or(less(left, right, lanes), less(right, left, lanes))


COMPARISONS: dict[str, Callable[[Any, Any, int], Any]] = {"eq": equal, "lt": less}

MOST_PERMUTED = 32
"""Entries of the largest table that is read from registers: four permutations and three blends."""


@dataclass(frozen=True)
class StoredArray:
    """A buffer and the dtype of what it holds (bfloat16 lies in uint16 buffers)."""

    buffer: Any
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class VectorRendering:
    """Render expressions for `lanes` values of LANE from 0 on; `indices` are int64 scalars."""

    arrays: Mapping[str, StoredArray]
    indices: Mapping[Index, Any]
    lanes: int
    target: Target
    seen: dict[Expr, Any] = field(default_factory=dict)

    def within(self, indices: Mapping[Index, Any]) -> VectorRendering:
        """Return a rendering with more indices, which keeps what was computed."""
        return VectorRendering(
            self.arrays, {**self.indices, **indices}, self.lanes, self.target, dict(self.seen)
        )

    def vector(self, expr: Expr) -> Any:
        """Return `expr` in all lanes."""
        value = self.value(expr)
        return value if lanes_of(value) == self.lanes else splat(value, self.lanes)

    def value(self, expr: Expr) -> Any:
        """Return `expr`, int32 or float32; equal subexpressions are computed once."""
        if expr not in self.seen:
            self.seen[expr] = self.compute(expr)
        return self.seen[expr]

    def compute(self, expr: Expr) -> Any:
        """Render one node."""
        match expr:
            case Index():
                return self.index_value(expr)
            case Const(value):
                return T.int32(value) if isinstance(value, int) else T.float32(value)
            case Load():
                return T.Bind(self.load(expr))
            case Code():
                return T.Bind(self.code(expr))
            case ToFloat(Const(int(value))):
                return T.float32(value)
            case ToFloat(inner):
                value = self.value(inner)
                return T.Cast(typed("float32", lanes_of(value)), value)
            case AsFloat(inner):
                value = self.value(inner)
                return T.reinterpret(typed("float32", lanes_of(value)), value)
            case AsHalf(inner):
                value = self.value(inner)
                bits = T.Cast(typed("uint16", lanes_of(value)), value)
                return halves_to_float(bits, lanes_of(value), self.target)
            case Arith(kind, left, right):
                return self.arithmetic(kind, self.value(left), self.value(right))
            case Sum():
                return self.sum(expr)
        raise TypeError(f"{expr!r} is no expression of the decode language")

    def arithmetic(self, kind: str, left: Any, right: Any) -> Any:
        """Apply an operation to scalars or vectors."""
        lanes = max(lanes_of(left), lanes_of(right))
        left, right = (v if lanes_of(v) == lanes else splat(v, lanes) for v in (left, right))
        if kind in COMPARISONS:
            return COMPARISONS[kind](left, right, lanes)
        return RULES[kind](left, right)

    # ---- indices

    def index_value(self, expr: Expr) -> Any:
        """Return an index as data, int32."""
        if expr == LANE:
            return tirx.Ramp(T.int32(0), T.int32(1), self.lanes)
        assert isinstance(expr, Index)
        return T.Cast("int32", self.indices[expr])

    def scalar_index(self, expr: Expr) -> Any:
        """Return an expression without LANE as an int64 scalar."""
        match expr:
            case Const(int(value)):
                return T.int64(value)
            case Index():
                return self.indices[expr]
            case Arith(kind, left, right) if kind in RULES and not reads_data(expr):
                return RULES[kind](self.scalar_index(left), self.scalar_index(right))
        return T.Cast("int64", self.value(expr))

    def along_lanes(self, expr: Expr) -> tuple[Expr, int] | None:
        """View an index as base + stride * LANE with a base that is the same in all lanes."""
        if not varies(expr):
            return expr, 0
        affine = affine_of(expr, {LANE: self.lanes})
        if affine is None:
            return None
        stride = dict(affine.factors).get(LANE, 0)
        base = affine.plus(Affine(((LANE, stride),)), -1).expression()
        return None if varies(base) else (base, stride)

    # ---- loads

    def load(self, expr: Load) -> Any:
        """Read elements of an array, widened."""
        array, places = self.arrays[expr.array], [self.along_lanes(i) for i in expr.index]
        if all(place is not None and place[1] == 0 for place in places):
            index = [self.scalar_index(place[0]) for place in places if place is not None]
            return widened(array, array.buffer[index], self.target)
        *outer, last = places
        if all(place is not None and place[1] == 0 for place in outer):
            index = [self.scalar_index(place[0]) for place in outer if place is not None]
            if last is not None and last[1] == 1:
                index.append(span(self.scalar_index(last[0]), self.lanes))
                return widened(array, array.buffer[index], self.target)
            if last is None and self.permutes(array):
                return self.permuted(array, index, self.value(expr.index[-1]))
        return self.gathered(array, expr)

    def gathered(self, array: StoredArray, expr: Load) -> Any:
        """Read one element for each lane; indices that are read stay inside the array."""
        columns = [
            self.each_lane(index, size) for index, size in zip(expr.index, array.shape, strict=True)
        ]
        single = [array.buffer[list(at)] for at in zip(*columns, strict=True)]
        together = tirx.Shuffle(single, [T.int32(i) for i in range(self.lanes)])
        return widened(array, together, self.target)

    def each_lane(self, expr: Expr, size: int | None = None) -> list[Any]:
        """Return an index for each lane, int64 scalars; what is read is kept below `size`."""
        if not varies(expr):
            return [self.scalar_index(expr)] * self.lanes
        if not reads_data(expr):
            return [
                self.scalar_index(substitute_indices(expr, {LANE: Const(lane)}))
                for lane in range(self.lanes)
            ]
        vector = self.vector(expr)
        if size is not None:
            last, first = (splat(T.int32(n), self.lanes) for n in (size - 1, 0))
            vector = T.max(T.min(vector, last), first)
        vector = T.Bind(vector)
        return [
            T.Cast("int64", tirx.Shuffle([vector], [T.int32(lane)])) for lane in range(self.lanes)
        ]

    # ---- tables in registers

    def permutes(self, array: StoredArray) -> bool:
        """Say whether a table fits registers of a machine that permutes them by variables."""
        return (
            array.shape[-1] <= MOST_PERMUTED
            and array.dtype.is_floating_point
            and self.target.has("avx2")
            and self.lanes in (8, 16)
        )

    def permuted(self, array: StoredArray, index: list[Any], code: Any) -> Any:
        """Look codes up in a table of up to 32 values."""
        size, lanes = array.shape[-1], self.lanes
        code = T.Bind(code if lanes_of(code) == lanes else splat(code, lanes))
        found = []
        for start in range(0, size, lanes):
            table = self.table_part(array, index, start)
            found.append(T.Bind(permute(table, code, lanes)))
        bit = lanes.bit_length() - 1
        while len(found) > 1:
            mask = T.Bind(T.shift_left(code, splat(T.int32(31 - bit), lanes)))
            pairs = [found[i : i + 2] for i in range(0, len(found), 2)]
            found = [T.Bind(blend(mask, p, lanes)) if len(p) == 2 else p[0] for p in pairs]
            bit += 1
        return found[0]

    def table_part(self, array: StoredArray, index: list[Any], start: int) -> Any:
        """Load `lanes` entries of a table, the last ones repeated where it is shorter."""
        size = array.shape[-1]
        if start + self.lanes <= size:
            at = [*index, span(start, self.lanes)]
            return T.Bind(widened(array, array.buffer[at], self.target))
        single = [
            widened(array, array.buffer[[*index, T.int64(min(i, size - 1))]], self.target)
            for i in range(start, start + self.lanes)
        ]
        return T.Bind(tirx.Shuffle(single, [T.int32(i) for i in range(self.lanes)]))

    # ---- packed codes

    def code(self, expr: Code) -> Any:
        """Read packed bits of one row: a word for all lanes, shifted differently in each."""
        place = self.along_lanes(expr.position)
        row = [self.scalar_index(i) for i in expr.index]
        buffer, mask = self.arrays[expr.array].buffer, (1 << expr.width) - 1
        if place is not None and place[1] == 0:
            position = self.scalar_index(place[0])
            return self.bits_at(buffer, row, position, mask, 1, 0)
        if place is None or (self.lanes_at_once(expr, place[1]) < min(8, self.lanes)):
            single = [
                T.Bind(self.bits_at(buffer, row, position, mask, 1, 0))
                for position in self.each_lane(expr.position)
            ]
            return tirx.Shuffle(single, [T.int32(i) for i in range(self.lanes)])
        base, stride = place
        together = self.lanes_at_once(expr, stride)
        parts = []
        for first in range(0, self.lanes, together):
            position = self.scalar_index(base) + T.int64(first * stride)
            parts.append(T.Bind(self.bits_at(buffer, row, position, mask, together, stride)))
        if len(parts) == 1:
            return parts[0]
        return tirx.Shuffle(parts, [T.int32(i) for i in range(self.lanes)])

    def lanes_at_once(self, expr: Code, stride: int) -> int:
        """Return how many lanes one word of 64 bits serves, from any bit of its first byte on."""
        lanes = self.lanes
        while lanes > 1 and 7 + (lanes - 1) * stride + expr.width > 64:
            lanes //= 2
        return lanes

    def bits_at(
        self, buffer: Any, row: list[Any], position: Any, mask: int, lanes: int, stride: int
    ) -> Any:
        """Read `lanes` codes that lie `stride` bits apart in a row of bytes."""
        bits = 7 + (lanes - 1) * stride + mask.bit_length()
        kind, width = ("uint32", 4) if bits <= 32 else ("uint64", 8)
        byte = T.shift_right(position, T.int64(3))
        word = T.reinterpret(kind, buffer[[*row, span(byte, width)]])
        shift = T.Cast(kind, T.bitwise_and(position, T.int64(7)))
        if lanes == 1:
            low = T.bitwise_and(T.shift_right(word, shift), tirx.const(mask, kind))
            return T.Cast("int32", low)
        moved = T.Bind(T.shift_right(word, shift))
        steps = tirx.Ramp(tirx.const(0, kind), tirx.const(stride, kind), lanes)
        each = T.shift_right(splat(moved, lanes), steps)
        return T.Cast(
            typed("int32", lanes), T.bitwise_and(each, splat(tirx.const(mask, kind), lanes))
        )

    # ---- sums

    def sum(self, expr: Sum) -> Any:
        """Add up in a loop; the range is the same in all lanes."""
        start, stop = self.scalar_index(expr.start), self.scalar_index(expr.stop)
        total = T.alloc_buffer((self.lanes,), "float32", layout=None)
        T.buffer_store(total, splat(T.float32(0), self.lanes), [span(0, self.lanes)])
        with T.serial(T.int64(0), stop - start) as number:
            inner = self.within({expr.index: T.Bind(start + number)})
            value = total[span(0, self.lanes)] + inner.vector(expr.body)
            T.buffer_store(total, value, [span(0, self.lanes)])
        return T.Bind(total[span(0, self.lanes)])


def varies(expr: Expr) -> bool:
    """Say whether an expression depends on the lane."""
    return LANE in expr.indices


def reads_data(expr: Expr) -> bool:
    """Say whether an expression reads stored arrays."""
    return expr.reads


def widened(array: StoredArray, stored: Any, target: Target) -> Any:
    """Return loaded elements as int32 or float32."""
    lanes = lanes_of(stored)
    if array.dtype == torch.bfloat16:
        return bfloats_to_float(stored, lanes)
    if array.dtype == torch.float16:
        return halves_to_float(T.reinterpret(typed("uint16", lanes), stored), lanes, target)
    element = "float32" if array.dtype.is_floating_point else "int32"
    return (
        stored if str(stored.ty) == typed(element, lanes) else T.Cast(typed(element, lanes), stored)
    )


def permute(table: Any, code: Any, lanes: int) -> Any:
    """Return table[code] for the low bits of the codes, in registers."""
    if lanes == 8:
        return pure("float32x8", "llvm.x86.avx2.permps", table, code)
    return pure("float32x16", "llvm.x86.avx512.permvar.sf.512", table, code)


def blend(mask: Any, pair: list[Any], lanes: int) -> Any:
    """Return the second of a pair in the lanes where the sign of `mask` is set, else the first."""
    low, high = pair
    if lanes == 8:
        signs = T.reinterpret("float32x8", mask)
        return pure("float32x8", "llvm.x86.avx.blendv.ps.256", low, high, signs)
    kind = typed("int32", lanes)
    signs = T.shift_right(mask, splat(T.int32(31), lanes))
    a, b = T.reinterpret(kind, low), T.reinterpret(kind, high)
    mixed = T.bitwise_xor(a, T.bitwise_and(T.bitwise_xor(a, b), signs))
    return T.reinterpret(typed("float32", lanes), mixed)
