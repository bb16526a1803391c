"""Streams of grouped codes times float32 inputs, decoded in registers.

One row of x reads the stream as it lies, and decodes it as it goes. Several rows share a block that
is decoded once to a panel f32[inner, 16].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.codes import StreamReader
from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.layout import BLOCK, STEP, Stream, stream_of
from qc.backends.tvm.linear.panels import add_tile, new_panel, reader_of
from qc.backends.tvm.linear.skeleton import Signature
from qc.backends.tvm.linear.term import Place, Products, TermKernel
from qc.backends.tvm.linear.vectors import float_lanes, prefetch, span, splat, sum_of_lanes

PREFETCH_BYTES = 2048


@dataclass(frozen=True, eq=False)
class FloatStream(TermKernel):
    """Decode a stream to float32."""

    rule: ClassVar[str] = "stream_float"
    place: Place
    stream: Stream

    @property
    def work(self) -> float:
        return 2.0 + 2.0 * max(map(len, self.stream.fields))

    def declare(self, signature: Signature) -> None:
        declare_stream(self.place, self.stream, signature)

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        inputs.need_values()

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        lanes = float_lanes(self.place.target)
        buffer = self.place.buffer(signature, "stream")
        reader = StreamReader(self.stream, buffer, block, self.place.target, lanes)
        panel = self.decode(reader) if many else None

        def add(row: Any, height: int, sums: Any) -> None:
            if panel is None:
                self.add_row(reader, inputs, row, sums[0])
            else:
                read = reader_of(panel, lanes)
                add_tile(inputs.values, self.place.inner, read, lanes, row, height, sums)

        return add

    def at(self, reader: StreamReader, step: Any) -> tuple[Any, Any]:
        """Return where the group of a step starts, and its codes."""
        steps = T.int64(self.stream.group // STEP)
        head = T.Bind(reader.head(T.floordiv(step, steps)))
        inside = T.floormod(step, steps) * self.stream.step_bytes
        return head, T.Bind(head + self.stream.head_bytes + inside)

    def add_row(self, reader: StreamReader, inputs: Inputs, row: Any, sums: Any) -> None:
        """Multiply one row, decoding as it goes."""
        lanes, x = reader.lanes, inputs.values
        with T.serial(T.int64(0), T.int64(self.place.inner // STEP)) as step:
            head, codes = self.at(reader, step)
            for line in range(0, self.stream.step_bytes + self.stream.head_bytes, 64):
                prefetch(T.address_of(reader.buffer[reader.block, codes + (PREFETCH_BYTES + line)]))
            parts = [x[row, span(step * STEP + at, lanes)] for at in range(0, STEP, lanes)]
            total = T.Bind(sum_of_lanes(sum(parts[1:], parts[0])))
            for first in range(0, BLOCK, lanes):
                chains: list[Any] = [None, None]
                for k, code in enumerate(reader.floats(codes, first)):
                    product = code * splat(x[row, step * STEP + k], lanes)
                    known = chains[k % 2]
                    chains[k % 2] = T.Bind(product if known is None else known + product)
                at, scale = span(first, lanes), reader.scale(head, first)
                minimum = reader.minimum(head, first, scale)
                value = sums[at] + scale * (chains[0] + chains[1]) + minimum * splat(total, lanes)
                T.buffer_store(sums, value, [at])

    def decode(self, reader: StreamReader) -> Any:
        """Decode a block to a panel."""
        panel, lanes = new_panel(self.place.inner), reader.lanes
        with T.serial(T.int64(0), T.int64(self.place.inner // STEP)) as step:
            head, codes = self.at(reader, step)
            for first in range(0, BLOCK, lanes):
                scale = reader.scale(head, first)
                minimum = reader.minimum(head, first, scale)
                for k, code in enumerate(reader.floats(codes, first)):
                    at = span((step * STEP + k) * BLOCK + first, lanes)
                    T.buffer_store(panel, code * scale + minimum, [at])
        return panel


def declare_stream(place: Place, stream: Stream, signature: Signature) -> None:
    """Declare the stream of a grouped term."""
    shape = (stream.blocks, stream.block_bytes)
    place.declare(signature, "stream", "uint8", shape, stream.repack)


def float_stream_term(place: Place) -> TermKernel | None:
    """Multiply by codes that are grouped in steps of 32 inputs."""
    stream = stream_of(place.format, place.outer, place.inner)
    return None if stream is None else FloatStream(place, stream)
