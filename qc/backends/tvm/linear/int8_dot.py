"""Integer products of int8 activations and grouped codes, on x86.

    y = sum over groups of s (sum of q a) x_scale + m x_scale (sum of a)

with unsigned codes q, int8 activations a, weight scales s and minima m. The inner sum is exact:
with VNNI in int32; without, four bits of the code at a time in int16, where 8 products of pairs,
at most 8 * 2 * 15 * 127 = 30480, fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.codes import StreamReader, joined, nibbles
from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.layout import BLOCK, QUADS, STEP, Stream, stream_of
from qc.backends.tvm.linear.skeleton import Signature, accumulator
from qc.backends.tvm.linear.stream_float import declare_stream
from qc.backends.tvm.linear.term import Place, Products, TermKernel
from qc.backends.tvm.linear.vectors import float_lanes, prefetch, pure, span, splat
from qc.ir.target import Target

INT8_TILES = {16: 4, 32: 6, 64: 8}
"""Rows of x that share unpacked codes, by bytes of a vector: 16 or 32 registers hold the codes of
a step and most of the sums. On AVX2, 6 rows ran 10 % faster than 4, and 12 no faster than 6."""

CHAINED_TILES = (2, 4, 8, 16)
"""Rows of tiles with VNNI: small ones, so that a few rows read the weights once, and 16, which
took 0.8 of the time of 8 for a prompt of 512 tokens on a Cascade Lake."""

UNROLLED_STEPS = 4  # of 32 inputs; longer groups become loops
PREFETCH_BYTES = 2048  # ahead in the stream; hides DRAM latency where one core has little to do

MULTIPLY_BYTES = {
    16: "llvm.x86.ssse3.pmadd.ub.sw.128",
    32: "llvm.x86.avx2.pmadd.ub.sw",
    64: "llvm.x86.avx512.pmaddubs.w.512",
}
ADD_PAIRS = {
    16: "llvm.x86.sse2.pmadd.wd",
    32: "llvm.x86.avx2.pmadd.wd",
    64: "llvm.x86.avx512.pmaddw.d.512",
}
VNNI = "llvm.x86.avx512.vpdpbusd.512"


@dataclass(frozen=True, eq=False)
class Int8Stream(TermKernel):
    """Multiply int8 codes by a stream of codes."""

    rule: ClassVar[str] = "int8_dot"
    place: Place
    stream: Stream

    @property
    def chains(self) -> bool:
        """Say whether one instruction multiplies four bytes and adds to a sum."""
        return self.place.target.has("avx512_vnni")

    @property
    def work(self) -> float:
        return 0.5 if self.chains else 1.0

    def declare(self, signature: Signature) -> None:
        declare_stream(self.place, self.stream, signature)

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        from qc.backends.tvm.linear.int8_row import RowTile  # it is built on this file's Tile

        lanes = float_lanes(self.place.target)
        buffer = self.place.buffer(signature, "stream")
        reader = StreamReader(self.stream, buffer, block, self.place.target, lanes)

        def add(row: Any, height: int, sums: Any) -> None:
            if height == 1:
                RowTile(inputs, reader, row, 1).add(sums[0])
                return
            tile = Tile(inputs, reader, row, height)
            units = self.stream.inner // tile.unit
            if lanes == BLOCK:
                with T.serial(T.int64(0), T.int64(units)) as unit:
                    tile.emit_unit(unit, sums, [(0, 0)])
                return
            with T.serial(T.int64(0), T.int64(BLOCK // lanes)) as vector:
                tile.add_vector(vector * lanes, units, sums)

        return add


def int8_term(place: Place) -> TermKernel | None:
    """Multiply in int8 on x86 where `int8_stream` says so."""
    stream = int8_stream(place) if place.target.has("ssse3") else None
    return None if stream is None else Int8Stream(place, stream)


def int8_stream(place: Place) -> Stream | None:
    """Return the stream of a term where both sides come in groups of whole steps of 32 inputs,
    the activations in int8."""
    activation = place.activation
    if activation is None or activation.bits != 8 or (activation.group or STEP) % STEP:
        return None
    return stream_of(place.format, place.outer, place.inner)


@dataclass(frozen=True)
class Tile:
    """The products of `height` rows of x with one block of a weight."""

    inputs: Inputs
    reader: StreamReader
    row: Any
    height: int

    @property
    def target(self) -> Target:
        return self.reader.target

    @property
    def activation_group(self) -> int:
        assert self.inputs.format is not None
        return min(self.inputs.format.group or self.inputs.inner, self.inputs.inner)

    @property
    def unit(self) -> int:
        """Inputs over which neither a weight scale nor an activation scale changes."""
        return gcd(self.reader.stream.group, self.activation_group, self.inputs.inner)

    @property
    def width(self) -> int:
        """Bytes of a vector."""
        return 4 * self.reader.lanes

    @property
    def has_offsets(self) -> bool:
        """Say whether weights are more than integers times scales."""
        return True

    def group_of(self, first_input: Any) -> Any:
        """Return the number of the group of activations that an input is in."""
        return T.floordiv(first_input, T.int64(self.activation_group))

    def add_vector(self, first: Any, units: int, sums: Sequence[Any]) -> None:
        """Add the products of all inputs with the vector of outputs from `first` on.

        A tile goes over the block once for each vector of outputs: together, LLVM keeps the
        repeated activations of all rows for the second vector and spills them. Where the vector is
        a variable, its code is there once, and the sums of the others are in memory.
        """
        lanes = self.reader.lanes
        own = [accumulator(lanes, size=lanes) for _ in sums]
        for mine, whole in zip(own, sums, strict=True):
            T.buffer_store(mine, whole[span(first, lanes)], [span(0, lanes)])
        with T.serial(T.int64(0), T.int64(units)) as unit:
            self.emit_unit(unit, own, [(first, 0)])
        for mine, whole in zip(own, sums, strict=True):
            T.buffer_store(whole, mine[span(0, lanes)], [span(first, lanes)])

    def emit_unit(self, unit: Any, sums: Sequence[Any], vectors: Sequence[tuple[Any, int]]) -> None:
        """Add the products of one unit of inputs to the accumulators of all rows.

        `vectors` are those of the outputs to compute: the first of them, and where its sum is.
        """
        stream, lanes = self.reader.stream, self.reader.lanes
        units = stream.group // self.unit
        head = T.Bind(self.reader.head(T.floordiv(unit, T.int64(units))))
        skipped = T.floormod(unit, T.int64(units)) * (self.unit // STEP * stream.step_bytes)
        codes = T.Bind(head + stream.head_bytes + skipped)
        first_input = T.Bind(unit * self.unit)
        self.emit_prefetch(codes)
        group = self.group_of(first_input)
        rows = range(self.height)
        scales = [self.read(self.inputs.scale, r, group) for r in rows]
        totals = [self.total(r, unit, first_input, scales[r]) for r in rows if self.has_offsets]
        for first, place in vectors:
            integers = self.emit_integers(codes, first_input, first)
            scale = self.reader.scale(head, first)
            minimum = self.reader.minimum(head, first, scale) if self.has_offsets else None
            at = span(place, lanes)
            for r in rows:
                exact = T.Cast(f"float32x{lanes}", integers[r]) * splat(scales[r], lanes)
                value = sums[r][at] + scale * exact
                if minimum is not None:
                    value = value + minimum * splat(totals[r], lanes)
                T.buffer_store(sums[r], value, [at])

    def read(self, buffer: Any, r: int, number: Any) -> Any:
        """Load what belongs to a row and to a group."""
        return T.Bind(buffer[self.row + r, number])

    def emit_prefetch(self, codes: Any) -> None:
        """Ask for the part of the stream that is read some units later."""
        stream = self.reader.stream
        for line in range(0, self.unit // STEP * stream.step_bytes + stream.head_bytes, 64):
            ahead = codes + (PREFETCH_BYTES + line)
            prefetch(T.address_of(self.reader.buffer[self.reader.block, ahead]))

    def total(self, r: int, unit: Any, first_input: Any, scale: Any) -> Any:
        """Return x_scale times the sum of the codes of one unit of a row of x."""
        if self.unit == self.activation_group:
            return self.read(self.inputs.total, r, unit)
        width = min(self.width, STEP)
        partial = accumulator(width // 4, "int32", width // 4)
        with T.serial(T.int64(0), T.int64(self.unit // width)) as step:
            at = span(first_input + step * width, width)
            pairs = self.pairs(splat(T.uint8(1), width), self.inputs.codes[self.row + r, at])
            whole = partial[span(0, width // 4)] + self.added(pairs, 1)
            T.buffer_store(partial, whole, [span(0, width // 4)])
        integer = pure("int32", "llvm.vector.reduce.add", partial[span(0, width // 4)])
        return T.Bind(T.Cast("float32", integer) * scale)

    def emit_integers(self, codes: Any, first_input: Any, first: Any) -> list[Any]:
        """Return the sums of q a over one unit, for `lanes` outputs: a vector for each row."""
        steps, lanes = self.unit // STEP, self.reader.lanes
        step_bytes = self.reader.stream.step_bytes
        if steps <= UNROLLED_STEPS:
            parts = [
                self.emit_step(codes + step * step_bytes, first_input + step * STEP, first)
                for step in range(steps)
            ]
            return [sum(column[1:], column[0]) for column in zip(*parts, strict=True)]
        totals = [accumulator(lanes, "int32", lanes) for _ in range(self.height)]
        with T.serial(T.int64(0), T.int64(steps)) as step:
            part = self.emit_step(codes + step * step_bytes, first_input + step * STEP, first)
            for total, value in zip(totals, part, strict=True):
                T.buffer_store(total, total[span(0, lanes)] + value, [span(0, lanes)])
        return [total[span(0, lanes)] for total in totals]

    def emit_step(self, codes: Any, first_input: Any, first: Any) -> list[Any]:
        """Return the sums of q a over 32 inputs."""
        quads = self.reader.quads(codes, first)
        if self.target.has("avx512_vnni"):
            zero = splat(T.int32(0), self.reader.lanes)
            whole = [[joined(parts, self.width)] for parts in quads]
            return self.accumulated(whole, first_input, self.chained, [zero])
        halves = [nibbles(parts, self.width) for parts in quads]
        weights = [1, 16][: len(halves[0])]
        return self.accumulated(halves, first_input, self.paired, weights)

    def accumulated(
        self,
        quads: list[list[Any]],
        first_input: Any,
        combine: Callable[[list[list[Any]], list[Any], list[Any]], Any],
        start: list[Any],
    ) -> list[Any]:
        """Apply `combine` to the codes and the activations of every row."""
        found = []
        for r in range(self.height):
            inputs = [self.four_inputs(r, first_input + 4 * quad) for quad in range(QUADS)]
            found.append(T.Bind(combine(quads, inputs, start)))
        return found

    def chained(self, quads: list[list[Any]], inputs: list[Any], start: list[Any]) -> Any:
        """Sum with VNNI."""
        total = start[0]
        for (code,), four in zip(quads, inputs, strict=True):
            total = pure(f"int32x{self.reader.lanes}", VNNI, total, code, four)
        return total

    def paired(self, quads: list[list[Any]], inputs: list[Any], weights: list[Any]) -> Any:
        """Sum the four-bit parts of codes in int16, then weigh and add them in int32."""
        parts = []
        for part, weight in enumerate(weights):
            products = [self.pairs(q[part], four) for q, four in zip(quads, inputs, strict=True)]
            parts.append(self.added(sum(products[1:], products[0]), weight))
        return sum(parts[1:], parts[0])

    def four_inputs(self, r: int, first_input: Any) -> Any:
        """Repeat four consecutive activations of a row over a vector."""
        four = self.inputs.codes[self.row + r, span(first_input, 4)]
        repeated = splat(T.reinterpret("int32", four), self.reader.lanes)
        return T.reinterpret(f"int8x{self.width}", repeated)

    def pairs(self, unsigned: Any, signed: Any) -> Any:
        """Multiply bytes and add neighbours: int16."""
        width = int(str(unsigned.ty).rpartition("x")[2])
        return pure(f"int16x{width // 2}", MULTIPLY_BYTES[width], unsigned, signed)

    def added(self, pairs: Any, weight: int) -> Any:
        """Multiply int16 by a constant and add neighbours: int32."""
        count = int(str(pairs.ty).rpartition("x")[2])
        ones = splat(T.int16(weight), count)
        return pure(f"int32x{count // 2}", ADD_PAIRS[2 * count], pairs, ones)
