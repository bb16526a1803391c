"""Weights that windows of a row's bits name in tables of float16 values that registers hold.

As in `windows`, every `dim` consecutive weights of a row are entries of stored tables, named by
windows of bits. Here the index of an entry is computed in lanes of 16 bits, for 32 windows at once:

    w[row, v dim + p] = factor[row] sum over b of table[index_p(bits of row at v stride + b)]

so that a hash (trellises) or a code of 6 bits costs a few instructions for 32 weights, and no load.
AVX-512 looks words up in 64 entries by one instruction. Two bytes looked up 16 entries at a time
(AVX2), and larger tables in several parts, took longer than loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.along_inputs import AlongInputs, factor_layouts, prefetch_codes
from qc.backends.tvm.linear.bit_serial_reader import shuffled
from qc.backends.tvm.linear.skeleton import Signature
from qc.backends.tvm.linear.term import Place, TermKernel, held
from qc.backends.tvm.linear.vectors import halves_to_float, pure, span, splat
from qc.backends.tvm.linear.windows import (
    DIMS,
    LANES,
    WINDOW,
    Window,
    Windows,
    in_vectors,
    lookups_of,
    windows_of,
)
from qc.ir.weights.expression import COL, ROW, Arith, Const, Expr, Load, is_structural

AT_ONCE = 32
"""Windows whose entries are looked up together."""

CHUNK = 16
"""Bytes inside which x86 moves bytes anywhere."""

LANE = 8
"""Windows of a chunk: eight of them end with a byte."""

WORD = 16
"""Bits of a window and of what is computed with it."""

PADDING = 64
"""Bytes behind the last row that the last step may read."""

PERMUTE = "llvm.x86.avx512.vpermi2var.hi.512"

PERMUTED = 64
"""Entries that one permutation looks words up in, from two registers."""

SIZE = 64
"""Bytes of a register."""

MOST_TABLES = 4
"""Tables that a quarter of the registers hold."""

FEWEST_LOADS = 4
"""Weights that one load gives where `windows` is faster."""


@dataclass(frozen=True)
class Table:
    """Entries of a stored float16 array along one axis (None), at fixed places of the others."""

    array: str
    place: tuple[int | None, ...]

    def read(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the entries, filled up with zeros: f16[64]."""
        values = arrays[self.array][tuple(slice(None) if p is None else p for p in self.place)]
        return held(torch.nn.functional.pad(values, (0, PERMUTED - len(values))))

    def load(self, buffer: Any) -> list[Any]:
        """Load the two registers of a table."""
        half = PERMUTED // 2
        found = [buffer[span(first, half)] for first in (0, half)]
        return [T.Bind(T.reinterpret("int16x32", each)) for each in found]


@dataclass(frozen=True)
class Lookup:
    """An entry of a table, by an index that is computed from a window."""

    table: Table
    index: Expr


# ---------------------------------------------------------------- computing with words


def bound(expr: Expr, window: int) -> int | None:
    """Return the largest value of an index that is computed in 16 bits, from windows of `window`
    bits; None where its 16 bits are not its value."""
    match expr:
        case Const(int(value)):
            return value if 0 <= value < 1 << WORD else None
        case Arith("and", left, right):
            known = [b for b in (bound(left, window), bound(right, window)) if b is not None]
            return min(known) if known else None
        case Arith("shr", left, Const(int(places))):
            inner = bound(left, window)
            return None if inner is None else inner >> places
        case Arith("add" | "mul" as kind, left, right):
            both = bound(left, window), bound(right, window)
            if both[0] is None or both[1] is None:
                return None
            value = both[0] + both[1] if kind == "add" else both[0] * both[1]
            return value if value < 1 << WORD else None
    return (1 << window) - 1 if expr == WINDOW else None


def is_computable(expr: Expr, window: int) -> bool:
    """Say whether 16 bits are enough to compute an index: what is shifted down is known whole."""
    match expr:
        case Arith("add" | "sub" | "mul" | "and" | "or", left, right):
            return is_computable(left, window) and is_computable(right, window)
        case Arith("shr", left, Const(int(places))):
            whole = bound(left, window) is not None
            return whole and 0 <= places < WORD and is_computable(left, window)
        case Const(value):
            return isinstance(value, int)
    return expr == WINDOW


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "and": T.bitwise_and,
    "or": T.bitwise_or,
    "shr": T.shift_right,
}


def computed(expr: Expr, window: Any) -> Any:
    """Render an index in lanes of 16 bits."""
    match expr:
        case Const(int(value)):
            return splat(T.uint16(value & 0xFFFF), AT_ONCE)
        case Arith(kind, left, right):
            return OPERATIONS[kind](computed(left, window), computed(right, window))
    return window


# ---------------------------------------------------------------- the kernel


@dataclass(frozen=True, eq=False)
class WordTables(AlongInputs):
    """Look weights up in registers, output by output."""

    rule: ClassVar[str] = "word_tables"
    windows: Windows
    lookups: tuple[tuple[Lookup, ...], ...]
    """By window and place."""

    @property
    def work(self) -> float:
        return 1.0 + len(self.lookups)  # measured on Cascade Lake, in units of two cycles

    @property
    def width(self) -> int:
        return AT_ONCE * self.windows.dim

    @property
    def tables(self) -> list[Table]:
        """The tables, each once."""
        return list(dict.fromkeys(one.table for lookups in self.lookups for one in lookups))

    def declare(self, signature: Signature) -> None:
        rows, row_bytes = self.place.specs[self.windows.array].shape
        padded = rows + -(-PADDING // max(1, row_bytes))
        repack = partial(self.padded, padded)
        self.place.declare(signature, "bits", "uint8", (padded, row_bytes), repack)
        for number, table in enumerate(self.tables):
            self.place.declare(signature, f"table{number}", "float16", (PERMUTED,), table.read)
        super().declare(signature)

    def padded(self, rows: int, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the bits as they are stored, and zeros behind them."""
        bits = arrays[self.windows.array]
        return held(torch.nn.functional.pad(bits, (0, 0, 0, rows - len(bits))))

    def reader(self, signature: Signature) -> Callable[[Any], WordReader]:
        bits = self.place.buffer(signature, "bits")
        loaded = {
            table: table.load(self.place.buffer(signature, f"table{number}"))
            for number, table in enumerate(self.tables)
        }
        return lambda output: WordReader(self, bits, loaded, output)


@dataclass(frozen=True)
class WordReader:
    """The bits of one row, and the tables in registers."""

    kernel: WordTables
    bits: Any
    tables: Mapping[Table, list[Any]]
    output: Any

    def vectors(self, step: Any, count: int) -> Iterator[list[Any]]:
        """Yield the float32 vectors of a step."""
        windows = self.kernel.windows
        size = AT_ONCE * windows.stride // 8
        start = T.Bind(step * size)
        prefetch_codes(self.bits, self.output, start, size)
        found = [
            self.halves(self.words(start, part), lookups)
            for part, lookups in zip(windows.parts, self.kernel.lookups, strict=True)
        ]
        lanes = self.kernel.lanes
        for first in range(0, count, lanes):
            yield [self.widened(halves, first) for halves in found]

    def words(self, start: Any, part: Window) -> Any:
        """Return the windows of a step, one in each lane of 16 bits."""
        stride, begin, chunks = self.kernel.windows.stride, part.start // 8, AT_ONCE // LANE
        places = [part.start % 8 + number * stride for number in range(LANE)]
        order = [
            place // 8 + byte if 8 * byte < place % 8 + part.bits else CHUNK * chunks
            for place in places
            for byte in range(2)
        ]
        loaded = [
            T.Bind(self.bits[self.output, span(start + (begin + stride * number), CHUNK)])
            for number in range(chunks)
        ]
        moved = [
            CHUNK * number + byte if byte < CHUNK else byte
            for number in range(chunks)
            for byte in order
        ]
        bytes = shuffled([*loaded, splat(T.uint8(0), CHUNK)], moved)
        ups = [1 << (WORD - part.bits - place % 8) for place in places] * chunks
        factors = shuffled([T.uint16(up) for up in ups], range(AT_ONCE))
        words = T.reinterpret(f"uint16x{AT_ONCE}", bytes) * factors
        return T.Bind(T.shift_right(words, splat(T.uint16(WORD - part.bits), AT_ONCE)))

    def halves(self, words: Any, lookups: tuple[Lookup, ...]) -> list[Any]:
        """Return the float16 bits of all weights of a step, in order, for one window."""
        found = []
        for lookup in lookups:
            index = T.reinterpret("int16x32", computed(lookup.index, words))
            low, high = self.tables[lookup.table]
            bits = T.Bind(pure("int16x32", PERMUTE, low, index, high))
            found.append(T.reinterpret(f"uint16x{AT_ONCE}", bits))
        dim = len(found)
        if dim == 1:
            return found
        weights = [(n % dim * AT_ONCE + n // dim) for n in range(AT_ONCE * dim)]
        return [
            T.Bind(shuffled(found, weights[first : first + AT_ONCE]))
            for first in range(0, len(weights), AT_ONCE)
        ]

    def widened(self, halves: list[Any], first: int) -> Any:
        """Widen the weights from `first` on to a vector of float32."""
        lanes = self.kernel.lanes
        number, at = divmod(first, AT_ONCE)
        bits = T.Bind(shuffled([halves[number]], range(at, at + lanes)))
        return T.Bind(halves_to_float(bits, lanes, self.kernel.place.target))


def word_tables_term(place: Place) -> TermKernel | None:
    """Look weights up in tables of float16 values that registers hold."""
    decode = place.format.decode(place.shape, ROW, COL)
    wide = place.target.vector_bytes == SIZE and place.target.has("avx512bw")
    if not wide or is_structural(decode) or place.inner < AT_ONCE:
        return None
    found = lookups_of(decode, place.shape)
    if found is None:
        return None
    values, factor = found
    shortest = (in_vectors(values, factor, dim) for dim in sorted(DIMS))
    windows = next((each for each in shortest if each is not None), None)
    layouts = factor_layouts(factor, place)
    if windows is None or layouts is None or not all(fits(windows, part) for part in windows.parts):
        return None
    loaded = windows_of(decode, place.shape, place.specs, LANES)
    if loaded is not None and loaded.dim >= FEWEST_LOADS:
        return None
    lookups = tuple(
        tuple(lookup_of(value, part.bits, place) for value in part.values) for part in windows.parts
    )
    known = tuple(tuple(one for one in each if one is not None) for each in lookups)
    if known != lookups or len({one.table for each in known for one in each}) > MOST_TABLES:
        return None
    return WordTables(place, factor, layouts, windows, known)


def fits(windows: Windows, part: Window) -> bool:
    """Say whether eight windows lie in 16 bytes, and each in 16 bits from the byte it starts in."""
    places = [part.start % 8 + number * windows.stride for number in range(LANE)]
    return places[-1] + part.bits <= 8 * CHUNK and all(p % 8 + part.bits <= WORD for p in places)


def lookup_of(value: Expr, bits: int, place: Place) -> Lookup | None:
    """View a value over WINDOW as an entry of a float16 array; None where it is something else."""
    if not isinstance(value, Load) or place.specs[value.array].dtype != torch.float16:
        return None
    moving = [axis for axis, index in enumerate(value.index) if WINDOW in index.indices]
    fixed = [each for each in value.index if isinstance(each, Const)]
    if len(moving) != 1 or len(fixed) + 1 != len(value.index):
        return None
    axis = moving[0]
    index, entries = value.index[axis], place.specs[value.array].shape[axis]
    largest = bound(index, bits)
    if not is_computable(index, bits) or largest is None or largest >= entries:
        return None
    if entries > PERMUTED:
        return None
    at = tuple(int(each.value) if isinstance(each, Const) else None for each in value.index)
    return Lookup(Table(value.array, at), index)
