"""Weights that windows of a row's bits name: codebooks, trellises, tables larger than registers.

A row is a stream of bits. Every `dim` consecutive weights of it are entries of stored tables, named
by as many windows of bits, which may overlap with those of the next weights:

    w[row, v dim + p] = factor[row] sum over windows b of  table_b[bits of row at (v stride + b)][p]

The tables are laid out once: what a decode expression makes of every value of a window. Then one
load gives `dim` weights; `dim` is as large as tables that stay in the first cache allow. Lanes go
along the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.bit_serial_reader import shuffled
from qc.backends.tvm.linear.code_products import factors_of, product
from qc.backends.tvm.linear.forms import is_float
from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.layout import BLOCK
from qc.backends.tvm.linear.panels import add_tile, new_panel, reader_of
from qc.backends.tvm.linear.plan import BLOCK_INDEX, ArrayLayout, VectorPlan, blocked_layouts
from qc.backends.tvm.linear.rendering import StoredArray, VectorRendering
from qc.backends.tvm.linear.skeleton import Signature, accumulator
from qc.backends.tvm.linear.stored import laid_out
from qc.backends.tvm.linear.term import STORED_NAMES, Place, Products, TermKernel
from qc.backends.tvm.linear.vectors import (
    float_lanes,
    halves_to_float,
    span,
    splat,
    sum_of_lanes,
)
from qc.ir.weights.affine import affine_of, simplify
from qc.ir.weights.expression import (
    COL,
    ROW,
    Arith,
    Code,
    Const,
    Expr,
    Index,
    Load,
    TorchRendering,
    is_structural,
    rebuild,
    substitute_indices,
    walk,
)
from qc.ir.weights.weight import ArraySpec

VECTOR, WINDOW = Index("vector"), Index("window")

DIMS = (8, 4, 2, 1)
"""Weights of a window, from the most desirable."""

MOST_BITS = 12
"""Of windows that are joined: the tables of wider ones outgrow the first cache."""

FIRST_CACHE = 1 << 14
"""Bytes of tables that leave room for x and for the codes in 32 KiB."""

WIDTHS = (32, 64)
"""Columns of a step: so many that a step ends with a byte."""

WORD = 64
CHAINS = 8  # sums of a row: two additions a cycle, each ready after four


@dataclass(frozen=True)
class Window:
    """`bits` bits from bit `start` of each vector; `values` says for each weight what they mean."""

    bits: int
    start: int
    values: tuple[Expr, ...]

    def table(self, arrays: Mapping[str, Tensor], half: bool) -> Tensor:
        """Return the entries of all values of the window, [2^bits * dim]."""
        windows = torch.arange(1 << self.bits, dtype=torch.int32)
        rendering = TorchRendering(arrays, {WINDOW.axis: windows})
        found = [rendering.value(v).float().expand(len(windows)) for v in self.values]
        table = torch.stack(found, 1).flatten()
        return table.half() if half else table


@dataclass(frozen=True)
class Windows:
    """How the windows of a matrix follow each other: `stride` bits for `dim` weights."""

    array: str
    dim: int
    stride: int
    parts: tuple[Window, ...]
    factor: Expr | None
    halves: bool
    """Whether tables hold float16 values as they are stored."""

    @property
    def entries(self) -> int:
        """Values of all tables."""
        return sum(self.dim << part.bits for part in self.parts)

    @property
    def table_bytes(self) -> int:
        return self.entries * self.entry_bytes

    @property
    def entry_bytes(self) -> int:
        """Bytes of one value in a table."""
        return 2 if self.uses_halves else 4

    @property
    def uses_halves(self) -> bool:
        """Say whether tables are float16: only where float32 is too large for the first cache."""
        return self.halves and 4 * self.entries > FIRST_CACHE

    @property
    def width(self) -> int:
        """Columns of a step."""
        return next((w for w in WIDTHS if w // self.dim * self.stride % 8 == 0), 8 * self.dim)


# ---------------------------------------------------------------- taking an expression apart


def windows_of(
    decode: Expr, shape: tuple[int, int], specs: Mapping[str, ArraySpec], lanes: int
) -> Windows | None:
    """View a decode expression as windows; None where it is something else."""
    decode = simplify(decode, dict(zip((ROW, COL), shape, strict=True)))
    addends = split(decode)
    factors = {factor for _, factor in addends}
    if len(factors) != 1 or not all(is_lookup(value) for value, _ in addends):
        return None
    factor = next(iter(factors))
    if factor is not None and COL in walk(factor):
        return None
    values = [value for value, _ in addends]
    halves = all(
        isinstance(value, Load) and specs[value.array].dtype == torch.float16 for value in values
    )
    found = [w for dim in DIMS if dim <= lanes and (w := in_vectors(values, factor, dim, halves))]
    small = [w for w in found if w.table_bytes <= FIRST_CACHE and widest(w) <= MOST_BITS]
    return next(iter(small + found[-1:]), None)


def widest(windows: Windows) -> int:
    """Return the bits of the widest window."""
    return max(part.bits for part in windows.parts)


def split(expr: Expr) -> list[tuple[Expr, Expr | None]]:
    """Return an expression as a sum of values that read codes, each with what multiplies it."""
    match expr:
        case Arith("add", left, right) if is_float(expr):
            return split(left) + split(right)
        case Arith("mul", left, right) if is_float(expr):
            for values, other in ((left, right), (right, left)):
                if not own_codes(other):
                    shared = factors_of(other)
                    return [
                        (value, product([*shared] if factor is None else [factor, *shared]))
                        for value, factor in split(values)
                    ]
    return [(expr, None)]


def own_codes(expr: Expr) -> list[Code]:
    """Return the codes that a row has for itself."""
    return [
        each
        for each in walk(expr)
        if isinstance(each, Code) and each.index == (ROW,) and COL in walk(each.position)
    ]


def is_lookup(value: Expr) -> bool:
    """Say whether a value is an element of a table that one code names; arithmetic has no need."""
    codes = own_codes(value)
    loads = [each for each in walk(value) if isinstance(each, Load)]
    return len(codes) == 1 and any(codes[0] in walk(index) for e in loads for index in e.index)


def in_vectors(
    values: Sequence[Expr], factor: Expr | None, dim: int, halves: bool
) -> Windows | None:
    """View values in vectors of `dim` columns; None where those do not repeat."""
    parts, strides, arrays = [], set(), set()
    for value in values:
        columns = [
            simplify(substitute_indices(value, {COL: VECTOR * dim + place}), {})
            for place in range(dim)
        ]
        codes = [own_code(column) for column in columns]
        positions = [None if code is None else affine_of(code.position, {}) for code in codes]
        starts = [p.constant for p in positions if p is not None]
        if len(starts) < dim:
            return None
        strides |= {p.factors for p in positions if p is not None}
        arrays |= {code.array for code in codes if code is not None}
        first = min(starts)
        bits = max(s + c.width for s, c in zip(starts, codes, strict=True) if c) - first
        meant = tuple(
            in_window(column, code, start - first)
            for column, code, start in zip(columns, codes, starts, strict=True)
            if code is not None
        )
        if bits > 16 or any({VECTOR, ROW, COL} & set(walk(each)) for each in meant):
            return None
        parts.append(Window(bits, first, meant))
    if len(arrays) != 1 or len(strides) != 1:
        return None
    match next(iter(strides)):
        case ((index, int(stride)),) if index == VECTOR:
            return Windows(next(iter(arrays)), dim, stride, tuple(parts), factor, halves)
    return None


def own_code(value: Expr) -> Code | None:
    """Return the code of a value in vectors of columns."""
    codes = [each for each in walk(value) if isinstance(each, Code) and each.index == (ROW,)]
    return codes[0] if len(codes) == 1 else None


def in_window(value: Expr, code: Code, start: int) -> Expr:
    """Read a code from WINDOW."""
    if value == code:
        return (WINDOW >> start) & ((1 << code.width) - 1)
    return rebuild(value, lambda each: in_window(each, code, start))


# ---------------------------------------------------------------- the kernel


@dataclass(frozen=True, eq=False)
class WindowsKernel(TermKernel):
    """Load `dim` weights at a time, output by output."""

    rule: ClassVar[str] = "windows"
    place: Place
    windows: Windows
    layouts: Mapping[str, ArrayLayout]
    """The arrays of the factor, in blocks of 16 rows where they have rows."""

    @property
    def work(self) -> float:
        # counted on AVX2: shift, mask and load for each window; the sum
        return 1.0 + 4.0 * len(self.windows.parts) * self.lanes / 8 * 8 / self.windows.dim / 2

    @property
    def lanes(self) -> int:
        return float_lanes(self.place.target)

    @cached_property
    def codes(self) -> ArrayLayout:
        """Codes as they are stored, with room to be read in words."""
        return ArrayLayout(self.place.specs[self.windows.array], unit=8)

    def declare(self, signature: Signature) -> None:
        repack = partial(laid_out, self.windows.array, self.codes)
        self.place.declare(signature, "bits", "uint8", self.codes.shape, repack)
        kind = "float16" if self.windows.uses_halves else "float32"
        for number, part in enumerate(self.windows.parts):
            table = partial(part.table, half=self.windows.uses_halves)
            size = self.windows.dim << part.bits
            self.place.declare(signature, f"table{number}", kind, (size,), table)
        for name, layout in self.layouts.items():
            dtype, repack = STORED_NAMES[layout.dtype], partial(laid_out, name, layout)
            self.place.declare(signature, f"rows.{name}", dtype, layout.shape, repack)

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        inputs.need_values()

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        rows = {
            name: StoredArray(
                self.place.buffer(signature, f"rows.{name}"), layout.dtype, layout.shape
            )
            for name, layout in self.layouts.items()
        }
        rendering = VectorRendering(rows, {BLOCK_INDEX: block}, self.lanes, self.place.target)
        count = len(self.windows.parts)
        tables = [self.place.buffer(signature, f"table{number}") for number in range(count)]
        read = WindowReader(self, self.place.buffer(signature, "bits"), tables)
        panel = self.panel(read, rendering, block) if many else None

        def add(row: Any, height: int, sums: Any) -> None:
            if panel is None:
                self.add_row(read, rendering, inputs.values, block, row, sums[0])
            else:
                reader = reader_of(panel, self.lanes)
                add_tile(inputs.values, self.place.inner, reader, self.lanes, row, height, sums)

        return add

    def outputs(self, block: Any) -> Any:
        """Return how many outputs a block has."""
        if self.place.outer % BLOCK == 0:
            return T.int64(BLOCK)
        return T.min(T.int64(BLOCK), T.int64(self.place.outer) - block * BLOCK)

    def factor(self, rendering: VectorRendering, vector: int) -> Any:
        """Return what multiplies the rows of one vector of outputs."""
        if self.windows.factor is None:
            return splat(T.float32(1), self.lanes)
        plan = VectorPlan(
            self.windows.factor, self.place.shape, self.lanes, BLOCK, self.layouts, True
        )
        return rendering.vector(plan.columns(Const(0), 1, vector)[0])

    def add_row(
        self,
        read: WindowReader,
        rendering: VectorRendering,
        x: Any,
        block: Any,
        row: Any,
        sums: Any,
    ) -> None:
        """Multiply one row of x by the rows of a block, one after the other."""
        found, lanes, width = accumulator(self.lanes), self.lanes, self.windows.width
        steps, rest = divmod(self.place.inner, width)
        with T.serial(T.int64(0), self.outputs(block)) as number:
            output = T.Bind(block * BLOCK + number)
            chains = [accumulator(lanes, size=lanes) for _ in range(CHAINS)]
            at = span(0, lanes)

            def add(values: list[Any], first: Any, column: int) -> None:
                inputs = T.Bind(x[row, span(first, lanes)])
                for number, value in enumerate(values):
                    chain = (column // lanes * len(values) + number) % CHAINS
                    total = chains[chain]
                    T.buffer_store(total, total[at] + value * inputs, [at])

            if steps:
                with T.serial(T.int64(0), T.int64(steps)) as step:
                    for first, values in read.vectors(output, step, width):
                        add(values, step * width + first, first)
            whole = rest - rest % lanes
            for first, values in read.vectors(output, T.int64(steps), whole):
                add(values, T.int64(steps * width + first), first)
            total = T.Bind(sum_of_lanes(added([chain[at] for chain in chains])))
            for k, value in read.singles(output, T.int64(steps), whole, rest):
                total = T.Bind(total + value * x[row, T.int64(steps * width + k)])
            T.buffer_store(found, total, [number])
        for vector in range(BLOCK // lanes):
            at = span(vector * lanes, lanes)
            T.buffer_store(sums, sums[at] + found[at] * self.factor(rendering, vector), [at])

    def panel(self, read: WindowReader, rendering: VectorRendering, block: Any) -> Any:
        """Decode a block of outputs to a panel."""
        panel, lanes, width = new_panel(self.place.inner), self.lanes, self.windows.width
        steps, rest = divmod(self.place.inner, width)
        scale = accumulator(lanes)
        for vector in range(BLOCK // lanes):
            value = self.factor(rendering, vector)
            T.buffer_store(scale, value, [span(vector * lanes, lanes)])
        with T.serial(T.int64(0), self.outputs(block)) as number:
            output = T.Bind(block * BLOCK + number)
            factor = T.Bind(scale[number])

            def store(value: Any, first: Any, count: int) -> None:
                at = first * BLOCK + number
                place = T.ramp(at, T.int64(BLOCK), count) if count > 1 else at
                T.buffer_store(panel, value * splat(factor, count), [place])

            if steps:
                with T.serial(T.int64(0), T.int64(steps)) as step:
                    for first, values in read.vectors(output, step, width):
                        store(sum(values[1:], values[0]), step * width + first, lanes)
            whole = rest - rest % lanes
            for first, values in read.vectors(output, T.int64(steps), whole):
                store(sum(values[1:], values[0]), T.int64(steps * width + first), lanes)
            for k, value in read.singles(output, T.int64(steps), whole, rest):
                store(value, T.int64(steps * width + k), 1)
        if self.place.outer % BLOCK:
            with (
                T.serial(self.outputs(block), T.int64(BLOCK)) as number,
                T.serial(T.int64(0), T.int64(self.place.inner)) as column,
            ):
                T.buffer_store(panel, T.float32(0), [column * BLOCK + number])
        return panel


def added(values: Sequence[Any]) -> Any:
    """Add values up in pairs: few wait for each other."""
    if len(values) == 1:
        return values[0]
    middle = len(values) // 2
    return added(values[:middle]) + added(values[middle:])


@dataclass(frozen=True)
class WindowReader:
    """The bits of all rows, and the tables."""

    kernel: WindowsKernel
    bits: Any
    tables: list[Any]

    @property
    def windows(self) -> Windows:
        return self.kernel.windows

    def vectors(self, output: Any, step: Any, count: int) -> Iterator[tuple[int, list[Any]]]:
        """Yield (column, float32 vectors to add) of the first `count` columns of a step."""
        lanes, dim = self.kernel.lanes, self.windows.dim
        words = Words(self, output, step)
        for first in range(0, count, lanes):
            found: list[list[Any]] = [[] for _ in self.tables]
            for at in range(first, first + lanes, dim):
                for pieces, (number, table) in zip(found, enumerate(self.tables), strict=True):
                    pieces.append(table[span(words.entry(at // dim, number), dim)])
            yield first, [self.widened(pieces) for pieces in found]

    def widened(self, pieces: list[Any]) -> Any:
        """Join entries of tables to one float32 vector."""
        lanes = self.kernel.lanes
        whole = pieces[0]
        if len(pieces) > 1:
            whole = shuffled([T.Bind(piece) for piece in pieces], range(lanes))
        if self.windows.uses_halves:
            bits = T.reinterpret(f"uint16x{lanes}", whole)
            return T.Bind(halves_to_float(bits, lanes, self.kernel.place.target))
        return T.Bind(whole)

    def singles(self, output: Any, step: Any, start: int, stop: int) -> list[tuple[int, Any]]:
        """Return (column, float32 weight) of single columns of a step."""
        words, dim, found = Words(self, output, step), self.windows.dim, []
        for k in range(start, stop):
            values = []
            for number, table in enumerate(self.tables):
                value = table[words.entry(k // dim, number) + k % dim]
                if self.windows.uses_halves:
                    bits = T.reinterpret("uint16", value)
                    value = halves_to_float(bits, 1, self.kernel.place.target)
                values.append(value)
            found.append((k, T.Bind(sum(values[1:], values[0]))))
        return found


class Words:
    """The bits of one step of one row, loaded in words of 64 bits that serve several windows."""

    def __init__(self, reader: WindowReader, output: Any, step: Any) -> None:
        windows = reader.windows
        self.reader, self.output = reader, output
        self.start = T.Bind(step * (windows.width // windows.dim * windows.stride // 8))
        self.first = 0
        self.word: Any = None

    def entry(self, vector: int, number: int) -> Any:
        """Return where the entry of a vector of the step starts in a table."""
        windows = self.reader.windows
        part = windows.parts[number]
        bit = vector * windows.stride + part.start
        if self.word is None or bit < self.first or bit + part.bits > self.first + WORD:
            self.first = bit // 8 * 8
            loaded = self.reader.bits[self.output, span(self.start + self.first // 8, WORD // 8)]
            self.word = T.Bind(T.reinterpret("uint64", loaded))
        # machines scale an index by up to 8 bytes; the rest is done by a shift that is there anyway
        up = max(0, (windows.dim * windows.entry_bytes).bit_length() - 4)
        down = bit - self.first - up
        mask = T.uint64(((1 << part.bits) - 1) << up)
        moved = self.word
        if down > 0:
            moved = T.shift_right(moved, T.uint64(down))
        elif down < 0:
            moved = T.shift_left(moved, T.uint64(-down))
        entry = T.Bind(T.Cast("int64", T.bitwise_and(moved, mask)))
        return entry * (windows.dim >> up)


def windows_term(place: Place) -> TermKernel | None:
    """Load weights from tables that windows of a row's bits name."""
    decode = place.format.decode(place.shape, ROW, COL)
    if is_structural(decode) or place.inner == 0:
        return None
    windows = windows_of(decode, place.shape, place.specs, float_lanes(place.target))
    if windows is None:
        return None
    layouts: dict[str, ArrayLayout] | None = {}
    if windows.factor is not None:
        read = {e.array for e in walk(windows.factor) if isinstance(e, Load | Code)}
        specs = {name: spec for name, spec in place.specs.items() if name in read}
        layouts = blocked_layouts(windows.factor, specs, BLOCK)
    return None if layouts is None else WindowsKernel(place, windows, layouts)
