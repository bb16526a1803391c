"""Bits times factors of rows and of columns: sums of three inputs looked up in registers.

    w[row, col] = sum over products p of  value(bit[row, col]) row_p[row] column_p[col]

such as stacked signs with low-rank magnitudes. With z = column_p x, the sum of three inputs has
eight values, one for each way three bits can fall: a vector of eight floats, from which one
instruction takes what the bits of eight outputs say. Three bits cost a permutation and an addition
for each product, however they fall; sums are in float32, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.code_products import CODE, factors_of, product, replaced
from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.layout import BLOCK, STEP, in_blocks
from qc.backends.tvm.linear.panels import FLOAT_TILES, add_tile, new_panel, reader_of
from qc.backends.tvm.linear.rendering import StoredArray, permute, widened
from qc.backends.tvm.linear.skeleton import Signature, accumulator
from qc.backends.tvm.linear.term import STORED_NAMES, Place, Products, TermKernel, held
from qc.backends.tvm.linear.vectors import span, splat, typed
from qc.ir.weights.affine import simplify
from qc.ir.weights.expression import (
    COL,
    ROW,
    Arith,
    Code,
    Const,
    Expr,
    Load,
    TorchRendering,
    is_structural,
    walk,
)

LANES = 8
"""Outputs of a vector, and sums of three inputs: AVX2's permutation."""

TOGETHER = 3
"""Inputs of a table."""

TABLES = -(-STEP // TOGETHER)
"""Tables of a step of 32 inputs: the last one is of two."""

AT_ONCE = 4
"""Products whose sums, for 16 outputs, stay in registers."""

MOST_PRODUCTS = 32
"""More are decoded element by element: their code would fill the instruction cache."""


@dataclass(frozen=True)
class BitProducts:
    """The products that read one bit: value(bit) is `low` or `high`, times each row * column."""

    code: Code
    low: float
    high: float
    factors: tuple[tuple[Expr, Expr], ...]


@dataclass(frozen=True, eq=False)
class BitFactors(TermKernel):
    """Look sums up; several rows multiply a block that is decoded to float32 once."""

    rule: ClassVar[str] = "bit_factors"
    place: Place
    groups: tuple[BitProducts, ...]

    @property
    def factors(self) -> tuple[tuple[Expr, Expr], ...]:
        """The row and column factors of all products."""
        return tuple(pair for group in self.groups for pair in group.factors)

    @property
    def work(self) -> float:
        return (len(self.groups) + 2.0 * len(self.factors)) / TOGETHER

    @property
    def steps(self) -> int:
        return -(-self.place.inner // STEP)

    @property
    def blocks(self) -> int:
        return -(-self.place.outer // BLOCK)

    def dtype(self, axis: int) -> torch.dtype:
        """Return how the row (0) or column (1) factors are held: as stored, where all are alike."""
        factors = [pair[axis] for pair in self.factors]
        loads = [each.array for each in factors if isinstance(each, Load)]
        found = {self.place.specs[name].dtype for name in loads} & STORED_NAMES.keys()
        return found.pop() if len(loads) == len(factors) and len(found) == 1 else torch.float32

    def declare(self, signature: Signature) -> None:
        count = len(self.factors)
        shapes = (self.blocks, count, BLOCK), (count, self.steps * STEP)
        words = (self.blocks, self.steps, len(self.groups), BLOCK)
        self.place.declare(signature, "words", "int32", words, self.words)
        for axis, name in enumerate(("row_factors", "column_factors")):
            kind = STORED_NAMES[self.dtype(axis)]
            repack = partial(self.held_factors, axis)
            self.place.declare(signature, name, kind, shapes[axis], repack)

    def evaluated(self, arrays: Mapping[str, Tensor], expr: Expr) -> Tensor:
        """Evaluate an expression of the whole matrix, of a row, or of a column."""
        rows, cols = (torch.arange(size, dtype=torch.int32) for size in self.place.shape)
        both = {ROW, COL} <= expr.indices
        indices = {ROW.axis: rows[:, None] if both else rows, COL.axis: cols}
        return TorchRendering(arrays, indices).value(expr)

    def words(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the bits, 32 columns of an output in a word: int32[blocks, steps, groups, 16]."""
        found = []
        for group in self.groups:
            bits = self.evaluated(arrays, group.code).long()
            padded = torch.nn.functional.pad(bits, (0, -bits.shape[1] % STEP))
            words = (padded.unflatten(1, (-1, STEP)) << torch.arange(STEP)).sum(-1)
            found.append(in_blocks(words.to(torch.uint32).view(torch.int32)).transpose(1, 2))
        return torch.stack(found, 2)

    def held_factors(self, axis: int, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return [blocks, products, 16] of the rows, or [products, columns] in whole steps."""
        size = self.place.shape[axis]
        values = [self.evaluated(arrays, pair[axis]).expand(size) for pair in self.factors]
        stacked = torch.stack(values).to(self.dtype(axis))
        if axis == 1:
            return held(torch.nn.functional.pad(stacked, (0, -size % STEP)))
        return held(in_blocks(stacked.T.contiguous()).transpose(1, 2).contiguous())

    def factor(self, signature: Signature, axis: int, at: list[Any], lanes: int) -> Any:
        """Load row (0) or column (1) factors as float32."""
        buffer = self.place.buffer(signature, ("row_factors", "column_factors")[axis])
        array = StoredArray(buffer, self.dtype(axis), ())
        *outer, last = at
        return T.Bind(widened(array, buffer[(*outer, span(last, lanes))], self.place.target))

    # ---- once a call

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        inputs.need_values()
        most = FLOAT_TILES[self.place.target.vector_bytes]
        size = len(self.factors) * self.steps * TABLES * LANES
        tables = T.alloc_buffer((T.int64(most - 1), T.int64(size)), "float32", layout=None)
        signature.scratch[self] = tables
        full = self.place.inner // STEP
        with T.If(inputs.rows < most), T.Then(), T.serial(T.int64(0), inputs.rows) as row:
            for number, (group, _) in enumerate(self.numbered()):
                build = partial(self.build_tables, signature, inputs, tables, row, number, group)
                with T.serial(T.int64(0), T.int64(full)) as step:
                    build(step, STEP)
                if self.steps > full:
                    build(T.int64(full), self.place.inner % STEP)

    def numbered(self) -> list[tuple[BitProducts, tuple[Expr, Expr]]]:
        """Return the products in order, with the bits that they read."""
        return [(group, pair) for group in self.groups for pair in group.factors]

    def table_at(self, number: int, step: Any, table: int) -> Any:
        """Return where a table starts."""
        return ((number * self.steps + step) * TABLES + table) * LANES

    def build_tables(
        self, signature: Signature, inputs: Inputs, tables: Any, row: Any, number: int,
        group: BitProducts, step: Any, count: int,
    ) -> None:  # fmt: skip
        """Emit the tables of one product for one step, whose first `count` inputs there are."""
        scaled = T.alloc_buffer((STEP,), "float32", layout=None)
        for first in range(0, STEP, LANES):
            at = step * STEP + first
            lanes = LANES if first + LANES <= count else 1
            for lane in range(0, LANES, lanes):
                value: Any = splat(T.float32(0), lanes)
                if first + lane < count:
                    factor = self.factor(signature, 1, [T.int64(number), at + lane], lanes)
                    value = factor * inputs.values[row, span(at + lane, lanes)]
                T.buffer_store(scaled, value, [span(first + lane, lanes)])
        places = T.ramp(T.int32(0), T.int32(1), LANES)
        for table in range(TABLES):
            total: Any = splat(T.float32(0), LANES)
            for bit, column in enumerate(range(table * TOGETHER, (table + 1) * TOGETHER)):
                if column < STEP:
                    chosen = T.bitwise_and(T.shift_right(places, splat(T.int32(bit), LANES)), 1)
                    value = self.value_of(chosen, group)
                    total = total + value * splat(scaled[T.int64(column)], LANES)
            T.buffer_store(tables, total, [row, span(self.table_at(number, step, table), LANES)])

    def value_of(self, bits: Any, group: BitProducts) -> Any:
        """Return what bits stand for, as float32."""
        step = splat(T.float32(group.high - group.low), LANES)
        return T.Cast(typed("float32", LANES), bits) * step + splat(T.float32(group.low), LANES)

    # ---- block by block

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        if many:
            read = reader_of(self.decoded(signature, block), LANES)

            def add_many(row: Any, height: int, sums: Any) -> None:
                add_tile(inputs.values, self.place.inner, read, LANES, row, height, sums)

            return add_many

        def add(row: Any, height: int, sums: Any) -> None:
            for r in range(height):
                self.add_row(signature, block, row + r, sums[r])

        return add

    def add_row(self, signature: Signature, block: Any, row: Any, sums: Any) -> None:
        """Add the products of one row of x with a block."""
        start = 0
        for bits, group in enumerate(self.groups):
            stop = start + len(group.factors)
            for first in range(start, stop, AT_ONCE):
                numbers = range(first, min(first + AT_ONCE, stop))
                self.add_products(signature, block, row, sums, bits, numbers)
            start = stop

    def add_products(
        self, signature: Signature, block: Any, row: Any, sums: Any, bits: int, numbers: range
    ) -> None:
        """Add the products with these numbers, which read one bit."""
        words = self.place.buffer(signature, "words")
        tables = signature.scratch[self]
        parts = range(0, BLOCK, LANES)
        found = {n: accumulator(LANES) for n in numbers}
        with T.serial(T.int64(0), T.int64(self.steps)) as step:
            code = {p: T.Bind(words[block, step, bits, span(p, LANES)]) for p in parts}
            for table in range(TABLES):
                shift = splat(T.int32(table * TOGETHER), LANES)
                moved = {
                    p: T.Bind(T.shift_right(code[p], shift)) if table else code[p] for p in parts
                }
                for n in numbers:
                    values = T.Bind(tables[row, span(self.table_at(n, step, table), LANES)])
                    for p in parts:
                        at = span(p, LANES)
                        value = found[n][at] + permute(values, moved[p], LANES)
                        T.buffer_store(found[n], value, [at])
        for n in numbers:
            for p in parts:
                at = span(p, LANES)
                factor = self.factor(signature, 0, [block, T.int64(n), T.int64(p)], LANES)
                T.buffer_store(sums, sums[at] + factor * found[n][at], [at])

    def decoded(self, signature: Signature, block: Any) -> Any:
        """Decode a block to a panel."""
        panel = new_panel(self.place.inner)
        words = self.place.buffer(signature, "words")
        with T.serial(T.int64(0), T.int64(self.place.inner)) as column:
            step = T.Bind(T.floordiv(column, T.int64(STEP)))
            shift = splat(T.Cast("int32", T.floormod(column, T.int64(STEP))), LANES)
            columns = [
                self.factor(signature, 1, [T.int64(number), column], 1)
                for number in range(len(self.factors))
            ]
            for part in range(0, BLOCK, LANES):
                total: Any = splat(T.float32(0), LANES)
                number = 0
                for bits, group in enumerate(self.groups):
                    magnitude: Any = splat(T.float32(0), LANES)
                    for _ in group.factors:
                        at = [block, T.int64(number), T.int64(part)]
                        row = self.factor(signature, 0, at, LANES)
                        magnitude = magnitude + row * splat(columns[number], LANES)
                        number += 1
                    word = words[block, step, bits, span(part, LANES)]
                    bit = T.bitwise_and(T.shift_right(word, shift), splat(T.int32(1), LANES))
                    total = T.Bind(total + magnitude * self.value_of(bit, group))
                T.buffer_store(panel, total, [span(column * BLOCK + part, LANES)])
        return panel


def bit_factors_term(place: Place) -> TermKernel | None:
    """Look sums up where each bit of a weight stands beside factors of its row and its column."""
    decode = place.format.decode(place.shape, ROW, COL)
    if is_structural(decode) or not place.target.has("avx2") or 0 in place.shape:
        return None
    groups: dict[tuple[Code, float, float], list[tuple[Expr, Expr]]] = {}
    for summand in summands(simplify(decode, dict(zip((ROW, COL), place.shape, strict=True)))):
        found = bit_products(summand)
        if found is None:
            return None
        groups.setdefault((found.code, found.low, found.high), []).extend(found.factors)
    if sum(map(len, groups.values())) > MOST_PRODUCTS:
        return None
    return BitFactors(place, tuple(BitProducts(*key, tuple(f)) for key, f in groups.items()))


def summands(expr: Expr) -> list[Expr]:
    """Return what a sum adds up."""
    match expr:
        case Arith("add", left, right):
            return [*summands(left), *summands(right)]
    return [expr]


def bit_products(expr: Expr) -> BitProducts | None:
    """Take a summand apart: a value of one bit, times a sum of factors; None where it is more."""
    codes = {each for each in walk(expr) if isinstance(each, Code)}
    if len(codes) != 1 or (code := codes.pop()).width != 1:
        return None
    values: list[Expr] = []
    others: list[Expr] = []
    for factor in factors_of(expr):
        (values if code in walk(factor) else others).append(factor)
    value = product(values)
    if value is None or len(sums := [each for each in others if is_sum(each)]) > 1:
        return None
    plain = [each for each in others if not is_sum(each)]
    pairs = [
        separated([*plain, *factors_of(each)])
        for each in (summands(sums[0]) if sums else [Const(1.0)])
    ]
    known = tuple(pair for pair in pairs if pair is not None)
    of_bit = replaced(value, code)
    if len(known) != len(pairs) or {ROW, COL} & of_bit.indices:
        return None
    if any(isinstance(each, Load) for each in walk(of_bit)):
        return None
    low, high = TorchRendering(
        {}, {CODE.axis: torch.tensor([0, 1], dtype=torch.int32)}
    ).value(of_bit).expand(2).tolist()  # fmt: skip
    return BitProducts(code, low, high, known)


def is_sum(expr: Expr) -> bool:
    """Say whether an expression is a sum."""
    return isinstance(expr, Arith) and expr.kind == "add"


def separated(factors: list[Expr]) -> tuple[Expr, Expr] | None:
    """Sort factors by what they depend on: rows, or else columns; None where on both."""
    rows = [each for each in factors if {ROW, COL} & each.indices == {ROW}]
    columns = [each for each in factors if ROW not in each.indices]
    if len(rows) + len(columns) != len(factors):
        return None
    columns = [each for each in columns if each != Const(1.0)]
    return product(rows) or Const(1.0), product(columns) or Const(1.0)
