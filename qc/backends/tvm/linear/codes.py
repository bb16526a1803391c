"""Reading a stream in a kernel: codes as bytes or floats, scales and minima as floats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.layout import BLOCK, Stream
from qc.backends.tvm.linear.vectors import halves_to_float, span, splat, typed
from qc.ir.target import Target


@dataclass(frozen=True)
class Part:
    """Some bits of the codes of one quad: `width` bits from bit `low` of every byte of `chunk`,
    which are the bits from `shift` on of the codes."""

    chunk: Any
    low: int
    width: int
    shift: int

    def as_bytes(self, size: int, at: int = 0) -> Any:
        """Return the bits as `size` bytes, in place `at` of each: one shift and one mask."""
        value, move = self.chunk, self.low - at
        if move > 0:
            value = T.shift_right(value, splat(T.uint8(move), size))
        elif move < 0:
            value = T.shift_left(value, splat(T.uint8(-move), size))
        if self.low + self.width == 8 and at == 0:
            return value
        return T.bitwise_and(value, splat(T.uint8(((1 << self.width) - 1) << at), size))

    def as_integers(self, byte: int, lanes: int) -> Any:
        """Return the bits of the input number `byte` of the quad as int32, in place."""
        value = T.reinterpret(typed("int32", lanes), self.chunk)
        if 8 * byte + self.low:
            value = T.shift_right(value, splat(T.int32(8 * byte + self.low), lanes))
        value = T.bitwise_and(value, splat(T.int32((1 << self.width) - 1), lanes))
        return T.shift_left(value, splat(T.int32(self.shift), lanes)) if self.shift else value


@dataclass(frozen=True)
class StreamReader:
    """The stream of one block of outputs, read in vectors of `lanes` outputs."""

    stream: Stream
    buffer: Any
    block: Any
    target: Target
    lanes: int

    def bytes_at(self, offset: Any, count: int) -> Any:
        """Load bytes of the stream."""
        return self.buffer[self.block, span(offset, count)]

    def head(self, group: Any) -> Any:
        """Return where a group starts."""
        return group * self.stream.group_bytes + self.stream.factor_bytes

    def quads(self, offset: Any, first: Any) -> list[list[Part]]:
        """Load the codes of `lanes` outputs of the step at `offset`: the parts of each quad."""
        vectors = [
            T.Bind(self.bytes_at(offset + (4 * BLOCK * number + 4 * first), 4 * self.lanes))
            for number in range(self.stream.format.bits_per_code)
        ]
        return [
            [Part(vectors[f.vector], f.low, f.width, f.shift) for f in fields]
            for fields in self.stream.fields
        ]

    def floats(self, offset: Any, first: Any) -> Iterator[Any]:
        """Yield the codes of `lanes` outputs as float32, for each input of the step at `offset`."""
        for parts in self.quads(offset, first):
            for byte in range(4):
                code = reduce(T.bitwise_or, (p.as_integers(byte, self.lanes) for p in parts))
                yield T.Cast(typed("float32", self.lanes), code)

    def scale(self, head: Any, first: Any) -> Any:
        """Load the scales of `lanes` outputs of the group at `head`."""
        if "scale" in self.stream.coded:
            return T.Bind(self.coded("scale", head, first))
        return T.Bind(self.halves(head, first))

    def coded(self, name: str, start: Any, first: Any) -> Any:
        """Load u8 codes of `lanes` outputs, times the factors of their rows."""
        codes = T.Cast(typed("float32", self.lanes), self.bytes_at(start + first, self.lanes))
        factors = T.int64(2 * BLOCK * self.stream.coded.index(name))
        return codes * self.halves(factors, first)

    def minimum(self, head: Any, first: Any, scale: Any) -> Any:
        """Return what the weights of a group have beside code * scale."""
        offsets = head + self.stream.scale_bytes
        format = self.stream.format
        if "minimum" in self.stream.coded:
            return T.Bind(self.coded("minimum", offsets, first))
        if format.offset == "minimum":
            return T.Bind(self.halves(offsets, first))
        if format.offset == "zero":
            zero = T.Cast(typed("float32", self.lanes), self.bytes_at(offsets + first, self.lanes))
            return T.Bind(zero * scale * splat(T.float32(-1), self.lanes))
        middle = -float(1 << (format.bits_per_code - 1))
        return T.Bind(scale * splat(T.float32(middle), self.lanes))

    def halves(self, start: Any, first: Any) -> Any:
        """Load float16 values of `lanes` outputs as float32."""
        stored = self.bytes_at(start + 2 * first, 2 * self.lanes)
        bits = T.reinterpret(typed("uint16", self.lanes), stored)
        return halves_to_float(bits, self.lanes, self.target)


def joined(parts: Sequence[Part], size: int, shift: int = 0) -> Any:
    """Put parts of codes together in one byte each; `shift` is the lowest bit that is kept."""
    placed = [part.as_bytes(size, part.shift - shift) for part in parts]
    return T.Bind(reduce(T.bitwise_or, placed))


def nibbles(parts: Sequence[Part], size: int) -> list[Any]:
    """Return the low four bits of codes and, where they are wider, the bits above them."""
    if parts[0].width == 8:
        chunk = parts[0].chunk
        parts = [Part(chunk, 0, 4, 0), Part(chunk, 4, 4, 4)]
    low = [part for part in parts if part.shift < 4]
    high = [part for part in parts if part.shift >= 4]
    return [joined(low, size), joined(high, size, shift=4)] if high else [joined(low, size)]
