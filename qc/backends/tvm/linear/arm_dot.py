"""Integer products of int8 activations and grouped codes, on ARM.

    y = sum over groups of s (sum of q a) x_scale + m x_scale (sum of a)

as in int8_dot and from the same stream, in vectors of 16 bytes: 4 outputs times the 4 inputs of a
quad. The inner sum is exact, by one of three instructions:

    smmla   2 rows times 2 outputs, 8 inputs each: two quads, interleaved by outputs
    sdot    4 outputs, 4 inputs each
    smlal   8 products in int16, added up in pairs at the end of a step: 4 bits of a code at a time,
            of which 8 products, at most 8 * 15 * 127 = 15240, fit

They multiply signed bytes. Codes of up to 7 bits are; those of 8 bits lose 128 before the product,
and the minimum of their group gets it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.codes import Part, StreamReader, joined, nibbles
from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.int8_dot import Int8Stream, Tile, int8_stream
from qc.backends.tvm.linear.int8_row import RowTile
from qc.backends.tvm.linear.layout import BLOCK, QUADS, STEP
from qc.backends.tvm.linear.skeleton import Signature, accumulator
from qc.backends.tvm.linear.term import Place, Products, TermKernel
from qc.backends.tvm.linear.vectors import pure, span, splat

LANES = 4  # outputs of a vector
WIDTH = 16  # bytes of a vector
QUADS_LOADED = 4  # in a vector of activations
WIDE = 8  # bits of the codes that are no signed bytes
MIDDLE = 128

SDOT = "llvm.aarch64.neon.sdot.v4i32.v16i8"
SMMLA = "llvm.aarch64.neon.smmla.v4i32.v16i8"
ADD_NEIGHBOURS = "llvm.aarch64.neon.saddlp.v4i32.v8i16"
ADD_NEIGHBOUR_BYTES = "llvm.aarch64.neon.saddlp.v8i16.v16i8"
ADD_PAIRS = "llvm.aarch64.neon.addp.v4i32"


@dataclass(frozen=True, eq=False)
class ArmStream(Int8Stream):
    """Multiply int8 codes by a stream of codes."""

    rule: ClassVar[str] = "arm_dot"

    @property
    def work(self) -> float:
        target = self.place.target
        return 0.25 if target.has("i8mm") else 0.5 if target.has("asimddp") else 1.0

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        buffer = self.place.buffer(signature, "stream")
        reader = ArmReader(self.stream, buffer, block, self.place.target, LANES)

        def add(row: Any, height: int, sums: Any) -> None:
            if height == 1:
                ArmRowTile(inputs, reader, row, 1).add(sums[0])
                return
            tile = ArmTile(inputs, reader, row, height)
            with T.serial(T.int64(0), T.int64(BLOCK // LANES)) as vector:
                tile.emit_vector(vector * LANES, self.stream.inner // tile.unit, sums)

        return add


def arm_term(place: Place) -> TermKernel | None:
    """Multiply in int8 on ARM where `int8_stream` says so."""
    stream = int8_stream(place) if place.target.has("asimd") else None
    return None if stream is None else ArmStream(place, stream)


@dataclass(frozen=True)
class ArmReader(StreamReader):
    """A stream whose codes are multiplied as signed bytes."""

    @property
    def is_shifted(self) -> bool:
        """Say whether codes lose 128."""
        return self.target.has("asimddp") and self.stream.format.bits_per_code == WIDE

    def minimum(self, head: Any, first: Any, scale: Any) -> Any:
        offset = super().minimum(head, first, scale)
        if not self.is_shifted:
            return offset
        return T.Bind(offset + scale * splat(T.float32(MIDDLE), LANES))

    def signed(self, parts: Sequence[Part]) -> Any:
        """Return the codes of a quad as signed bytes."""
        code = joined(parts, WIDTH)
        if self.is_shifted:
            code = T.bitwise_xor(code, splat(T.uint8(MIDDLE), WIDTH))
        return T.Bind(T.reinterpret("int8x16", code))


@dataclass(frozen=True)
class ArmTile(Tile):
    """The products of `height` rows of x with one block of a weight."""

    reader: ArmReader

    def emit_vector(self, first: Any, units: int, sums: Sequence[Any]) -> None:
        """Add the products of all inputs with the outputs from `first` on to the sums of all rows.

        A tile goes over the block once for each vector of outputs. Where the vector is a variable,
        the sums of the other vectors are in memory: in registers they would be 12 of 32, and what
        the loop works with would be spilled.
        """
        own = [accumulator(LANES, size=LANES) for _ in range(self.height)]
        with T.serial(T.int64(0), T.int64(units)) as unit:
            self.emit_unit_at(unit, own, first)
        for mine, all_sums in zip(own, sums, strict=True):
            at = span(first, LANES)
            T.buffer_store(all_sums, all_sums[at] + mine[span(0, LANES)], [at])

    def emit_unit_at(self, unit: Any, sums: Sequence[Any], first: Any) -> None:
        """Add the products of one unit of inputs with the outputs from `first` on."""
        stream = self.reader.stream
        units = stream.group // self.unit
        head = T.Bind(self.reader.head(T.floordiv(unit, T.int64(units))))
        skipped = T.floormod(unit, T.int64(units)) * (self.unit // STEP * stream.step_bytes)
        codes = T.Bind(head + stream.head_bytes + skipped)
        first_input = T.Bind(unit * self.unit)
        group, rows, at = self.group_of(first_input), range(self.height), span(0, LANES)
        integers = self.emit_integers(codes, first_input, first)
        scale = self.reader.scale(head, first)
        minimum = self.reader.minimum(head, first, scale)
        for r in rows:
            input_scale = self.read(self.inputs.scale, r, group)
            exact = T.Cast("float32x4", integers[r]) * splat(input_scale, LANES)
            total = self.total(r, unit, first_input, input_scale)
            value = sums[r][at] + scale * exact + minimum * splat(total, LANES)
            T.buffer_store(sums[r], value, [at])

    def emit_step(self, codes: Any, first_input: Any, first: Any) -> list[Any]:
        quads = self.reader.quads(codes, first)
        if not self.target.has("asimddp"):
            return self.widened_step(quads, first_input)
        signed = [self.reader.signed(parts) for parts in quads]
        if self.target.has("i8mm") and self.height % 2 == 0:
            return self.matrix_step(signed, first_input)
        return [self.dotted(signed, self.loaded(r, first_input)) for r in range(self.height)]

    def loaded(self, r: int, first_input: Any) -> list[Any]:
        """Load the 32 activations of a step of one row."""
        starts = (first_input + start for start in range(0, STEP, WIDTH))
        return [T.Bind(self.inputs.codes[self.row + r, span(at, WIDTH)]) for at in starts]

    def repeated(self, inputs: Sequence[Any], quad: int) -> Any:
        """Repeat the activations of a quad over a vector."""
        words = T.reinterpret("int32x4", inputs[quad // QUADS_LOADED])
        lane = T.int32(quad % QUADS_LOADED)
        return T.reinterpret("int8x16", T.Shuffle([words], [lane] * LANES))

    def dotted(self, signed: Sequence[Any], inputs: Sequence[Any]) -> Any:
        """Sum with sdot."""
        total = splat(T.int32(0), LANES)
        for quad, code in enumerate(signed):
            total = pure("int32x4", SDOT, total, code, self.repeated(inputs, quad))
        return T.Bind(total)

    def matrix_step(self, signed: Sequence[Any], first_input: Any) -> list[Any]:
        """Sum with smmla, two rows at a time."""
        weights = [
            [interleaved(signed[quad], signed[quad + 1], half) for half in (0, 1)]
            for quad in range(0, QUADS, 2)
        ]
        found: list[Any] = []
        for r in range(0, self.height, 2):
            pair = [self.loaded(r, first_input), self.loaded(r + 1, first_input)]
            totals = [splat(T.int32(0), LANES)] * 2
            for number, halves in enumerate(weights):
                rows = two_rows(pair[0], pair[1], number)
                totals = [
                    pure("int32x4", SMMLA, total, rows, half)
                    for total, half in zip(totals, halves, strict=True)
                ]
            low, high = (T.Bind(total) for total in totals)
            found += [
                T.Bind(T.Shuffle([low, high], indices([0, 1, 4, 5]))),
                T.Bind(T.Shuffle([low, high], indices([2, 3, 6, 7]))),
            ]
        return found

    def widened_step(self, quads: Sequence[Sequence[Part]], first_input: Any) -> list[Any]:
        """Sum in int16, four bits of the codes at a time, then add pairs up."""
        halves = [nibbles(parts, WIDTH) for parts in quads]
        found: list[Any] = []
        for r in range(self.height):
            inputs = self.loaded(r, first_input)
            repeated = [widened(self.repeated(inputs, quad), 0) for quad in range(QUADS)]
            parts = []
            for part in range(len(halves[0])):
                sums = []
                for half in (0, 1):
                    products = [
                        widened(T.reinterpret("int8x16", codes[part]), half) * repeated[quad]
                        for quad, codes in enumerate(halves)
                    ]
                    total = sum(products[1:], products[0])
                    sums.append(pure("int32x4", ADD_NEIGHBOURS, T.Bind(total)))
                whole = pure("int32x4", ADD_PAIRS, *sums)
                parts.append(whole if part == 0 else whole * splat(T.int32(16), LANES))
            found.append(T.Bind(sum(parts[1:], parts[0])))
        return found

    def total(self, r: int, unit: Any, first_input: Any, scale: Any) -> Any:
        if self.unit == self.activation_group:
            return self.read(self.inputs.total, r, unit)
        partial = accumulator(LANES, "int32", LANES)
        with T.serial(T.int64(0), T.int64(self.unit // WIDTH)) as step:
            codes = self.inputs.codes[self.row + r, span(first_input + step * WIDTH, WIDTH)]
            pairs = pure("int16x8", ADD_NEIGHBOUR_BYTES, codes)
            added = partial[span(0, LANES)] + pure("int32x4", ADD_NEIGHBOURS, pairs)
            T.buffer_store(partial, added, [span(0, LANES)])
        integer = pure("int32", "llvm.vector.reduce.add", partial[span(0, LANES)])
        return T.Bind(T.Cast("float32", integer) * scale)


@dataclass(frozen=True)
class ArmRowTile(ArmTile, RowTile):
    """The products of a single row."""


def indices(lanes: Sequence[int]) -> list[Any]:
    """Return the lanes of a shuffle."""
    return [T.int32(lane) for lane in lanes]


def interleaved(low: Any, high: Any, half: int) -> Any:
    """Return 2 outputs times 8 inputs, of two quads of 4 outputs: the first two, or the others."""
    words = [T.reinterpret("int32x4", quad) for quad in (low, high)]
    return T.Bind(
        T.reinterpret(
            "int8x16",
            T.Shuffle(words, indices([2 * half, 4 + 2 * half, 1 + 2 * half, 5 + 2 * half])),
        )
    )


def two_rows(first: Sequence[Any], second: Sequence[Any], number: int) -> Any:
    """Return eight activations of two rows: part `number` of a step."""
    at, half = divmod(number, 2)
    words = [T.reinterpret("int64x2", row[at]) for row in (first, second)]
    return T.reinterpret("int8x16", T.Shuffle(words, indices([half, 2 + half])))


def widened(codes: Any, half: int) -> Any:
    """Return one half of 16 bytes as int16."""
    lanes = T.Shuffle([codes], indices(list(range(8 * half, 8 * half + 8))))
    return T.Cast("int16x8", lanes)
