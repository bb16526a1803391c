"""Products of int8 activations and bit planes by table lookup, on x86.

For each four consecutive inputs a table has the sum of every subset; the four bits of a weight's
plane say which one. One lookup replaces four products, and b bits cost b lookups:

    y = sum over groups of sum_p c_p x_scale (sum of lookups in plane p) + z x_scale (sum of a)

A sum s of four activations, |s| <= 508, is stored as two digits of 5 bits:

    s + 3 = 32 high + (low + 16)    high, low in -16..15

so that the digits of the 8 lookups of 32 inputs add up in bytes, -128..120: one addition a lookup.
The 13 that each lookup is short of is added once a group; the two bit planes of trits, where a
weight is 1 and where it is -1, are subtracted, so that there it cancels. Sums stay exact integers
as long as neither a coefficient nor an activation scale changes, up to 128 inputs in int16.

Sources: T-MAC (arXiv 2407.00088) for tables of four inputs in registers and their transposed
layout; bitnet.cpp (arXiv 2502.11880) for exact sums by splitting the tables' bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.bit_serial_layout import SLOT, PlaneStream, plane_stream_of
from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.int8_dot import MULTIPLY_BYTES, PREFETCH_BYTES
from qc.backends.tvm.linear.layout import BLOCK, QUADS, STEP
from qc.backends.tvm.linear.panels import FLOAT_TILES, add_tile, new_panel, reader_of
from qc.backends.tvm.linear.skeleton import Signature
from qc.backends.tvm.linear.term import Place, Products, TermKernel
from qc.backends.tvm.linear.vectors import (
    float_lanes,
    halves_to_float,
    prefetch,
    pure,
    span,
    splat,
    typed,
)
from qc.ir.target import Target

LOOKUP = {
    16: "llvm.x86.ssse3.pshuf.b.128",
    32: "llvm.x86.avx2.pshuf.b",
    64: "llvm.x86.avx512.pshuf.b.512",
}

RADIX_BITS = 5
SHORT = 13
"""A sum is its digits, high * 32 + low, plus this."""

TABLES_BYTES = 2 * QUADS * SLOT
"""Tables of a step: the low digits of the 8 quads, then the high ones."""

MOST_STEPS = 4
"""Steps that are added in int16: 4 * 8 * (508 + 13) = 16672."""

UNROLLED_CHUNKS = 4
"""Longer groups become loops."""


@dataclass(frozen=True)
class BitSerial(TermKernel):
    """Multiply by lookups; several rows by a block that is decoded to float32 once."""

    rule: ClassVar[str] = "bit_serial"
    place: Place
    stream: PlaneStream

    @property
    def work(self) -> float:
        return 0.7 * self.stream.bit_planes

    def declare(self, signature: Signature) -> None:
        shape = (self.stream.blocks, self.stream.block_bytes)
        self.place.declare(signature, "bit_planes", "uint8", shape, self.stream.repack)

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        inputs.need_values()
        scratch, group = signature.scratch, self.stream.group
        if "tables" not in scratch:
            scratch["tables"] = build_tables(inputs)
        if ("totals", group) not in scratch:
            scratch["totals", group] = build_totals(inputs, group)

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        lanes = float_lanes(self.place.target)
        buffer = self.place.buffer(signature, "bit_planes")
        reader = PlaneReader(self.stream, buffer, block, self.place.target)
        if many:
            read = reader_of(decoded_panel(reader), lanes)

            def add_many(row: Any, height: int, sums: Any) -> None:
                add_tile(inputs.values, self.place.inner, read, lanes, row, height, sums)

            return add_many
        tables, totals = signature.scratch["tables"], signature.scratch["totals", self.stream.group]

        def add(row: Any, height: int, sums: Any) -> None:
            for r in range(height):
                Row(reader, inputs, tables, totals, row + r, sums[r]).emit()

        return add


def bit_serial_term(place: Place) -> TermKernel | None:
    """Look sums up where int8 activations meet bit planes, both in groups of whole steps."""
    activation = place.activation
    if activation is None or activation.bits != 8 or not place.target.has("ssse3"):
        return None
    stream = plane_stream_of(place.format, place.outer, place.inner)
    if stream is None or min(activation.group or STEP, place.inner) % STEP:
        return None
    return BitSerial(place, stream)


# ---------------------------------------------------------------- once a call


def build_tables(inputs: Inputs) -> Any:
    """Emit the tables of all rows, int8[rows, steps * 256], where rows are looked up one by one."""
    most = FLOAT_TILES[inputs.target.vector_bytes]
    steps = inputs.inner // STEP
    shape = (T.int64(most - 1), T.int64(steps * TABLES_BYTES))
    tables = T.alloc_buffer(shape, "int8", layout=None)
    with (
        T.If(inputs.rows < most),
        T.Then(),
        T.serial(T.int64(0), inputs.rows) as row,
        T.serial(T.int64(0), T.int64(steps)) as step,
    ):
        for quad in range(QUADS):
            low, high = digits(subset_sums(inputs, row, step * STEP + 4 * quad))
            at = step * TABLES_BYTES + SLOT * quad
            T.buffer_store(tables, low, [row, span(at, SLOT)])
            T.buffer_store(tables, high, [row, span(at + SLOT * QUADS, SLOT)])
    return tables


def subset_sums(inputs: Inputs, row: Any, first: Any) -> Any:
    """Return the sums int16[16] of all subsets of four activations; bit j of the place: input j."""
    places = T.ramp(T.int16(0), T.int16(1), SLOT)
    found = splat(T.int16(0), SLOT)
    for number in range(4):
        chosen = T.bitwise_and(T.shift_right(places, splat(T.int16(number), SLOT)), 1)
        code = T.Cast("int16", inputs.codes[row, first + number])
        found = found + splat(code, SLOT) * chosen
    return T.Bind(found)


def digits(sums: Any) -> tuple[Any, Any]:
    """Split sums int16[16] into a low and a high digit, int8[16]."""
    moved = T.Bind(sums + splat(T.int16((1 << RADIX_BITS) // 2 - SHORT), SLOT))
    low = T.bitwise_and(moved, splat(T.int16((1 << RADIX_BITS) - 1), SLOT))
    low = low - splat(T.int16((1 << RADIX_BITS) // 2), SLOT)
    high = T.shift_right(moved, splat(T.int16(RADIX_BITS), SLOT))
    return T.Cast(f"int8x{SLOT}", low), T.Cast(f"int8x{SLOT}", high)


def build_totals(inputs: Inputs, group: int) -> Any:
    """Emit float32[rows, groups, 2]: the sum of the inputs of each group of a weight, and what the
    digits of their lookups are short of."""
    assert inputs.format is not None
    most = FLOAT_TILES[inputs.target.vector_bytes]
    groups = -(-inputs.inner // group)
    shape = (T.int64(most - 1), T.int64(2 * groups))
    totals = T.alloc_buffer(shape, "float32", layout=None)
    activation_group = min(inputs.format.group or inputs.inner, inputs.inner)
    with T.If(inputs.rows < most), T.Then(), T.serial(T.int64(0), inputs.rows) as row:
        with T.serial(T.int64(0), T.int64(2 * groups)) as at:
            T.buffer_store(totals, T.float32(0), [row, at])
        with T.serial(T.int64(0), T.int64(inputs.inner // STEP)) as step:
            scale = T.Bind(inputs.scale[row, T.floordiv(step * STEP, T.int64(activation_group))])
            codes = T.Cast(f"int32x{STEP}", inputs.codes[row, span(step * STEP, STEP)])
            whole = T.Cast("float32", pure("int32", "llvm.vector.reduce.add", codes))
            at = T.Bind(T.floordiv(step * STEP, T.int64(group)) * 2)
            T.buffer_store(totals, totals[row, at] + whole * scale, [row, at])
            short = scale * T.float32(SHORT * QUADS)
            T.buffer_store(totals, totals[row, at + 1] + short, [row, at + 1])
    return totals


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class PlaneReader:
    """The stream of one block of outputs."""

    stream: PlaneStream
    buffer: Any
    block: Any
    target: Target

    @property
    def lanes(self) -> int:
        return float_lanes(self.target)

    def bytes_at(self, offset: Any, count: int) -> Any:
        """Load bytes of the stream."""
        return self.buffer[self.block, span(offset, count)]

    def halves(self, head: Any, number: int, first: int) -> Any:
        """Load the coefficients of plane `number`, or behind the last the offsets, as float32."""
        stored = self.bytes_at(head + 2 * (BLOCK * number + first), 2 * self.lanes)
        bits = T.reinterpret(typed("uint16", self.lanes), stored)
        return T.Bind(halves_to_float(bits, self.lanes, self.target))


@dataclass(frozen=True)
class Row:
    """The products of one row of x with one block of a weight, added to float32[16] sums."""

    reader: PlaneReader
    inputs: Inputs
    tables: Any
    totals: Any
    row: Any
    sums: Any

    @property
    def stream(self) -> PlaneStream:
        return self.reader.stream

    @property
    def activation_group(self) -> int:
        assert self.inputs.format is not None
        return min(self.inputs.format.group or self.inputs.inner, self.inputs.inner)

    @property
    def chunk(self) -> int:
        """Inputs whose lookups are added as integers: no scale changes between them."""
        steps = gcd(self.stream.group, self.activation_group, self.stream.inner) // STEP
        return STEP * max(n for n in range(1, MOST_STEPS + 1) if steps % n == 0)

    def emit(self) -> None:
        """Emit all groups."""
        full, rest = divmod(self.stream.inner, self.stream.group)
        with T.serial(T.int64(0), T.int64(full)) as group:
            self.emit_group(group, self.stream.group)
        if rest:
            self.emit_group(T.int64(full), rest)

    def emit_group(self, group: Any, size: int) -> None:
        """Add the products of one group of `size` inputs."""
        stream, lanes = self.stream, self.reader.lanes
        head = T.Bind(group * stream.group_bytes)
        codes = T.Bind(head + stream.head_bytes)
        first_input = T.Bind(group * stream.group)
        total = T.Bind(self.totals[self.row, group * 2])
        short = T.Bind(self.totals[self.row, group * 2 + 1])
        start = T.float32(0) if stream.trits else short
        if stream.signs:  # c (2 b - 1) = 2 c (b - 1/2)
            start = short - total * T.float32(0.5)
        by_plane = [self.started(start) for _ in range(stream.planes)]
        self.emit_chunks(codes, first_input, size, by_plane)
        for first in range(0, BLOCK, lanes):
            at = span(first, lanes)
            value = self.sums[at]
            for plane, scaled in enumerate(by_plane):
                twice = scaled[at] + scaled[at] if stream.signs else scaled[at]
                value = value + self.reader.halves(head, plane, first) * twice
            if stream.offset:
                offset = self.reader.halves(head, stream.planes, first)
                value = value + offset * splat(total, lanes)
            T.buffer_store(self.sums, value, [at])

    def started(self, value: Any) -> Any:
        """Allocate float32[16] that LLVM keeps in registers, all `value`."""
        lanes, found = self.reader.lanes, T.alloc_buffer((BLOCK,), "float32", layout=None)
        for first in range(0, BLOCK, lanes):
            T.buffer_store(found, splat(value, lanes), [span(first, lanes)])
        return found

    def emit_chunks(self, codes: Any, first_input: Any, size: int, by_plane: list[Any]) -> None:
        """Add x_scale times the lookups of each plane, chunk by chunk."""
        count = size // self.chunk
        bytes_of_chunk = self.chunk // STEP * self.stream.step_bytes

        def emit(number: Any) -> None:
            at = T.Bind(codes + number * bytes_of_chunk)
            self.emit_chunk(at, T.Bind(first_input + number * self.chunk), by_plane)

        if count <= UNROLLED_CHUNKS:
            for number in range(count):
                emit(number)
            return
        with T.serial(T.int64(0), T.int64(count)) as number:
            emit(number)

    def emit_chunk(self, codes: Any, first_input: Any, by_plane: list[Any]) -> None:
        """Add x_scale times the lookups of one chunk to the sums of each plane."""
        stream, lanes = self.stream, self.reader.lanes
        for line in range(0, self.chunk // STEP * stream.step_bytes, 64):
            ahead = codes + (PREFETCH_BYTES + line)
            prefetch(T.address_of(self.reader.buffer[self.reader.block, ahead]))
        group = T.floordiv(first_input, T.int64(self.activation_group))
        scale = T.Bind(self.inputs.scale[self.row, group])
        for number in range(len(stream.bundles)):
            for plane, integers in self.integers(number, codes, first_input):
                for first in range(0, BLOCK, lanes):
                    at = span(first, lanes)
                    value = T.Cast(typed("float32", lanes), part(integers, first, lanes))
                    more = by_plane[plane][at] + value * splat(scale, lanes)
                    T.buffer_store(by_plane[plane], more, [at])

    def integers(self, number: int, codes: Any, first_input: Any) -> list[tuple[int, Any]]:
        """Return the planes of a bundle and their sums int16[16] over a chunk."""
        bundle = self.stream.bundles[number]
        start = codes + bundle.start * 64
        lookups = Lookups(self.reader, self.tables, self.row, len(bundle))
        found = [
            lookups.sums(start + step * self.stream.step_bytes, first_input + step * STEP)
            for step in range(self.chunk // STEP)
        ]
        columns = [T.Bind(sum(column[1:], column[0])) for column in zip(*found, strict=True)]
        if self.stream.trits:
            return [(number, T.Bind(columns[0] - columns[1]))]
        return list(zip(bundle, columns, strict=True))


@dataclass(frozen=True)
class Lookups:
    """The lookups of one bundle of `planes` bit planes, for one row of x.

    A vector has a slot of 16 bytes in each 128-bit lane, where its instruction looks up in a table
    of its own: first the planes, then the quads.
    """

    reader: PlaneReader
    tables: Any
    row: Any
    planes: int

    @property
    def width(self) -> int:
        """Bytes of a vector."""
        return self.reader.target.vector_bytes

    def sums(self, codes: Any, first_input: Any) -> list[Any]:
        """Return the sums int16[16] of each plane over 32 inputs."""
        tables = T.Bind(first_input * (TABLES_BYTES // STEP))
        slots = self.width // SLOT
        separate = max(1, self.planes // slots)  # vectors that are of different planes
        found: list[list[Any]] = [[[], []] for _ in range(separate)]
        for vector in range(QUADS // 2 * self.planes // slots):
            patterns = T.Bind(self.reader.bytes_at(codes + vector * self.width, self.width))
            low = T.bitwise_and(patterns, splat(T.uint8(15), self.width))
            high = T.shift_right(patterns, splat(T.uint8(4), self.width))
            quad = vector * slots // self.planes
            for half, index in enumerate((T.Bind(low), T.Bind(high))):
                for digit in range(2):
                    place = (digit * QUADS + half * QUADS // 2 + quad) * SLOT
                    values = pure(
                        f"int8x{self.width}", LOOKUP[self.width],
                        self.table(tables + place), index,
                    )  # fmt: skip
                    found[vector % separate][digit].append(values)
        together = self.planes // separate
        return [
            value
            for digits_of in found
            for value in joined([self.added(each, together) for each in digits_of], together)
        ]

    def table(self, place: Any) -> Any:
        """Load the tables of the quads of a vector, each repeated for the planes."""
        slots = self.width // SLOT
        quads = max(1, slots // self.planes)
        loaded = self.tables[self.row, span(place, quads * SLOT)]
        if quads == slots:
            return loaded
        repeated = slots // quads
        order = [n for q in range(quads) for n in [*slot(q)] * repeated]
        # TVM wants no more lanes out than in
        return T.Shuffle([T.Bind(loaded)] * repeated, [T.int32(n) for n in order])

    def added(self, values: Sequence[Any], planes: int) -> Any:
        """Add vectors of digits, and in them the lanes of the same plane: int8[planes * 16]."""
        whole = T.Bind(sum(values[1:], values[0]))
        each = planes * SLOT
        if each == self.width:
            return whole
        parts = [
            shuffled(whole, range(start, start + each)) for start in range(0, self.width, each)
        ]
        return T.Bind(sum(parts[1:], parts[0]))


def joined(both: list[Any], planes: int) -> list[Any]:
    """Return 32 high + low as int16[16] for each of `planes`, from digits int8[planes * 16]."""
    size = planes * SLOT
    weights = T.reinterpret(f"uint8x{size}", splat(T.int16((1 << RADIX_BITS) << 8 | 1), size // 2))
    halves = []
    for start in (0, SLOT // 2):  # as the instructions interleave, within slots
        order = [
            plane * SLOT + start + n + digit * size
            for plane in range(planes)
            for n in range(SLOT // 2)
            for digit in range(2)
        ]
        pairs = T.Shuffle(both, [T.int32(n) for n in order])
        halves.append(T.Bind(pure(f"int16x{size // 2}", MULTIPLY_BYTES[size], weights, pairs)))
    eight = range(SLOT // 2)
    return [
        T.Shuffle(
            halves,
            [T.int32(half * size // 2 + plane * 8 + n) for half in range(2) for n in eight],
        )
        for plane in range(planes)
    ]


def slot(number: int) -> range:
    """Return the bytes of a slot."""
    return range(number * SLOT, (number + 1) * SLOT)


def shuffled(vector: Any, order: Sequence[int]) -> Any:
    """Return some lanes of a vector."""
    return T.Shuffle([vector], [T.int32(n) for n in order])


def part(vector: Any, first: int, lanes: int) -> Any:
    """Return `lanes` lanes of int16[16]."""
    return vector if lanes == BLOCK else shuffled(vector, range(first, first + lanes))


# ---------------------------------------------------------------- several rows


def decoded_panel(reader: PlaneReader) -> Any:
    """Emit the decoding of a block; return the panel float32[inner, 16]."""
    stream, lanes = reader.stream, reader.lanes
    panel = new_panel(stream.inner)
    with T.serial(T.int64(0), T.int64(stream.inner // STEP)) as step:
        steps = T.int64(stream.group // STEP)
        head = T.Bind(T.floordiv(step, steps) * stream.group_bytes)
        inside = T.floormod(step, steps) * stream.step_bytes
        codes = T.Bind(head + stream.head_bytes + inside)
        for first in range(0, BLOCK, lanes):
            factors = [reader.halves(head, plane, first) for plane in range(stream.planes)]
            base = panel_base(reader, head, factors, first)
            for number in range(QUADS // 2):
                patterns = slots_of(reader, codes, number, first)
                for bit in range(8):
                    value = base
                    for factor, digit in zip(factors, panel_digits(stream, patterns, bit, lanes),
                                             strict=True):  # fmt: skip
                        value = value + factor * T.Cast(typed("float32", lanes), digit)
                    column = 4 * number + bit % 4 + bit // 4 * (STEP // 2)
                    at = span((step * STEP + column) * BLOCK + first, lanes)
                    T.buffer_store(panel, value, [at])
    return panel


def panel_base(reader: PlaneReader, head: Any, factors: list[Any], first: int) -> Any:
    """Return what the weights of a group have beside factor * digit."""
    base = splat(T.float32(0), reader.lanes)
    if reader.stream.offset:
        base = reader.halves(head, reader.stream.planes, first)
    if reader.stream.signs:
        base = base - sum(factors[1:], factors[0])
    return T.Bind(base)


def slots_of(reader: PlaneReader, codes: Any, number: int, first: int) -> list[Any]:
    """Load slot `number` of every bit plane as int32, for `lanes` outputs."""
    found = []
    for bundle in reader.stream.bundles:
        for plane in range(len(bundle)):
            at = 64 * bundle.start + SLOT * (number * len(bundle) + plane) + first
            stored = reader.bytes_at(codes + at, reader.lanes)
            found.append(T.Bind(T.Cast(typed("int32", reader.lanes), stored)))
    return found


def panel_digits(stream: PlaneStream, patterns: list[Any], bit: int, lanes: int) -> list[Any]:
    """Return the factors of the coefficients, from the patterns of all bit planes."""
    bits = [
        T.bitwise_and(T.shift_right(each, splat(T.int32(bit), lanes)), splat(T.int32(1), lanes))
        for each in patterns
    ]
    if stream.signs:
        return [each + each for each in bits]
    if stream.trits:
        return [up - down for up, down in zip(bits[::2], bits[1::2], strict=True)]
    return bits
