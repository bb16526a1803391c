"""How the codes of elements lie in memory to be read as vectors of bytes.

Outputs go in blocks of 16, each block one contiguous stream of steps of 32 columns. A step has the
codes' bits in pieces of 4, 2 or 1 bits (8 for whole bytes), low bits first; a piece of b bits takes
b vectors of 64 bytes, each with 4 columns x 16 outputs in the lowest b bits of every byte, the next
4 columns above them. In which order the 64 codes lie is what their reader wants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.codes import Part
from qc.backends.tvm.linear.layout import (
    BLOCK,
    QUADS,
    ROWS_AT_ONCE,
    STEP,
    Piece,
    in_blocks,
    pieces_of,
)
from qc.backends.tvm.linear.vectors import prefetch, span
from qc.ir.weights.packing import unpack_codes

QUAD = 4
"""Columns whose codes lie in one vector of 64 bytes."""

QUAD_BYTES = QUAD * BLOCK
PREFETCH_BYTES = 2048


@dataclass(frozen=True)
class CodeLanes:
    """The codes of `bits` bits of a matrix [outer, inner], stored in `array`.

    `order` says which code of a quad, column * 16 + output, lies at each of 64 bytes.
    """

    array: str
    bits: int
    outer: int
    inner: int
    order: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return -(-self.outer // BLOCK)

    @property
    def step_bytes(self) -> int:
        return STEP * BLOCK * self.bits // 8

    @property
    def block_bytes(self) -> int:
        """Bytes of a block; the last step is full."""
        return -(-self.inner // STEP) * self.step_bytes

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """How codes are split."""
        return pieces_of(self.bits)

    def repack(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the stream u8[blocks, block_bytes]."""
        parts = [self.packed(rows) for rows in arrays[self.array].split(ROWS_AT_ONCE)]
        return torch.cat(parts) if parts else torch.empty(0, self.block_bytes, dtype=torch.uint8)

    def packed(self, rows: Tensor) -> Tensor:
        """Return the stream of some rows of packed codes."""
        codes = unpack_codes(rows, self.bits, self.inner)
        padded = in_blocks(torch.nn.functional.pad(codes, (0, -self.inner % STEP)))
        quads = padded.unflatten(2, (-1, QUADS, QUAD)).permute(0, 2, 3, 4, 1).flatten(3)
        ordered: Tensor = quads[..., list(self.order)]
        vectors = [self.vectors(piece, ordered) for piece in self.pieces]
        return torch.cat(vectors, -1).flatten(1)

    def vectors(self, piece: Piece, codes: Tensor) -> Tensor:
        """Return one piece of the codes u8[blocks, steps, quads, 64]: [blocks, steps, bytes]."""
        bits = (codes >> piece.shift) & ((1 << piece.width) - 1)
        together = bits.unflatten(2, (piece.width, -1))
        found: Tensor = together[:, :, :, 0]
        for place in range(1, 8 // piece.width):
            found = found | (together[:, :, :, place] << (place * piece.width))
        return found.flatten(2)


@dataclass(frozen=True)
class LaneReader:
    """The stream of one block, read in vectors of `size` bytes."""

    lanes: CodeLanes
    buffer: Any
    block: Any
    size: int

    def prefetch(self, step: Any) -> None:
        """Ask for what follows in some steps."""
        for line in range(0, self.lanes.step_bytes, 64):
            ahead = step * self.lanes.step_bytes + (PREFETCH_BYTES + line)
            prefetch(T.address_of(self.buffer[self.block, ahead]))

    def quads(self, step: Any, up: int = 0) -> Iterator[list[Any]]:
        """Yield the codes of each quad of a step as vectors of bytes, shifted `up` bits.

        Each is emitted where it is asked for: what is loaded long before it is used is spilled.
        """
        start = T.Bind(step * self.lanes.step_bytes)
        chunks: dict[int, Any] = {}
        for quad in range(QUADS):
            vectors = []
            for vector in range(QUAD_BYTES // self.size):
                parts = []
                for piece in self.lanes.pieces:
                    number, place = divmod(quad, 8 // piece.width)
                    at = piece.start + QUAD_BYTES * number + vector * self.size
                    if at not in chunks:
                        chunks[at] = T.Bind(self.buffer[self.block, span(start + at, self.size)])
                    parts.append(Part(chunks[at], place * piece.width, piece.width, piece.shift))
                vectors.append(self.joined(parts, up))
            yield vectors

    def joined(self, parts: list[Part], up: int) -> Any:
        """Put the parts of codes together."""
        placed = [part.as_bytes(self.size, part.shift + up) for part in parts]
        return T.Bind(reduce(T.bitwise_or, placed))
