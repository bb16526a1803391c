"""Weights that windows of a row's bits name: codebooks, trellises, tables larger than registers.

A row is a stream of bits. Every `dim` consecutive weights of it are entries of stored tables, named
by as many windows of bits, which may overlap with those of the next weights:

    w[row, v dim + p] = factor[row] sum over windows b of  table_b[bits of row at (v stride + b)][p]

The tables are laid out once: what a decode expression makes of every value of a window. Then one
load gives `dim` weights; `dim` is as large as tables that stay in the first cache allow. Lanes go
along the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.along_inputs import AlongInputs, factor_layouts, prefetch_codes
from qc.backends.tvm.linear.bit_serial_reader import shuffled
from qc.backends.tvm.linear.code_products import factors_of, product
from qc.backends.tvm.linear.plan import ArrayLayout
from qc.backends.tvm.linear.skeleton import Signature
from qc.backends.tvm.linear.stored import laid_out
from qc.backends.tvm.linear.term import Place, TermKernel
from qc.backends.tvm.linear.vectors import float_lanes, halves_to_float, pure, span
from qc.ir.weights.affine import affine_of, simplify
from qc.ir.weights.expression import (
    COL,
    ROW,
    Arith,
    Code,
    Expr,
    Index,
    Load,
    TorchRendering,
    is_structural,
    rebuild,
    substitute_indices,
    walk,
)
from qc.ir.weights.factored import is_float
from qc.ir.weights.weight import ArraySpec

VECTOR, WINDOW = Index("vector"), Index("window")

DIMS = (8, 4, 2, 1)
"""Weights of a window, from the most desirable."""

MOST_BITS = 12
"""Of windows that are joined: the tables of wider ones outgrow the first cache."""

FIRST_CACHE = 1 << 14
"""Bytes of tables that leave room for x and for the codes in 32 KiB."""

LANES = 8
"""Of vectors of weights: entries that are joined to wider ones cost twice as much (AVX-512)."""

WIDTHS = (32, 64)
"""Columns of a step: so many that a step ends with a byte."""

EXTRACT = "llvm.x86.bmi.bextr.64"

WORD = 64
"""Bits that are loaded together. Shorter words, or single bytes, LLVM would load as vectors, and
take the elements out one by one: half as fast again."""


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
    lookups = lookups_of(decode, shape)
    if lookups is None:
        return None
    values, factor = lookups
    halves = all(
        isinstance(value, Load) and specs[value.array].dtype == torch.float16 for value in values
    )
    found = [w for dim in DIMS if dim <= lanes and (w := in_vectors(values, factor, dim, halves))]
    small = [w for w in found if w.table_bytes <= FIRST_CACHE and widest(w) <= MOST_BITS]
    return next(iter(small + found[-1:]), None)


def lookups_of(decode: Expr, shape: tuple[int, int]) -> tuple[list[Expr], Expr | None] | None:
    """Take a decode expression apart into values that codes look up, and the factor of the row
    that they share; None where it is something else."""
    decode = simplify(decode, dict(zip((ROW, COL), shape, strict=True)))
    addends = split(decode)
    factors = {factor for _, factor in addends}
    if len(factors) != 1 or not all(is_lookup(value) for value, _ in addends):
        return None
    factor = next(iter(factors))
    if factor is not None and COL in factor.indices:
        return None
    return [value for value, _ in addends], factor


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
        if isinstance(each, Code) and each.index == (ROW,) and COL in each.position.indices
    ]


def is_lookup(value: Expr) -> bool:
    """Say whether a value is an element of a table that one code names; arithmetic has no need."""
    codes = own_codes(value)
    loads = [each for each in walk(value) if isinstance(each, Load)]
    return len(codes) == 1 and any(codes[0] in walk(index) for e in loads for index in e.index)


def in_vectors(
    values: Sequence[Expr], factor: Expr | None, dim: int, halves: bool = False
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
class WindowsKernel(AlongInputs):
    """Load `dim` weights at a time, output by output."""

    rule: ClassVar[str] = "windows"
    windows: Windows

    @property
    def work(self) -> float:
        loads = 8 / self.windows.dim * len(self.windows.parts)
        return 1.0 + 3.0 * loads  # counted on AVX2: shift, mask and load for each window

    @property
    def lanes(self) -> int:
        return min(LANES, float_lanes(self.place.target))

    @property
    def width(self) -> int:
        return self.windows.width

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
        super().declare(signature)

    def reader(self, signature: Signature) -> Callable[[Any], WindowReader]:
        count = len(self.windows.parts)
        tables = [self.place.buffer(signature, f"table{number}") for number in range(count)]
        bits = self.place.buffer(signature, "bits")
        return lambda output: WindowReader(self, bits, tables, output)


@dataclass(frozen=True)
class WindowReader:
    """The bits of one row, and the tables."""

    kernel: WindowsKernel
    bits: Any
    tables: list[Any]
    output: Any

    @property
    def windows(self) -> Windows:
        return self.kernel.windows

    def vectors(self, step: Any, count: int) -> Iterator[list[Any]]:
        """Yield one vector for each table."""
        lanes, dim = self.kernel.lanes, self.windows.dim
        words = Words(self, step)
        for first in range(0, count, lanes):
            found: list[list[Any]] = [[] for _ in self.tables]
            for at in range(first, first + lanes, dim):
                for pieces, (number, table) in zip(found, enumerate(self.tables), strict=True):
                    pieces.append(table[span(words.entry(at // dim, number), dim)])
            yield [self.widened(pieces) for pieces in found]

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


class Words:
    """The bits of one step of one row, loaded in words of 64 bits that serve several windows."""

    def __init__(self, reader: WindowReader, step: Any) -> None:
        windows = reader.windows
        self.reader = reader
        size = windows.width // windows.dim * windows.stride // 8
        self.start = T.Bind(step * size)
        prefetch_codes(reader.bits, reader.output, self.start, size)
        self.first = 0
        self.word: Any = None

    def entry(self, vector: int, number: int) -> Any:
        """Return where the entry of a vector of the step starts in a table."""
        windows = self.reader.windows
        part = windows.parts[number]
        bit = vector * windows.stride + part.start
        if self.word is None or bit < self.first or bit + part.bits > self.first + WORD:
            self.first = bit // 8 * 8
            at = span(self.start + self.first // 8, WORD // 8)
            self.word = T.Bind(T.reinterpret("uint64", self.reader.bits[self.reader.output, at]))
        return self.extracted(bit - self.first, part.bits)

    def extracted(self, bit: int, bits: int) -> Any:
        """Return where the entry that some bits of the word name starts in its table.

        Machines scale an index by up to 8 bytes, and some have an instruction that takes bits out
        of a word; larger entries need a shift, which then does both.
        """
        windows = self.reader.windows
        up = max(0, (windows.dim * windows.entry_bytes).bit_length() - 4)
        if not up and self.reader.kernel.place.target.has("bmi1"):
            control = T.uint64(bits << 8 | bit)
            found = pure("uint64", EXTRACT, self.word, control)
        else:
            moved, down = self.word, bit - up
            if down > 0:
                moved = T.shift_right(moved, T.uint64(down))
            elif down < 0:
                moved = T.shift_left(moved, T.uint64(-down))
            found = T.bitwise_and(moved, T.uint64(((1 << bits) - 1) << up))
        return T.Bind(T.Cast("int64", found)) * (windows.dim >> up)


def windows_term(place: Place) -> TermKernel | None:
    """Load weights from tables that windows of a row's bits name."""
    decode = place.format.decode(place.shape, ROW, COL)
    if is_structural(decode) or place.inner == 0:
        return None
    windows = windows_of(decode, place.shape, place.specs, min(LANES, float_lanes(place.target)))
    if windows is None:
        return None
    layouts = factor_layouts(windows.factor, place)
    return None if layouts is None else WindowsKernel(place, windows.factor, layouts, windows)
