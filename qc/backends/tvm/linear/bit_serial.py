"""Products of int8 activations and bit planes by table lookup.

For each four consecutive inputs a table has the sum of every subset; the four bits of a weight's
plane say which one. One lookup replaces four products, and b bits cost b lookups:

    y = sum over groups of sum_p c_p x_scale (sum of lookups in plane p) + z x_scale (sum of a)

A sum s of four activations, |s| <= 508, is stored as two digits of 5 bits, so that the digits of
the 8 lookups of 32 inputs add up in bytes: one addition a lookup.

    bits     s = 32 high + low + 13 in the first 16 inputs, digits -16 to 15
             s = 32 high + low - 13 in the others, digits -15 to 16: a sum of 8 is exact, below 125
    trits    s = 32 high + low - 512, digits 0 to 31: the two bit planes, where a weight is 1 and
             where it is -1, are subtracted

Sums stay exact integers as long as neither a coefficient nor an activation scale changes, up to 128
inputs in int16.

Sources: T-MAC (arXiv 2407.00088) for tables of four inputs in registers and their transposed
layout; bitnet.cpp (arXiv 2502.11880) for exact sums by splitting the tables' bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.bit_serial_layout import (
    PLANE_BYTES,
    SLOT,
    PlaneStream,
    plane_stream_of,
)
from qc.backends.tvm.linear.bit_serial_reader import PlaneReader, decoded_panel, shuffled
from qc.backends.tvm.linear.byte_lookup import byte_lookup, every_other, pairs_of_products
from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.int8_dot import PREFETCH_BYTES
from qc.backends.tvm.linear.layout import BLOCK, QUADS, STEP
from qc.backends.tvm.linear.panels import FLOAT_TILES, add_tile, reader_of
from qc.backends.tvm.linear.skeleton import Signature
from qc.backends.tvm.linear.term import Place, Products, TermKernel
from qc.backends.tvm.linear.vectors import (
    float_lanes,
    lanes_of,
    prefetch,
    pure,
    span,
    splat,
    typed,
)
from qc.ir.target import Target

RADIX = 32
SHIFTS = {False: ((3, 16), (28, 15)), True: ((512, 0), (512, 0))}
"""For bits and for trits, in the first and the last quads of a step: what is added to a sum before
it is split, and what is then subtracted from the low digit."""

TABLES_BYTES = 2 * QUADS * SLOT
"""Tables of a step: the low digits of the 8 quads, then the high ones."""

MOST_STEPS = 4
"""Steps that are added in int16: 128 * 127 = 16256."""


@dataclass(frozen=True)
class BitSerial(TermKernel):
    """Multiply by lookups; several rows by a block that is decoded to float32 once."""

    rule: ClassVar[str] = "bit_serial"
    place: Place
    stream: PlaneStream

    @property
    def work(self) -> float:
        return 0.15 + 0.42 * self.stream.bit_planes  # counted on AVX2, for groups of 32

    def declare(self, signature: Signature) -> None:
        shape = (self.stream.blocks, self.stream.block_bytes)
        self.place.declare(signature, "bit_planes", "uint8", shape, self.stream.repack)

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        inputs.need_values()
        scratch, group = signature.scratch, self.stream.group
        if ("tables", self.stream.trits) not in scratch:
            scratch["tables", self.stream.trits] = build_tables(inputs, self.stream.trits)
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
        tables = signature.scratch["tables", self.stream.trits]
        totals = signature.scratch["totals", self.stream.group]

        def add(row: Any, height: int, sums: Any) -> None:
            for r in range(height):
                Row(reader, inputs, tables, totals, row + r, sums[r]).emit()

        return add


def bit_serial_term(place: Place) -> TermKernel | None:
    """Look sums up where int8 activations meet bit planes, both in groups of whole steps."""
    activation = place.activation
    if activation is None or activation.bits != 8 or byte_lookup(place.target) is None:
        return None
    stream = plane_stream_of(place.format, place.outer, place.inner)
    if stream is None or min(activation.group or STEP, place.inner) % STEP:
        return None
    return BitSerial(place, stream)


# ---------------------------------------------------------------- once a call


def build_tables(inputs: Inputs, trits: bool) -> Any:
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
        for half, (shift, least) in enumerate(SHIFTS[trits]):
            with T.serial(T.int64(0), T.int64(QUADS // 2)) as number:
                quad = number + half * (QUADS // 2)
                sums = subset_sums(inputs, row, step * STEP + quad * 4)
                low, high = digits(sums, shift, least)
                at = step * TABLES_BYTES + quad * SLOT
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


def digits(sums: Any, shift: int, least: int) -> tuple[Any, Any]:
    """Split sums int16[16] into a low and a high digit, int8[16]."""
    moved = T.Bind(sums + splat(T.int16(shift), SLOT))
    low = T.bitwise_and(moved, splat(T.int16(RADIX - 1), SLOT)) - splat(T.int16(least), SLOT)
    high = T.shift_right(moved, splat(T.int16(RADIX.bit_length() - 1), SLOT))
    return T.Cast(f"int8x{SLOT}", low), T.Cast(f"int8x{SLOT}", high)


def build_totals(inputs: Inputs, group: int) -> Any:
    """Emit float32[rows, groups]: the sum of the inputs of each group of a weight."""
    assert inputs.format is not None
    most = FLOAT_TILES[inputs.target.vector_bytes]
    groups = -(-inputs.inner // group)
    totals = T.alloc_buffer((T.int64(most - 1), T.int64(groups)), "float32", layout=None)
    activation_group = min(inputs.format.group or inputs.inner, inputs.inner)
    with T.If(inputs.rows < most), T.Then(), T.serial(T.int64(0), inputs.rows) as row:
        with T.serial(T.int64(0), T.int64(groups)) as at:
            T.buffer_store(totals, T.float32(0), [row, at])
        with T.serial(T.int64(0), T.int64(inputs.inner // STEP)) as step:
            scale = T.Bind(inputs.scale[row, T.floordiv(step * STEP, T.int64(activation_group))])
            codes = T.Cast(f"int32x{STEP}", inputs.codes[row, span(step * STEP, STEP)])
            whole = T.Cast("float32", pure("int32", "llvm.vector.reduce.add", codes))
            at = T.Bind(T.floordiv(step * STEP, T.int64(group)))
            T.buffer_store(totals, totals[row, at] + whole * scale, [row, at])
    return totals


# ---------------------------------------------------------------- row by row


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
        total = T.Bind(self.totals[self.row, group])
        # c (2 b - 1) = 2 c (b - 1/2)
        start = total * T.float32(-0.5) if stream.signs else T.float32(0)
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

        if count == 1:
            emit(0)
            return
        # a loop, however short: LLVM mixes unrolled chunks and spills, a fourth slower
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
        for plane, integers in enumerate(self.integers(codes, first_input)):
            for number, value in enumerate(widened(integers, lanes, self.reader.target)):
                at = span(number * lanes, lanes)
                value = T.Cast(typed("float32", lanes), value)
                T.buffer_store(
                    by_plane[plane], by_plane[plane][at] + value * splat(scale, lanes), [at]
                )

    def integers(self, codes: Any, first_input: Any) -> list[list[Any]]:
        """Return the sums of each plane over a chunk: int16[16], in vectors of 16 or 8."""
        steps = [
            Lookups(
                self.reader,
                self.tables,
                self.row,
                T.Bind((first_input + step * STEP) * (TABLES_BYTES // STEP)),
                codes + step * self.stream.step_bytes,
            ).sums()
            for step in range(self.chunk // STEP)
        ]
        return [
            [T.Bind(sum(parts[1:], parts[0])) for parts in zip(*of_plane, strict=True)]
            for of_plane in zip(*steps, strict=True)
        ]


@dataclass(frozen=True)
class Lookups:
    """The lookups of one step of all planes, for one row of x.

    A vector has one pattern or several, of quads that follow each other; or half a pattern.
    """

    reader: PlaneReader
    tables: Any
    row: Any
    first_table: Any
    codes: Any

    @property
    def stream(self) -> PlaneStream:
        return self.reader.stream

    @property
    def width(self) -> int:
        """Bytes of a vector."""
        return self.reader.target.vector_bytes

    def sums(self) -> list[list[Any]]:
        """Return the sums of each plane: int16[16], in vectors of 16 or 8."""
        pairs = [bundle for bundle in self.stream.bundles if len(bundle) == 2]
        alone = [bundle for bundle in self.stream.bundles if len(bundle) == 1]
        found = []
        for low, high in self.digits(pairs, 2):
            if self.stream.trits:
                found.append(self.differences(low, high))
            else:
                found += [self.combined(low, high, plane) for plane in range(2)]
        for low, high in self.digits(alone, 1):
            found.append(self.combined_alone(low, high))
        return found

    def digits(self, bundles: Sequence[range], planes: int) -> list[tuple[list[Any], list[Any]]]:
        """Look up in bundles that share tables; return the sums of low and of high digits of each:
        int8[planes * 16] or several of them, in vectors."""
        if not bundles:
            return []
        slots = self.width // SLOT
        separate = max(1, planes // slots)  # vectors of a pattern
        found: list[Any] = [[[None] * separate for _ in range(2)] for _ in bundles]
        for vector in range(QUADS // 2 * planes // slots):
            patterns = [self.patterns(bundle, vector) for bundle in bundles]
            quad = vector * slots // planes
            for half in range(2):
                for digit in range(2):
                    table = self.table(digit * QUADS + half * QUADS // 2 + quad, planes)
                    for sums, pattern in zip(found, patterns, strict=True):
                        value = self.looked_up(table, pattern[half])
                        known = sums[digit][vector % separate]
                        more = value if known is None else known + value
                        sums[digit][vector % separate] = T.Bind(more)
        return [(low, high) for low, high in found]

    def patterns(self, bundle: range, vector: int) -> tuple[Any, Any]:
        """Load patterns: of the first 16 inputs, and of the others."""
        at = self.codes + (bundle.start * PLANE_BYTES + vector * self.width)
        both = T.Bind(self.reader.bytes_at(at, self.width))
        low = T.bitwise_and(both, splat(T.uint8(15), self.width))
        return T.Bind(low), T.Bind(T.shift_right(both, splat(T.uint8(4), self.width)))

    def table(self, number: int, planes: int) -> Any:
        """Load the tables from `number` on for a vector, each repeated for the planes."""
        slots = self.width // SLOT
        quads = max(1, slots // planes)
        loaded = self.tables[self.row, span(self.first_table + number * SLOT, quads * SLOT)]
        if quads == slots:
            return T.Bind(loaded)
        repeated = slots // quads
        order = [SLOT * quad + n for quad in range(quads) for n in [*range(SLOT)] * repeated]
        # TVM wants no more lanes out than in
        return T.Bind(T.Shuffle([T.Bind(loaded)] * repeated, [T.int32(n) for n in order]))

    def looked_up(self, table: Any, pattern: Any) -> Any:
        """Look a vector of patterns up."""
        lookup = byte_lookup(self.reader.target)
        assert lookup is not None
        return lookup(table, pattern)

    def differences(self, low: list[Any], high: list[Any]) -> list[Any]:
        """Return 32 high + low of the even bytes minus that of the odd ones."""
        return [
            T.Bind(
                self.weighed(unsigned_by(a, 1, -1)) + self.weighed(unsigned_by(b, RADIX, -RADIX))
            )
            for a, b in zip(
                map(self.whole_pattern, low), map(self.whole_pattern, high), strict=True
            )
        ]

    def combined(self, low: list[Any], high: list[Any], plane: int) -> list[Any]:
        """Return 32 high + low of one of two planes that lie side by side."""
        found = []
        for a, b in zip(map(self.whole_pattern, low), map(self.whole_pattern, high), strict=True):
            size = lanes_of(a)
            order = [
                SLOT * lane + 8 * plane + n + size * digit
                for lane in range(size // SLOT)
                for n in range(8)
                for digit in range(2)
            ]
            found.append(T.Bind(self.weighed(by_unsigned(shuffled([a, b], order)))))
        return found

    def combined_alone(self, low: list[Any], high: list[Any]) -> list[Any]:
        """Return 32 high + low of a plane that lies alone."""
        (a,), (b,) = low, high
        if self.width == SLOT:
            orders = [[8 * half + n + SLOT * d for n in range(8) for d in range(2)]
                      for half in range(2)]  # fmt: skip
            return [T.Bind(self.weighed(by_unsigned(shuffled([a, b], order)))) for order in orders]
        lanes = [
            shuffled([a, b], [start + SLOT * lane + n for start in (0, self.width)
                              for n in range(SLOT)])
            for lane in range(self.width // SLOT)
        ]  # fmt: skip
        both = T.Bind(sum(lanes[1:], lanes[0]))
        order = [n + SLOT * digit for n in range(SLOT) for digit in range(2)]
        return [T.Bind(self.weighed(by_unsigned(shuffled([both], order))))]

    def weighed(self, operands: tuple[Any, Any]) -> Any:
        """Multiply unsigned by signed bytes and add neighbours: int16."""
        return pairs_of_products(*operands, self.reader.target)

    def whole_pattern(self, sums: Any) -> Any:
        """Add the patterns of several quads in a vector of 64 bytes."""
        if self.width <= 2 * SLOT:
            return sums
        halves = [shuffled([sums], range(start, start + 32)) for start in (0, 32)]
        return T.Bind(halves[0] + halves[1])


def by_unsigned(pairs: Any) -> tuple[Any, Any]:
    """Weigh signed bytes by 1 and 32, in turns."""
    size = lanes_of(pairs)
    weights = splat(T.int16(RADIX << 8 | 1), size // 2)
    return T.reinterpret(f"uint8x{size}", weights), pairs


def unsigned_by(pairs: Any, first: int, second: int) -> tuple[Any, Any]:
    """Weigh bytes, as unsigned, by two small numbers in turns."""
    size = lanes_of(pairs)
    weights = splat(T.int16(second << 8 | first & 255), size // 2)
    return T.reinterpret(f"uint8x{size}", pairs), T.reinterpret(f"int8x{size}", weights)


def widened(integers: list[Any], lanes: int, target: Target) -> list[Any]:
    """Return int16[16] in the order of the layout as int32, in the order of the outputs."""
    found = [
        T.Bind(every_other(value, odd, target))  # the even ones are outputs 0 to 7
        for odd in (False, True)
        for value in integers
    ]
    return [shuffled(found, range(lanes))] if lanes == BLOCK else found
