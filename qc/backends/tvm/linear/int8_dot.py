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
from typing import Any

from tvm.tirx.script import builder as T

from qc.backends.tvm.kernel import Kernel, Region
from qc.backends.tvm.linear.codes import StreamReader, joined, nibbles
from qc.backends.tvm.linear.layout import BLOCK, QUADS, STEP, Stream, stream_of
from qc.backends.tvm.linear.matching import LinearRegion, match_linear
from qc.backends.tvm.linear.skeleton import (
    Signature,
    accumulator,
    build_kernel,
    for_each_block,
    for_each_tile,
    store_tile,
)
from qc.backends.tvm.linear.vectors import float_lanes, prefetch, pure, span, splat
from qc.ir.node import Node
from qc.ir.target import Target

TILES = {16: 4, 32: 6, 64: 8}
"""Rows of x that share unpacked codes, by bytes of a vector: 16 or 32 registers hold the codes of
a step and most of the sums. On AVX2, 6 rows ran 10 % faster than 4, and 12 no faster than 6."""

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


def int8_linear(region: Region) -> Kernel | None:
    """Multiply in int8 where both sides come in groups of whole steps of 32 inputs."""
    linear = match_linear(region)
    if linear is None or linear.activation is None or not region.target.has("ssse3"):
        return None
    if linear.activation.bits != 8 or (linear.activation.group or STEP) % STEP:
        return None
    streams = [stream_of(format, linear.outer, linear.inner) for format in linear.formats]
    found = dict(zip(linear.linears, (s for s in streams if s is not None), strict=False))
    if len(found) != len(linear.linears):
        return None

    def emit(signature: Signature) -> None:
        def emit_block(block: Any) -> None:
            for_each_tile(
                signature,
                TILES[region.target.vector_bytes],
                lambda row, height: emit_tile(signature, found, block, row, height),
            )

        for_each_block(signature, -(-linear.outer // BLOCK), emit_block)

    def declare(signature: Signature) -> None:
        for node, stream in found.items():
            shape = (stream.blocks, stream.block_bytes)
            signature.declare_weight(node, "stream", "uint8", shape, stream.repack)

    return build_kernel("int8_dot", linear, declare, emit)


def emit_tile(
    signature: Signature, streams: dict[Node, Stream], block: Any, row: Any, height: int
) -> None:
    """Compute 16 outputs of `height` rows."""
    target = signature.linear.region.target
    lanes = float_lanes(target)
    sums: dict[Node, list[Any]] = {}
    for node, stream in streams.items():
        reader = StreamReader(stream, signature.weight(node, "stream"), block, target, lanes)
        tile = Tile(signature, reader, row, height)
        sums[node] = [accumulator(lanes) for _ in range(height)]
        vectors = range(0, BLOCK, lanes)
        # A tile goes over the block once for each vector of outputs: together, LLVM keeps the
        # repeated activations of all rows for the second vector and spills them.
        for together in [vectors] if height == 1 else [[first] for first in vectors]:
            with T.serial(T.int64(0), T.int64(stream.inner // tile.unit)) as unit:
                tile.emit_unit(unit, sums[node], together)
    store_tile(signature, sums, row, block, lanes)


@dataclass(frozen=True)
class Tile:
    """The products of `height` rows of x with one block of a weight."""

    signature: Signature
    reader: StreamReader
    row: Any
    height: int

    @property
    def linear(self) -> LinearRegion:
        return self.signature.linear

    @property
    def target(self) -> Target:
        return self.linear.region.target

    @property
    def activation_group(self) -> int:
        assert self.linear.activation is not None
        return self.linear.activation.group or self.linear.inner

    @property
    def unit(self) -> int:
        """Inputs over which neither a weight scale nor an activation scale changes."""
        return gcd(self.reader.stream.group, self.activation_group, self.linear.inner)

    @property
    def width(self) -> int:
        """Bytes of a vector."""
        return 4 * self.reader.lanes

    def emit_unit(self, unit: Any, sums: list[Any], vectors: Sequence[int]) -> None:
        """Add the products of one unit of inputs to the accumulators of all rows.

        `vectors` are the first outputs of the vectors to compute.
        """
        stream, lanes = self.reader.stream, self.reader.lanes
        units = stream.group // self.unit
        head = T.Bind(self.reader.head(T.floordiv(unit, T.int64(units))))
        skipped = T.floormod(unit, T.int64(units)) * (self.unit // STEP * stream.step_bytes)
        codes = T.Bind(head + stream.head_bytes + skipped)
        first_input = T.Bind(unit * self.unit)
        if self.height == 1:
            self.emit_prefetch(codes)
        group = T.floordiv(first_input, T.int64(self.activation_group))
        rows = range(self.height)
        scales = [T.Bind(self.signature.x("scale")[self.row + r, group]) for r in rows]
        totals = [self.total(r, unit, first_input, scales[r]) for r in rows]
        for first in vectors:
            integers = self.emit_integers(codes, first_input, first)
            scale = self.reader.scale(head, first)
            minimum = self.reader.minimum(head, first, scale)
            at = span(first, lanes)
            for r in rows:
                exact = T.Cast(f"float32x{lanes}", integers[r]) * splat(scales[r], lanes)
                value = sums[r][at] + scale * exact + minimum * splat(totals[r], lanes)
                T.buffer_store(sums[r], value, [at])

    def emit_prefetch(self, codes: Any) -> None:
        """Ask for the part of the stream that is read some units later."""
        stream = self.reader.stream
        for line in range(0, self.unit // STEP * stream.step_bytes + stream.head_bytes, 64):
            ahead = codes + (PREFETCH_BYTES + line)
            prefetch(T.address_of(self.reader.buffer[self.reader.block, ahead]))

    def total(self, r: int, unit: Any, first_input: Any, scale: Any) -> Any:
        """Return x_scale times the sum of the codes of one unit of a row of x."""
        if self.unit == self.activation_group:
            return T.Bind(self.signature.x("total")[self.row + r, unit])
        width = min(self.width, STEP)
        partial = accumulator(width // 4, "int32", width // 4)
        with T.serial(T.int64(0), T.int64(self.unit // width)) as step:
            at = span(first_input + step * width, width)
            pairs = self.pairs(
                splat(T.uint8(1), width), self.signature.x("codes")[self.row + r, at]
            )
            whole = partial[span(0, width // 4)] + self.added(pairs, 1)
            T.buffer_store(partial, whole, [span(0, width // 4)])
        integer = pure("int32", "llvm.vector.reduce.add", partial[span(0, width // 4)])
        return T.Bind(T.Cast("float32", integer) * scale)

    def emit_integers(self, codes: Any, first_input: Any, first: int) -> list[Any]:
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

    def emit_step(self, codes: Any, first_input: Any, first: int) -> list[Any]:
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
        four = self.signature.x("codes")[self.row + r, span(first_input, 4)]
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
