"""Reading bit planes in a kernel: coefficients, and blocks decoded to float32 for several rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.bit_serial_layout import PLANE_BYTES, SLOT, PlaneStream
from qc.backends.tvm.linear.layout import BLOCK, QUADS, STEP
from qc.backends.tvm.linear.panels import new_panel
from qc.backends.tvm.linear.vectors import float_lanes, halves_to_float, span, splat, typed
from qc.ir.target import Target


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


def shuffled(vectors: Sequence[Any], order: Sequence[int]) -> Any:
    """Return some lanes of vectors."""
    return T.Shuffle(list(vectors), [T.int32(n) for n in order])


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
            with T.serial(T.int64(0), T.int64(QUADS // 2)) as number:
                patterns = patterns_of(reader, codes, number, first)
                for bit in range(8):
                    value = base
                    digits_of = panel_digits(stream, patterns, bit, lanes)
                    for factor, digit in zip(factors, digits_of, strict=True):
                        value = value + factor * T.Cast(typed("float32", lanes), digit)
                    column = step * STEP + number * 4 + (bit % 4 + bit // 4 * (STEP // 2))
                    T.buffer_store(panel, value, [span(column * BLOCK + first, lanes)])
    return panel


def panel_base(reader: PlaneReader, head: Any, factors: list[Any], first: int) -> Any:
    """Return what the weights of a group have beside factor * digit."""
    base = splat(T.float32(0), reader.lanes)
    if reader.stream.offset:
        base = reader.halves(head, reader.stream.planes, first)
    if reader.stream.signs:
        base = base - sum(factors[1:], factors[0])
    return T.Bind(base)


def patterns_of(reader: PlaneReader, codes: Any, number: Any, first: int) -> list[Any]:
    """Load pattern `number` of every bit plane as int32, for `lanes` outputs in order."""
    found = []
    for bundle in reader.stream.bundles:
        size = SLOT * len(bundle)
        at = codes + bundle.start * PLANE_BYTES + number * size
        stored = T.Bind(reader.bytes_at(at, size))
        places = {byte: place for place, byte in enumerate(reader.stream.bytes_of(bundle))}
        for plane in range(len(bundle)):
            order = [places[plane, output] for output in range(first, first + reader.lanes)]
            chosen = shuffled([stored], order)
            found.append(T.Bind(T.Cast(typed("int32", reader.lanes), chosen)))
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
