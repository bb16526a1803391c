"""Integer products of many rows with vectors of bytes, without VNNI.

    y = sum over units of s x_scale (sum of q a) + m x_scale (sum of a)

as in int8_dot, turned round: lanes run over rows of x, four inputs each, and one code after another
is repeated over them. A core takes about five instructions in a cycle, and that, not its
multipliers, is what limits these kernels: with rows as lanes the activations of a unit stay in
registers for all outputs, and what both sides need is prepared once: activations are transposed
once a call, codes and scales unpacked once a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.codes import StreamReader, nibbles
from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.int8_dot import UNROLLED_STEPS, Int8Stream, Tile
from qc.backends.tvm.linear.layout import BLOCK, QUADS, STEP
from qc.backends.tvm.linear.skeleton import Signature, accumulator, zeros_in_memory
from qc.backends.tvm.linear.term import Products, TermKernel
from qc.backends.tvm.linear.vectors import float_lanes, span, splat

LANES = 8
"""Rows of a vector of AVX2: of four int8 inputs, or of one float32."""

TALL = 32
"""Rows of a tile: a code is repeated once for four vectors of rows."""

VECTORS = TALL // LANES

PANEL_TILES = (2, 4, 8, TALL)
"""Rows of tiles: small ones, so that a few rows read the weights once and compute little twice."""


@dataclass(frozen=True)
class Panels:
    """The activations of a call with rows as lanes, vector of rows by vector of rows.

    `codes` int32[vectors, quads, 8], four inputs in each; `scale` and `total` (x_scale times the
    sum of codes) float32[vectors, units, 8].
    """

    codes: Any
    scale: Any
    total: Any


@dataclass(frozen=True)
class Block:
    """The weights of a block: `codes` int32[steps, parts, quads, 16], four inputs in each, of the
    low and, where there are any, of the high four bits; float32[groups, 16] `scale`, `minimum`."""

    codes: Any
    parts: int
    scale: Any
    minimum: Any


@dataclass(frozen=True, eq=False)
class PanelStream(Int8Stream):
    """Multiply int8 codes by a stream of codes: tall tiles with rows as lanes, all others as
    without this."""

    rule: ClassVar[str] = "int8_dot"
    tall: bool = False

    def at_height(self, height: int) -> TermKernel:
        return replace(self, tall=height == TALL)

    @property
    def sums_in_memory(self) -> bool:
        return self.tall

    @property
    def parts(self) -> int:
        """Into how many parts of four bits codes are split."""
        return 2 if self.stream.format.bits_per_code > 4 else 1

    def reader(self, signature: Signature, block: Any) -> StreamReader:
        """Read the stream of a block."""
        buffer = self.place.buffer(signature, "stream")
        return StreamReader(self.stream, buffer, block, self.place.target, LANES)

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        tile = Tile(inputs, self.reader(signature, T.int64(0)), T.int64(0), 1)
        if self.key(tile) in signature.scratch:
            return
        vectors = T.Bind(T.floordiv(inputs.rows + (TALL - 1), TALL) * VECTORS)
        units = inputs.inner // tile.unit

        def new(size: int, dtype: str) -> Any:
            return T.alloc_buffer((vectors, T.int64(size * LANES)), dtype, layout=None)

        sizes = (inputs.inner // 4, "int32"), (units, "float32"), (units, "float32")
        panels = Panels(*(new(size, dtype) for size, dtype in sizes))
        signature.scratch[self.key(tile)] = panels

        with T.If(inputs.rows >= TALL), T.Then():
            transpose_inputs(tile, panels)

    def key(self, tile: Tile) -> object:
        """The name under which panels are kept: terms with equal units share them."""
        return "panels", tile.unit

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        if not self.tall:
            return super().block(signature, inputs, block, many)
        reader = self.reader(signature, block)
        unpacked = self.unpacked(reader)

        def add(row: Any, height: int, sums: Any) -> None:
            tile = Tile(inputs, reader, row, height)
            panels = signature.scratch[self.key(tile)]
            TallTile(inputs, reader, row, height, panels, unpacked).add(sums[0])

        return add

    def unpacked(self, reader: StreamReader) -> Block:
        """Unpack the codes and the scales of a block."""
        stream, parts = self.stream, self.parts
        groups, steps = stream.format.groups(stream.inner), stream.group // STEP
        codes = T.alloc_buffer((stream.inner // 4 * BLOCK * parts,), "int32", layout=None)
        scale, minimum = (
            T.alloc_buffer((groups * BLOCK,), "float32", layout=None) for _ in range(2)
        )
        with T.serial(T.int64(0), T.int64(groups)) as group:
            head = T.Bind(reader.head(group))
            for first in range(0, BLOCK, LANES):
                at, value = span(group * BLOCK + first, LANES), reader.scale(head, first)
                T.buffer_store(scale, value, [at])
                T.buffer_store(minimum, reader.minimum(head, first, value), [at])
        with T.serial(T.int64(0), T.int64(stream.inner // STEP)) as step:
            head = reader.head(T.floordiv(step, T.int64(steps)))
            inside = T.floormod(step, T.int64(steps)) * stream.step_bytes
            offset = T.Bind(head + stream.head_bytes + inside)
            for first in range(0, BLOCK, LANES):
                for quad, bits in enumerate(reader.quads(offset, first)):
                    for part, value in enumerate(nibbles(bits, 4 * LANES)):
                        at = ((step * parts + part) * QUADS + quad) * BLOCK + first
                        whole = T.reinterpret(f"int32x{LANES}", value)
                        T.buffer_store(codes, whole, [span(at, LANES)])
        return Block(codes, parts, scale, minimum)


def panel_stream(kernel: TermKernel) -> PanelStream | None:
    """Return what multiplies as `kernel` does, in tiles of many rows too; None where the kernel,
    the vectors or the instructions are others."""
    if type(kernel) is not Int8Stream:
        return None
    target = kernel.place.target
    if target.has("avx512_vnni") or float_lanes(target) != LANES:
        return None
    return PanelStream(kernel.place, kernel.stream)


def transpose_inputs(tile: Tile, panels: Panels) -> None:
    """Fill `panels` for tiles of rows, the last of which ends at the last row."""
    rows = tile.inputs.rows
    tiles = T.floordiv(rows + (TALL - 1), TALL)
    with T.parallel(T.int64(0), tiles * VECTORS) as vector:
        start = T.min(T.floordiv(vector, T.int64(VECTORS)) * TALL, rows - TALL)
        first = T.Bind(start + T.floormod(vector, T.int64(VECTORS)) * LANES)
        transpose_vector(replace(tile, row=first), panels, vector)


def transpose_vector(tile: Tile, panels: Panels, vector: Any) -> None:
    """Fill `panels` for the eight rows from the tile's row on."""
    inputs = tile.inputs
    with T.serial(T.int64(0), T.int64(inputs.inner // STEP)) as step:
        rows = [
            T.Bind(T.reinterpret("int32x8", inputs.codes[tile.row + r, span(step * STEP, STEP)]))
            for r in range(LANES)
        ]
        for quad, value in enumerate(transposed(rows)):
            at = span((step * QUADS + quad) * LANES, LANES)
            T.buffer_store(panels.codes, value, [vector, at])
    with T.serial(T.int64(0), T.int64(LANES)) as r:
        one = replace(tile, row=tile.row + r)
        with T.serial(T.int64(0), T.int64(inputs.inner // tile.unit)) as unit:
            first_input = T.Bind(unit * tile.unit)
            scale = one.read(inputs.scale, 0, tile.group_of(first_input))
            at = unit * LANES + r
            T.buffer_store(panels.scale, scale, [vector, at])
            T.buffer_store(panels.total, one.total(0, unit, first_input, scale), [vector, at])


def transposed(rows: Sequence[Any]) -> list[Any]:
    """Transpose 8 vectors of 8 lanes, by exchanging lanes, pairs, then halves."""

    def both(a: Any, b: Any, low: Sequence[int], step: int) -> tuple[Any, Any]:
        found = []
        for shift in (0, step):
            lanes = [T.int32(lane + shift) for lane in low]
            found.append(T.Bind(T.Shuffle([a, b], lanes)))
        return found[0], found[1]

    lanes = [both(rows[i], rows[i + 1], (0, 8, 1, 9, 4, 12, 5, 13), 2) for i in (0, 2, 4, 6)]
    pairs: list[Any] = []
    for first, second in ((lanes[0], lanes[1]), (lanes[2], lanes[3])):
        for a, b in zip(first, second, strict=True):
            pairs += both(a, b, (0, 1, 8, 9, 4, 5, 12, 13), 2)
    halves = [both(pairs[i], pairs[i + 4], (0, 1, 2, 3, 8, 9, 10, 11), 4) for i in range(4)]
    return [first for first, _ in halves] + [second for _, second in halves]


@dataclass(frozen=True)
class TallTile(Tile):
    """The products of some vectors of rows with one block of a weight."""

    panels: Panels
    weights: Block

    def add(self, sums: Any) -> None:
        """Add the products of all units to float32[rows * 16] sums."""
        first = T.Bind(T.floordiv(self.row + (TALL - 1), T.int64(TALL)) * VECTORS)
        turned = zeros_in_memory(BLOCK * TALL, LANES)
        units, each = self.inputs.inner // self.unit, self.reader.stream.group // self.unit
        with T.serial(T.int64(0), T.int64(units)) as unit:
            group = T.Bind(T.floordiv(unit, T.int64(each)) * BLOCK)
            with T.serial(T.int64(0), T.int64(BLOCK)) as output:
                self.add_output(first, unit, group, output, turned)
        with (
            T.serial(T.int64(0), T.int64(VECTORS)) as vector,
            T.serial(T.int64(0), T.int64(BLOCK // LANES)) as part,
        ):
            outputs = (part * LANES + i for i in range(LANES))
            columns = [turned[span((o * VECTORS + vector) * LANES, LANES)] for o in outputs]
            for r, value in enumerate(transposed([T.Bind(column) for column in columns])):
                at = span((vector * LANES + r) * BLOCK + part * LANES, LANES)
                T.buffer_store(sums, sums[at] + value, [at])

    def add_output(self, first: Any, unit: Any, group: Any, output: Any, turned: Any) -> None:
        """Add the products of one unit with one output."""
        scale = T.Bind(splat(self.weights.scale[group + output], LANES))
        minimum = T.Bind(splat(self.weights.minimum[group + output], LANES))
        integers = self.emit_sums(first, unit, output)
        for vector, integer in enumerate(integers):
            place = [first + vector, span(unit * LANES, LANES)]
            at = span((output * VECTORS + vector) * LANES, LANES)
            exact = T.Cast(f"float32x{LANES}", integer) * self.panels.scale[tuple(place)]
            value = turned[at] + scale * exact
            value = value + minimum * self.panels.total[tuple(place)]
            T.buffer_store(turned, value, [at])

    def emit_sums(self, first: Any, unit: Any, output: Any) -> list[Any]:
        """Return the sums of q a over one unit: a vector for each vector of rows."""
        steps = self.unit // STEP
        if steps <= UNROLLED_STEPS:
            found = [self.step_sums(first, unit * steps + step, output) for step in range(steps)]
            return [sum(column[1:], column[0]) for column in zip(*found, strict=True)]
        totals = [accumulator(LANES, "int32", LANES) for _ in range(VECTORS)]
        at = span(0, LANES)
        with T.serial(T.int64(0), T.int64(steps)) as step:
            part = self.step_sums(first, unit * steps + step, output)
            for total, value in zip(totals, part, strict=True):
                T.buffer_store(total, total[at] + value, [at])
        return [total[at] for total in totals]

    def step_sums(self, first: Any, step: Any, output: Any) -> list[Any]:
        """Return the sums of q a over 32 inputs."""
        parts = self.weights.parts
        found: list[list[Any]] = [[] for _ in range(VECTORS)]
        for part in range(parts):
            base = T.Bind(((step * parts + part) * QUADS) * BLOCK + output)
            codes = [
                T.Bind(
                    T.reinterpret("uint8x32", splat(self.weights.codes[base + q * BLOCK], LANES))
                )
                for q in range(QUADS)
            ]
            for vector in range(VECTORS):
                products = [
                    self.pairs(code, self.four_of_rows(first + vector, step * QUADS + q))
                    for q, code in enumerate(codes)
                ]
                whole = sum(products[1:], products[0])
                found[vector].append(self.added(whole, (1, 16)[part]))
        return [T.Bind(sum(each[1:], each[0])) for each in found]

    def four_of_rows(self, vector: Any, quad: Any) -> Any:
        """Load four inputs of each row of a vector of rows."""
        four = self.panels.codes[vector, span(quad * LANES, LANES)]
        return T.reinterpret("int8x32", four)
