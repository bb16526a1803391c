"""Reading a stream in a kernel: codes as byte vectors, scales and offsets as floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.layout import BLOCK, QUADS, Piece, Stream
from qc.backends.tvm.linear.vectors import halves_to_float, span, splat, typed
from qc.ir.target import Target

Load = Callable[[int], Any]
"""Byte offset within a step -> vector of bytes."""


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

    def parts(self, offset: Any, first: int) -> list[list[tuple[Any, int]]]:
        """Return, for each quad of the step at `offset`, parts of the codes of `lanes` outputs.

        A part is a vector of 4 `lanes` bytes and the shift that puts its bits in place.
        """
        width = 4 * self.lanes
        found: list[list[tuple[Any, int]]] = [[] for _ in range(QUADS)]
        for piece in self.stream.pieces:
            for number in range(piece.width):
                start = offset + (piece.start + 4 * BLOCK * number + 4 * first)
                chunk = T.Bind(self.bytes_at(start, width))
                for place in range(8 // piece.width):
                    quad = number * (8 // piece.width) + place
                    found[quad].append((extracted(chunk, piece, place, width), piece.shift))
        return found

    def scale(self, head: Any, first: int) -> Any:
        """Load the scales of `lanes` outputs of the group at `head`."""
        return T.Bind(self.halves(head, first))

    def minimum(self, head: Any, first: int, scale: Any) -> Any:
        """Load what every weight of a group has beside code * scale."""
        offsets = head + 2 * BLOCK
        format = self.stream.format
        if format.offset == "minimum":
            return T.Bind(self.halves(offsets, first))
        if format.offset == "zero":
            zero = T.Cast(typed("float32", self.lanes), self.bytes_at(offsets + first, self.lanes))
            return T.Bind(zero * scale * splat(T.float32(-1), self.lanes))
        middle = -float(1 << (format.bits_per_code - 1))
        return T.Bind(scale * splat(T.float32(middle), self.lanes))

    def halves(self, start: Any, first: int) -> Any:
        """Load float16 values of `lanes` outputs as float32."""
        stored = self.bytes_at(start + 2 * first, 2 * self.lanes)
        bits = T.reinterpret(typed("uint16", self.lanes), stored)
        return halves_to_float(bits, self.lanes, self.target)


def extracted(chunk: Any, piece: Piece, place: int, width: int) -> Any:
    """Return the bits of one quad of a piece."""
    if piece.width == 8:
        return chunk
    value = chunk
    if place:
        value = T.shift_right(chunk, splat(T.uint8(place * piece.width), width))
    if place == 8 // piece.width - 1:
        return value
    return T.bitwise_and(value, splat(T.uint8((1 << piece.width) - 1), width))


def joined(parts: list[tuple[Any, int]], width: int) -> Any:
    """Put the parts of codes together in one byte each."""
    placed = [
        T.shift_left(value, splat(T.uint8(shift), width)) if shift else value
        for value, shift in parts
    ]
    return T.Bind(reduce(T.bitwise_or, placed))


def nibbles(parts: list[tuple[Any, int]], bits: int, width: int) -> list[Any]:
    """Return the low four bits of codes and, where they are wider, the others."""
    if bits == 8:
        value = parts[0][0]
        low = T.bitwise_and(value, splat(T.uint8(15), width))
        return [T.Bind(low), T.Bind(T.shift_right(value, splat(T.uint8(4), width)))]
    low = joined([part for part in parts if part[1] < 4], width)
    high = [(value, shift - 4) for value, shift in parts if shift >= 4]
    return [low, joined(high, width)] if high else [low]
