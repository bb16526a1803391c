"""Integer products on AMX tiles: 16 rows of int8 activations by 16 outputs, exactly.

    y = sum over units of s x_scale (sum of q a) + m x_scale (sum of a)

as in int8_dot, where the unit is the inputs over which neither scale changes. A block of the weight
is unpacked once, for all rows, to bytes in the order that tiles want (the quads of the stream). For
each unit the tile unit sums q a in int32 and stores the tile to memory, the only way out of it;
AVX-512 scales and adds it to the float32 accumulators of the 16 rows, one unit later, so that the
two overlap. With units of 32 inputs tiles are half filled; that costs less than it seems, for then
scaling, 3 or 4 instructions a row, takes longer than the tile unit. Codes of symmetric formats are
stored signed, q - 2^(bits-1), and need no m.

bfloat16 tiles are not used: one product loses 16 bits of the inputs, which nobody asked for, and
the three products of hi + lo parts take as long as scaling does here.

Source: Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter on AMX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import tvm
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.codes import StreamReader, joined
from qc.backends.tvm.linear.inputs import Inputs, for_each_row
from qc.backends.tvm.linear.int8_dot import Int8Stream, Tile, int8_term
from qc.backends.tvm.linear.layout import BLOCK, QUADS, STEP
from qc.backends.tvm.linear.skeleton import Signature
from qc.backends.tvm.linear.term import Place, Products, TermKernel
from qc.backends.tvm.linear.vectors import float_lanes, span, splat

TALL = 16
"""Rows of a tile of x."""

WIDE = 64
"""Bytes of a row of a tile, and inputs that one product covers at most."""

SLOTS = 2  # units whose sums are in memory: one is scaled while the tile unit works on the next

SUMS = 0
"""The tile of sums int32[16 rows, 16 outputs]."""

OPERANDS = {STEP: (1, 2), WIDE: (3, 4)}
"""The tiles of inputs int8[16 rows, n] and of codes [n / 4 quads, 16 outputs, 4], by n."""

SHAPES = {SUMS: (TALL, WIDE)} | {
    tile: shape
    for width, (inputs, codes) in OPERANDS.items()
    for tile, shape in ((inputs, (TALL, width)), (codes, (width // 4, WIDE)))
}
"""Rows and bytes of a row of each tile: the same in all kernels, so terms can share them."""


@dataclass(frozen=True)
class Tiles:
    """The tile registers and their instructions. `at` indexes the first byte of a tile in a buffer,
    whose rows lie `stride` bytes apart."""

    @staticmethod
    def emit(name: str, *operands: Any) -> None:
        """Emit an instruction on the tiles that are named by number.

        LLVM has a second kind of intrinsics, which allocates tiles; only its own passes make them.
        """
        number = tvm.target.codegen.llvm_lookup_intrinsic_id(f"llvm.x86.{name}")
        T.evaluate(T.call_llvm_intrin("void", T.uint32(number), *operands))

    def configure(self) -> None:
        """Give this thread's tiles their shapes."""
        words = [0] * 16
        words[0] = 1  # the palette; bytes of rows follow from byte 16 on, rows from byte 48 on
        for tile, (rows, width) in SHAPES.items():
            words[4 + tile // 2] |= width << 16 * (tile % 2)
            words[12 + tile // 4] |= rows << 8 * (tile % 4)
        buffer = T.alloc_buffer((16,), "int32", layout=None)
        for number, word in enumerate(words):
            T.buffer_store(buffer, T.int32(word), [T.int64(number)])
        self.emit("ldtilecfg", T.address_of(buffer[T.int64(0)]))

    def clear(self, tile: int) -> None:
        """Set a tile to zero."""
        self.emit("tilezero", T.int8(tile))

    def load(self, tile: int, buffer: Any, at: Sequence[Any], stride: int) -> None:
        """Load a tile."""
        self.emit("tileloadd64", T.int8(tile), T.address_of(buffer[tuple(at)]), T.int64(stride))

    def store(self, tile: int, buffer: Any, at: Sequence[Any], stride: int) -> None:
        """Store a tile."""
        self.emit("tilestored64", T.int8(tile), T.address_of(buffer[tuple(at)]), T.int64(stride))

    def multiply(self, sums: int, inputs: int, codes: int, signed: bool) -> None:
        """Add the products of signed inputs and codes to a tile of sums."""
        name = "tdpbssd" if signed else "tdpbsud"
        self.emit(name, T.int8(sums), T.int8(inputs), T.int8(codes))

    def release(self) -> None:
        """Tell the system that this thread's tiles hold nothing."""
        self.emit("tilerelease")


@dataclass(frozen=True, eq=False)
class AmxStream(Int8Stream):
    """Multiply int8 codes by a stream of codes: tall tiles by AMX, all others as without it."""

    rule: ClassVar[str] = "int8_amx"
    tall: bool = False

    @property
    def work(self) -> float:
        return 0.2  # 4 instructions scale 16 outputs of 32 inputs; half of the rest is not hidden

    def at_height(self, height: int) -> TermKernel:
        return replace(self, tall=height == TALL)

    @property
    def signed(self) -> bool:
        """Say whether codes are unpacked to signed bytes. Zero points might not fit there."""
        return self.stream.format.offset == "symmetric"

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        lanes = float_lanes(self.place.target)
        buffer = self.place.buffer(signature, "stream")
        reader = StreamReader(self.stream, buffer, T.int64(0), self.place.target, lanes)
        any_row = Tile(inputs, reader, T.int64(0), 1)
        if self.signed or any_row.unit == any_row.activation_group:
            return
        units = self.stream.inner // any_row.unit
        totals = T.alloc_buffer((inputs.rows, T.int64(units)), "float32", layout=None)

        def sum_units(row: Any) -> None:
            tile = replace(any_row, row=row)
            with T.serial(T.int64(0), T.int64(units)) as unit:
                first = T.Bind(unit * tile.unit)
                scale = T.Bind(inputs.scale[row, tile.group_of(first)])
                T.buffer_store(totals, tile.total(0, unit, first, scale), [row, unit])

        with T.If(inputs.rows >= TALL), T.Then():
            for_each_row(inputs.rows, sum_units)
        signature.scratch[self.totals_key] = totals

    @property
    def totals_key(self) -> object:
        """The name under which the sums of units of x are kept."""
        return self.place.operand, self.place.prefix, "totals"

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        if not self.tall:
            return super().block(signature, inputs, block, many)
        lanes = float_lanes(self.place.target)
        buffer = self.place.buffer(signature, "stream")
        reader = StreamReader(self.stream, buffer, block, self.place.target, lanes)
        codes = self.unpacked(reader)
        slots = T.alloc_buffer((SLOTS * TALL * BLOCK,), "int32", layout=None)
        totals = signature.scratch.get(self.totals_key)
        tiles = Tiles()
        tiles.configure()

        def add(row: Any, height: int, sums: Any) -> None:
            assert height == TALL
            given = tiles, codes, slots, totals, self.signed
            TallTile(inputs, reader, row, height, *given).add(sums)

        return add

    def finish(self) -> None:
        if self.tall:
            Tiles().release()

    def unpacked(self, reader: StreamReader) -> Any:
        """Unpack the codes of a block to u8[inner / 4 quads, 16 outputs, 4]."""
        stream = self.stream
        quad_bytes, steps = 4 * BLOCK, stream.group // STEP
        middle = splat(T.uint8(stream.format.middle), quad_bytes)
        codes = T.alloc_buffer((stream.inner * BLOCK,), "uint8", layout=None)
        with T.serial(T.int64(0), T.int64(stream.inner // STEP)) as step:
            head = reader.head(T.floordiv(step, T.int64(steps)))
            inside = T.floormod(step, T.int64(steps)) * stream.step_bytes
            offset = T.Bind(head + stream.head_bytes + inside)
            for quad, parts in enumerate(reader.quads(offset, 0)):
                code = joined(parts, quad_bytes)
                value = code - middle if self.signed else code
                at = span((step * QUADS + quad) * quad_bytes, quad_bytes)
                T.buffer_store(codes, value, [at])
        return codes


def amx_term(place: Place) -> TermKernel | None:
    """Multiply what int8_term takes on tiles."""
    if not place.target.has("amx_int8", "avx512_vnni"):
        return None
    found = int8_term(place)
    return AmxStream(found.place, found.stream) if isinstance(found, Int8Stream) else None


@dataclass(frozen=True)
class TallTile(Tile):
    """The products of 16 rows of x with one block of a weight: `codes` as `unpacked` returns them,
    `slots` int32[SLOTS, 16 rows, 16 outputs], `totals` of each unit where x has others."""

    tiles: Tiles
    codes: Any
    slots: Any
    totals: Any
    signed: bool

    @property
    def has_offsets(self) -> bool:
        return not self.signed

    def add(self, sums: list[Any]) -> None:
        """Add the products of all units to the accumulators."""
        units = self.inputs.inner // self.unit
        self.multiply(T.int64(0))
        with T.serial(T.int64(0), T.int64(units)) as unit:
            with T.If(unit + 1 < units), T.Then():
                self.multiply(T.Bind(unit + 1))
            self.emit_unit(unit, sums, [(0, 0)])

    def multiply(self, unit: Any) -> None:
        """Sum the products of one unit into its slot."""
        first = T.Bind(unit * self.unit)
        self.tiles.clear(SUMS)
        whole = self.unit // WIDE * WIDE
        if whole // WIDE <= 2:
            for start in range(0, whole, WIDE):
                self.multiply_tile(first + start, WIDE)
        else:
            with T.serial(T.int64(0), T.int64(whole // WIDE)) as number:
                self.multiply_tile(T.Bind(first + number * WIDE), WIDE)
        if self.unit % WIDE:
            self.multiply_tile(first + whole, STEP)
        self.tiles.store(SUMS, self.slots, [self.slot(first)], WIDE)

    def multiply_tile(self, first_input: Any, width: int) -> None:
        """Add the products of `width` inputs to the tile of sums."""
        inputs, codes = OPERANDS[width]
        where = [self.row, first_input]
        self.tiles.load(inputs, self.inputs.codes, where, self.inputs.inner)
        self.tiles.load(codes, self.codes, [first_input * BLOCK], 4 * BLOCK)
        self.tiles.multiply(SUMS, inputs, codes, self.signed)

    def slot(self, first_input: Any) -> Any:
        """Return where the sums of a unit are kept."""
        number = T.floordiv(first_input, T.int64(self.unit))
        return T.floormod(number, T.int64(SLOTS)) * (TALL * BLOCK)

    def emit_integers(self, codes: Any, first_input: Any, first: int) -> list[Any]:
        """Load the sums of a unit that the tile unit has stored."""
        slot = T.Bind(self.slot(first_input))
        return [self.slots[span(slot + r * BLOCK + first, BLOCK)] for r in range(TALL)]

    def total(self, r: int, unit: Any, first_input: Any, scale: Any) -> Any:
        """Return x_scale times the sum of the codes of one unit of a row of x."""
        if self.totals is None:
            return super().total(r, unit, first_input, scale)
        return self.read(self.totals, r, unit)

    def read(self, buffer: Any, r: int, number: Any) -> Any:
        # Not bound to a name: read before it is used, 16 rows of scales would fill the registers.
        return buffer[self.row + r, number]
