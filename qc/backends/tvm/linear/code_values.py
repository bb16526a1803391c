"""What codes mean, as float32 vectors: ways to widen 64 bytes of codes, 4 columns x 16 outputs.

Three ways, for functions of a code alone that can be tabulated:

    planes    up to 32 values: a table for each byte of a float32, looked up for a whole vector of
              codes at once, 16 entries at a time; interleaving them gives floats. Bytes that are 0
              in all values, such as the lower half of a bfloat16, cost nothing.
    halves    small floats: the byte is the top of a float16 after one shift and one mask
    integers  the code itself: bytes are widened and converted

Interleaving works on 128 bits, so the codes lie in an order in which what comes out is in the order
of the outputs; 64-byte vectors have one column each, 32-byte vectors half a column.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.bit_serial_reader import shuffled
from qc.backends.tvm.linear.byte_lookup import ByteLookup, byte_lookup
from qc.backends.tvm.linear.code_lanes import QUAD_BYTES
from qc.backends.tvm.linear.code_products import CODE, TABLE_BITS
from qc.backends.tvm.linear.plan import BLOCK_INDEX
from qc.backends.tvm.linear.vectors import halves_to_float, span, splat
from qc.ir.target import Target
from qc.ir.weights.expression import Code, Expr, Load, ToFloat, TorchRendering
from qc.ir.weights.weight import ArraySpec

TABLE = 16
"""Entries that one instruction looks bytes up in."""

MOST_TABLE_BITS = 5
"""Codes of tables that are looked up part by part. Four parts of three planes do not fit the
registers: 4.7 cycles for 8 weights on Zen 3, where windows of two codes take 4."""

LANE_BYTES = 16
"""Bytes inside which x86 interleaves."""


@dataclass(frozen=True)
class CodeValues(ABC):
    """A way to widen codes, in vectors of `size` bytes."""

    size: int

    @property
    def lanes(self) -> int:
        return self.size // 4

    @property
    def factor(self) -> float:
        """What the widened values must be multiplied by."""
        return 1.0

    @property
    def up(self) -> int:
        """How far up in their bytes the codes are wanted."""
        return 0

    @abstractmethod
    def byte_of(self, number: int, lane: int) -> int:
        """Return the byte of a vector that comes out in a lane of its vector `number` of 4."""

    @abstractmethod
    def widen(self, codes: Any, planes: list[Any]) -> list[Any]:
        """Return the values of a vector of bytes: four float32 vectors."""

    @property
    def order(self) -> tuple[int, ...]:
        """The code, column * 16 + output, that each of 64 bytes must hold."""
        found = [0] * QUAD_BYTES
        for code in range(QUAD_BYTES):
            vector, rest = divmod(code, self.size)
            number, lane = divmod(rest, self.lanes)
            found[vector * self.size + self.byte_of(number, lane)] = code
        return tuple(found)


# ---------------------------------------------------------------- planes


@dataclass(frozen=True)
class Planes(CodeValues):
    """The `count` upper bytes of float32 values, each looked up in `parts` tables of 16."""

    value: Expr
    count: int
    lookup: ByteLookup
    parts: int = 1

    @property
    def by_block(self) -> bool:
        """Say whether blocks have tables of their own."""
        return BLOCK_INDEX in self.value.indices

    def tables(self, arrays: Mapping[str, Tensor], bits: int, blocks: int) -> Tensor:
        """Return the tables u8[blocks or 1, planes, parts * 16], the lowest byte first."""
        found = tabulated(self.value, arrays, bits, blocks if self.by_block else 1)
        size = TABLE * self.parts
        padded = torch.nn.functional.pad(found, (0, size - found.shape[1])).contiguous()
        planes: Tensor = padded.view(torch.uint8).unflatten(1, (size, 4)).transpose(1, 2)
        return planes[:, -self.count :]

    def load(self, buffer: Any, block: Any) -> list[Any]:
        """Load the tables of a block, each repeated over the vector: all parts of each plane."""
        found = []
        for plane in range(self.count):
            for part in range(self.parts):
                entries = span(part * TABLE, TABLE)
                at = [block if self.by_block else T.int64(0), T.int64(plane), entries]
                table = T.Bind(buffer[at])
                copies = self.size // TABLE
                found.append(T.Bind(shuffled([table] * copies, [*range(TABLE)] * copies)))
        return found

    def byte_of(self, number: int, lane: int) -> int:
        part, byte = divmod(lane, 4)
        return LANE_BYTES * part + 4 * number + byte

    def widen(self, codes: Any, planes: list[Any]) -> list[Any]:
        zero = splat(T.uint8(0), self.size)
        places = self.places(codes)
        found = [
            self.plane(planes[start : start + self.parts], places)
            for start in range(0, len(planes), self.parts)
        ]
        bytes = [zero] * (4 - self.count) + found
        low = bytes[:2] if self.count > 2 else None
        floats = []
        for half in range(2):
            upper = interleaved(bytes[2], bytes[3], half, 1)
            lower = zero if low is None else interleaved(low[0], low[1], half, 1)
            for quarter in range(2):
                bits = interleaved(lower, upper, quarter, 2)
                floats.append(T.Bind(T.reinterpret(f"float32x{self.lanes}", bits)))
        return floats

    def places(self, codes: Any) -> list[Any]:
        """Return the codes for each part of a table: with the top bit set, they find 0, where they
        name an entry of another part."""
        if self.parts == 1:
            return [codes]
        found = []
        for part in range(self.parts):
            own = T.bitwise_xor(codes, splat(T.uint8(TABLE * part), self.size)) if part else codes
            above = splat(T.uint8(self.lookup.above), self.size)
            found.append(T.Bind(own + above) if self.lookup.above else T.Bind(own))
        return found

    def plane(self, tables: list[Any], places: list[Any]) -> Any:
        """Look one byte of all values up."""
        kind = f"uint8x{self.size}"
        found = [
            T.reinterpret(kind, self.lookup(table, place))
            for table, place in zip(tables, places, strict=True)
        ]
        return T.Bind(reduce(T.bitwise_or, found))


def interleaved(low: Any, high: Any, half: int, width: int) -> Any:
    """Interleave elements of `width` bytes of one half of every 128 bits of two byte vectors."""
    size = int(str(low.ty).rpartition("x")[2])
    order = []
    for lane in range(0, size, LANE_BYTES):
        for element in range(LANE_BYTES // 2 // width):
            start = lane + half * LANE_BYTES // 2 + element * width
            for source in (0, size):
                order += [source + start + byte for byte in range(width)]
    return T.Bind(shuffled([low, high], order))


# ---------------------------------------------------------------- halves


@dataclass(frozen=True)
class Halves(CodeValues):
    """float16 bits = (code at the top of 16 bits >> shift) & mask, times 2^power.

    The shift repeats the top bit where it is `signed`.
    """

    bits: int
    shift: int
    mask: int
    signed: bool
    power: int
    target: Target

    @property
    def factor(self) -> float:
        return float(2.0**self.power)

    @property
    def up(self) -> int:
        return 8 - self.bits

    def byte_of(self, number: int, lane: int) -> int:
        half, quarter = divmod(number, 2)
        part, place = divmod(quarter * self.lanes + lane, 8)
        return LANE_BYTES * part + 8 * half + place

    def widen(self, codes: Any, planes: list[Any]) -> list[Any]:
        zero, count = splat(T.uint8(0), self.size), self.size // 2
        kind = f"{'int16' if self.signed else 'uint16'}x{count}"
        one = T.int16 if self.signed else T.uint16
        floats = []
        for half in range(2):
            value = T.reinterpret(kind, interleaved(zero, codes, half, 1))
            if self.shift:
                value = T.shift_right(value, splat(one(self.shift), count))
            value = T.reinterpret(f"uint16x{count}", value)
            if self.mask != 0xFFFF:
                value = T.bitwise_and(value, splat(T.uint16(self.mask), count))
            value = T.Bind(value)
            for quarter in range(2):
                lanes = range(quarter * self.lanes, (quarter + 1) * self.lanes)
                part = T.Bind(shuffled([value], lanes))
                floats.append(T.Bind(halves_to_float(part, self.lanes, self.target)))
        return floats


def as_halves(values: Tensor, bits: int, size: int, target: Target) -> Halves | None:
    """Find how to shift codes to the float16 bits of their values, over a power of two.

    Codes that are no numbers are never stored; what becomes of them does not matter.
    """
    known = values.isfinite()
    codes = (torch.arange(1 << bits) << (16 - bits))[known]
    signed = torch.where(codes >> 15 == 1, codes - (1 << 16), codes)
    for power in POWERS:
        scaled = values[known] / 2.0**power
        halves = scaled.half()
        if not torch.equal(halves.float(), scaled):
            continue
        wanted = (halves.view(torch.int16).int() & 0xFFFF).long()
        for shift in range(8):
            for top, repeats in ((signed, True), (codes, False)):
                mask = mask_for((top >> shift) & 0xFFFF, wanted)
                if mask is not None:
                    return Halves(size, bits, shift, mask, repeats, power, target)
    return None


POWERS = tuple(sorted(range(-24, 128), key=abs))
"""Powers of two that small floats are off from float16."""


def mask_for(moved: Tensor, wanted: Tensor) -> int | None:
    """Return the mask that makes `wanted` of `moved`; None where there is none."""
    wrong = reduce(or_, (moved ^ wanted).tolist(), 0)
    mask = 0xFFFF & ~wrong
    return mask if torch.equal(moved & mask, wanted) else None


# ---------------------------------------------------------------- integers


@dataclass(frozen=True)
class Integers(CodeValues):
    """The codes themselves."""

    def byte_of(self, number: int, lane: int) -> int:
        part, byte = divmod(lane, 4)
        return LANE_BYTES * part + 4 * number + byte

    def widen(self, codes: Any, planes: list[Any]) -> list[Any]:
        zero, floats = splat(T.uint8(0), self.size), []
        for half in range(2):
            words = interleaved(codes, zero, half, 1)
            for quarter in range(2):
                whole = T.reinterpret(f"int32x{self.lanes}", interleaved(words, zero, quarter, 2))
                floats.append(T.Bind(T.Cast(f"float32x{self.lanes}", whole)))
        return floats


# ---------------------------------------------------------------- the choice


def choose_values(
    value: Expr, code: Code, specs: Mapping[str, ArraySpec], target: Target
) -> CodeValues | None:
    """Choose how to widen codes that mean `value`; None where no way does."""
    size, bits = target.vector_bytes, code.width
    stored = value.reads
    lookup = byte_lookup(target)
    if bits <= (MOST_TABLE_BITS if stored else TABLE_BITS) and lookup is not None:
        parts = max(1, (1 << bits) // TABLE)
        return Planes(size, value, planes_of(value, bits, specs), lookup, parts)
    if stored:
        return None
    if value == ToFloat(CODE):
        return Integers(size)
    return as_halves(tabulated(value, {}, bits, 1)[0], bits, size, target)


def tabulated(value: Expr, arrays: Mapping[str, Tensor], bits: int, blocks: int) -> Tensor:
    """Return the values of all codes in all blocks: float32[blocks, 2^bits]."""
    indices = {
        CODE.axis: torch.arange(1 << bits, dtype=torch.int32).unsqueeze(0),
        BLOCK_INDEX.axis: torch.arange(blocks, dtype=torch.int32).unsqueeze(1),
    }
    found = TorchRendering(arrays, indices).value(value).float()
    return found.expand(blocks, 1 << bits).contiguous()


def planes_of(value: Expr, bits: int, specs: Mapping[str, ArraySpec]) -> int:
    """Return how many upper bytes of float32 values are not always 0, at least 2."""
    match value:
        case Load(array, _):
            return PLANES.get(specs[array].dtype, 4)
    if value.reads:
        return 4
    known = tabulated(value, {}, bits, 1).view(torch.uint8).unflatten(-1, (-1, 4))
    used = [bool(known[..., byte].any()) for byte in range(2)]
    return 4 - (used.index(True) if True in used else 2)


PLANES = {torch.float16: 3, torch.bfloat16: 2}
"""Upper bytes of a float32 that stored values reach; a float16 has 10 bits of mantissa."""
