"""Bit planes in memory: patterns of four inputs, for kernels that look sums up in tables.

Outputs go in blocks of 16, each block one contiguous stream of its groups:

    group     16 float16 coefficients for each plane of the format, 16 offsets where it has them,
              then one step for every 32 inputs
    step      bundles of two bit planes, at the end one alone where their number is odd
    bundle    four patterns: in pattern b, byte n has four bits for inputs 4 b to 4 b + 3 of a bit
              plane and an output, and above them four bits for the inputs 16 later; the first input
              is the lowest bit
    pattern   16 bytes for each of the bit planes. Those of two lie side by side, so that one table
              serves both: first 8 outputs of one and of the other, then the rest of them. The two
              bit planes of trits, where a weight is 1 and where it is -1, alternate byte by byte.
              Outputs come in the order 0, 8, 1, 9, 2, 10, 3, 11, then 4, 12, ...: as pairs of
              16-bit sums are widened

Trits take 2 bits here. Five a byte would save a fifth of the memory; but taking 32 apart in vectors
is about 6 instructions, as many as all others together, and only the memory can pay for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qc.backends.tvm.linear.layout import BLOCK, QUADS, ROWS_AT_ONCE, STEP, in_blocks
from qc.ir.weights.packing import unpack_codes
from qc.ir.weights.planes import PlanesFormat
from qc.ir.weights.ternary import TernaryFormat, trits_of_bytes
from qc.ir.weights.weight import TermFormat

SLOT = BLOCK
"""Bytes of a lane of a vector, each with a table of its own, and entries of a table."""

PLANE_BYTES = STEP * BLOCK // 8
"""Bytes of a bit plane in a step."""

ORDER = tuple(4 * half + n // 2 + n % 2 * 8 for half in range(2) for n in range(8))
"""Outputs of a block in the order of their bytes."""


@dataclass(frozen=True)
class PlaneStream:
    """The layout of a weight [outer, inner] of bit planes or trits."""

    format: PlanesFormat | TernaryFormat
    outer: int
    inner: int

    @property
    def trits(self) -> bool:
        return isinstance(self.format, TernaryFormat) or self.format.alphabet == "trits"

    @property
    def signs(self) -> bool:
        return isinstance(self.format, PlanesFormat) and self.format.alphabet == "signs"

    @property
    def offset(self) -> bool:
        """Whether an offset is stored."""
        return isinstance(self.format, PlanesFormat) and self.format.offset == "stored"

    @property
    def planes(self) -> int:
        """Planes that have a coefficient."""
        return self.format.planes if isinstance(self.format, PlanesFormat) else 1

    @property
    def bit_planes(self) -> int:
        return self.planes * (2 if self.trits else 1)

    @cached_property
    def bundles(self) -> tuple[range, ...]:
        """The bit planes that lie side by side."""
        starts = range(0, self.bit_planes, 2)
        return tuple(range(start, min(start + 2, self.bit_planes)) for start in starts)

    @property
    def group(self) -> int:
        """Inputs of a full group."""
        return self.format.tile.size((self.outer, self.inner))[1]

    @property
    def groups(self) -> int:
        return -(-self.inner // self.group)

    @property
    def blocks(self) -> int:
        return -(-self.outer // BLOCK)

    @property
    def step_bytes(self) -> int:
        return PLANE_BYTES * self.bit_planes

    @property
    def head_bytes(self) -> int:
        """Bytes of the coefficients and offsets of one group."""
        return 2 * BLOCK * (self.planes + self.offset)

    @property
    def group_bytes(self) -> int:
        """Bytes of a full group."""
        return self.head_bytes + self.group // STEP * self.step_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of the stream of one block."""
        return self.groups * self.head_bytes + self.inner // STEP * self.step_bytes

    def bytes_of(self, bundle: range) -> list[tuple[int, int]]:
        """Return the bit plane, within its bundle, and the output of each byte of a pattern."""
        if len(bundle) == 1:
            return [(0, output) for output in ORDER]
        halves = ORDER[:8], ORDER[8:]
        if self.trits:
            return [(plane, output) for half in halves for output in half for plane in range(2)]
        return [(plane, output) for half in halves for plane in range(2) for output in half]

    def repack(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the stream u8[blocks, block_bytes] of the arrays of a term in this format."""
        result = torch.empty(self.blocks, self.block_bytes, dtype=torch.uint8)
        heads = self.packed_heads(arrays)
        for start in range(0, self.outer, ROWS_AT_ONCE):
            steps = self.packed_steps(self.bits(arrays, slice(start, start + ROWS_AT_ONCE)))
            missing = -steps.shape[1] % (self.group // STEP)
            steps = torch.nn.functional.pad(steps, (0, 0, 0, missing)).unflatten(
                1, (self.groups, -1)
            )
            blocks = slice(start // BLOCK, start // BLOCK + len(steps))
            whole = torch.cat([heads[blocks], steps.flatten(2)], -1).flatten(1)
            result[blocks] = whole[:, : self.block_bytes]
        return result

    def packed_heads(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the coefficients and offsets u8[blocks, groups, head_bytes]."""
        if isinstance(self.format, TernaryFormat):
            tiled = [arrays["scale"]]
        else:
            tiled = [*arrays["coefficients"]] + ([arrays["offset"]] if self.offset else [])
        rows = self.format.tile.size((self.outer, self.inner))[0]
        by_row = [each.repeat_interleave(rows, 0)[: self.outer] for each in tiled]
        blocks = torch.stack([in_blocks(each) for each in by_row], 1)  # [blocks, n, 16, groups]
        return blocks.permute(0, 3, 1, 2).contiguous().view(torch.uint8).flatten(2)

    def bits(self, arrays: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Return the bit planes u8[bit_planes, rows, inner] of some rows."""
        digits = self.digits(arrays, rows)
        if not self.trits:
            return digits
        return torch.stack([digits == 2, digits == 0], 1).flatten(0, 1).to(torch.uint8)

    def digits(self, arrays: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Return the digits u8[planes, rows, inner] of some rows."""
        if isinstance(self.format, PlanesFormat):
            packed = arrays["planes"][:, rows]
            return self.format.digits((packed.shape[1], self.inner), packed)
        packed = arrays["codes"][rows]
        if self.format.packing == "base3":
            trits = trits_of_bytes()[packed.long()].flatten(1)[:, : self.inner]
        else:
            trits = unpack_codes(packed, 2, self.inner)
        return trits.unsqueeze(0)

    def packed_steps(self, bits: Tensor) -> Tensor:
        """Return the bytes u8[blocks, steps, step_bytes] of bit planes."""
        blocks = torch.stack([in_blocks(plane) for plane in bits])
        quads = blocks.unflatten(3, (-1, QUADS, 4))
        patterns = quads[..., 0]
        for number in range(1, 4):
            patterns = patterns | (quads[..., number] << number)
        both = patterns[..., : QUADS // 2] | (patterns[..., QUADS // 2 :] << 4)
        slots = both.permute(1, 3, 4, 0, 2)  # [blocks, steps, patterns, planes, 16]
        parts = []
        for bundle in self.bundles:
            order = [BLOCK * plane + output for plane, output in self.bytes_of(bundle)]
            parts.append(slots[:, :, :, list(bundle)].flatten(3)[..., order].flatten(2))
        return torch.cat(parts, -1)


def plane_stream_of(format: TermFormat, outer: int, inner: int) -> PlaneStream | None:
    """Return the layout of bit planes or trits whose groups are whole steps; None otherwise.

    Tiles of several outputs have one float16 a row here, which only whole rows can afford.
    """
    match format:
        case PlanesFormat() | TernaryFormat(scale=None):
            stream = PlaneStream(format, outer, inner)
        case _:
            return None
    if not inner or inner % STEP or stream.group % STEP:
        return None
    return stream if format.tile_rows == 1 or stream.groups == 1 else None
