"""The stream: how grouped codes lie in memory for the x86 kernels.

Outputs go in blocks of 16, each block one contiguous stream of its groups, so that a matrix-vector
product reads memory strictly forward. The same bytes serve vectors of 16, 32 and 64 bytes.

    block    where scales or minima are codes times a factor for each output: 16 float16 factors of
             the scales, and of the minima; then the groups
    group    16 scales (float16, or u8 codes), 16 offsets (float16 minima, their u8 codes, or u8
             zeros; none where symmetric), then one step for every 32 inputs
    step     as many vectors of 64 bytes as a code has bits, which hold the fields of 8 quads
    vector   16 outputs x 4 inputs (a "quad"), as multiply-add instructions on bytes want them
    field    bits of the codes of one quad, in the same place of every byte of a vector: codes are
             cut into pieces of 4, 2 or 1 bits (8 for int8), low bits first, and of a piece quad 0
             is in the lowest bits. Codes of 3 bits are kept whole where they can be: two quads in
             each vector, and the last two quads in the bits that are left
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qc.ir.weights.grouped import GroupedFormat
from qc.ir.weights.packing import unpack_codes
from qc.ir.weights.weight import TermFormat

BLOCK = 16
STEP = 32
QUADS = STEP // 4
ROWS_AT_ONCE = 4096  # unpacked codes take a byte each: bounds what repacking needs

PIECES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Widths of the pieces of a code, from its low bits."""


@dataclass(frozen=True)
class Piece:
    """Bits `shift` to `shift + width` of the codes; its vectors start at byte `start` of a step."""

    width: int
    shift: int

    @property
    def start(self) -> int:
        return 4 * BLOCK * self.shift


def pieces_of(bits: int) -> tuple[Piece, ...]:
    """Cut codes of `bits` bits into pieces."""
    widths = PIECES[bits]
    return tuple(Piece(width, sum(widths[:number])) for number, width in enumerate(widths))


@dataclass(frozen=True)
class Field:
    """Bits `shift` to `shift + width` of the codes of a quad, from bit `low` of the bytes of vector
    number `vector` of a step."""

    vector: int
    low: int
    width: int
    shift: int


THREE_BITS = tuple(
    tuple(Field(*field) for field in quad)
    for quad in (
        [(0, 0, 3, 0)], [(0, 3, 3, 0)], [(1, 0, 3, 0)], [(1, 3, 3, 0)], [(2, 0, 3, 0)],
        [(2, 3, 3, 0)], [(0, 6, 2, 0), (2, 6, 1, 2)], [(1, 6, 2, 0), (2, 7, 1, 2)],
    )
)  # fmt: skip
"""Codes of 3 bits: 19 instructions for 8 quads, against 35 where each is cut into 2 + 1 bits."""


def fields_of(bits: int) -> tuple[tuple[Field, ...], ...]:
    """Return the fields of each quad of a step, for codes of `bits` bits."""
    if bits == 3:
        return THREE_BITS
    quads: list[list[Field]] = [[] for _ in range(QUADS)]
    for piece in pieces_of(bits):
        for quad, fields in enumerate(quads):
            number, place = divmod(quad, 8 // piece.width)
            fields.append(
                Field(piece.shift + number, place * piece.width, piece.width, piece.shift)
            )
    return tuple(map(tuple, quads))


@dataclass(frozen=True)
class Stream:
    """The layout of a weight [outer, inner] in a grouped format."""

    format: GroupedFormat
    outer: int
    inner: int

    @property
    def group(self) -> int:
        """Inputs of a full group."""
        return self.format.group_size(self.inner)

    @property
    def blocks(self) -> int:
        return -(-self.outer // BLOCK)

    @property
    def step_bytes(self) -> int:
        return STEP * BLOCK * self.format.bits_per_code // 8

    @property
    def coded(self) -> tuple[str, ...]:
        """Which of scales and minima are codes times a factor for each output."""
        inner = {"scale": self.format.scale, "minimum": self.format.minimum}
        return tuple(name for name, format in inner.items() if format is not None)

    @property
    def factor_bytes(self) -> int:
        """Bytes in front of the groups of a block."""
        return 2 * BLOCK * len(self.coded)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one group."""
        return BLOCK if "scale" in self.coded else 2 * BLOCK

    @property
    def head_bytes(self) -> int:
        """Bytes of the scales and offsets of one group."""
        if self.format.offset == "symmetric":
            return self.scale_bytes
        wide = self.format.offset == "minimum" and "minimum" not in self.coded
        return self.scale_bytes + (2 * BLOCK if wide else BLOCK)

    @property
    def group_bytes(self) -> int:
        """Bytes of a full group."""
        return self.head_bytes + self.group // STEP * self.step_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of the stream of one block."""
        heads = self.format.groups(self.inner) * self.head_bytes
        return self.factor_bytes + heads + self.inner // STEP * self.step_bytes

    @cached_property
    def fields(self) -> tuple[tuple[Field, ...], ...]:
        """Where the codes of each quad of a step are."""
        return fields_of(self.format.bits_per_code)

    def repack(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the stream u8[blocks, block_bytes] of the arrays of a term in this format."""
        result = torch.empty(self.blocks, self.block_bytes, dtype=torch.uint8)
        for start in range(0, self.outer, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            codes = unpacked(arrays["codes"][rows], self.format.bits_per_code, self.inner)
            names = (
                ("scale",) if self.format.offset == "symmetric" else ("scale", self.format.offset)
            )
            heads = [self.packed_head(self.per_group(name, arrays, rows)) for name in names]
            factors = [self.packed_head(arrays[f"{n}.scale"][rows]).flatten(1) for n in self.coded]
            parts = self.interleaved(torch.cat(heads, -1), self.packed_codes(codes))
            packed = torch.cat([*factors, *parts], 1)
            result[start // BLOCK : start // BLOCK + len(packed)] = packed
        return result

    def per_group(self, name: str, arrays: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Return scales or offsets [rows, groups], or their codes."""
        if name not in self.coded:
            return arrays[name][rows]
        format = self.format.scale if name == "scale" else self.format.minimum
        assert isinstance(format, GroupedFormat)
        groups = self.format.groups(self.inner)
        return unpacked(arrays[f"{name}.codes"][rows], format.bits_per_code, groups)

    def packed_head(self, per_group: Tensor) -> Tensor:
        """Return the bytes u8[blocks, groups, n] of scales or offsets [rows, groups]."""
        blocks = in_blocks(per_group).transpose(1, 2).contiguous()
        return blocks.view(torch.uint8)

    def packed_codes(self, codes: Tensor) -> Tensor:
        """Return the bytes u8[blocks, steps, step_bytes] of codes u8[rows, inner]."""
        quads = in_blocks(codes).unflatten(2, (-1, QUADS, 4)).permute(0, 2, 3, 1, 4).flatten(3)
        shape = (*quads.shape[:2], self.format.bits_per_code, quads.shape[3])
        vectors = torch.zeros(shape, dtype=torch.uint8)
        for number, fields in enumerate(self.fields):
            for field in fields:
                bits = (quads[:, :, number] >> field.shift) & ((1 << field.width) - 1)
                vectors[:, :, field.vector] |= bits << field.low
        return vectors.flatten(2)

    def interleaved(self, heads: Tensor, steps: Tensor) -> Iterator[Tensor]:
        """Put each group's head before its steps; the last group may be shorter."""
        full, each = self.inner // self.group, self.group // STEP
        together = steps[:, : full * each].unflatten(1, (full, each)).flatten(2)
        yield torch.cat([heads[:, :full], together], -1).flatten(1)
        if self.inner % self.group:
            yield heads[:, full]
            yield steps[:, full * each :].flatten(1)


def stream_of(format: TermFormat, outer: int, inner: int) -> Stream | None:
    """Return the layout of a term that is grouped in steps of 32; None otherwise."""
    match format:
        case GroupedFormat(tile_rows=1) if (
            format.offset != "none"
            and is_row_scaled(format.scale)
            and is_row_scaled(format.minimum)
        ):
            stream = Stream(format, outer, inner)
            return stream if inner % STEP == 0 and stream.group % STEP == 0 else None
    return None


def is_row_scaled(format: TermFormat | None) -> bool:
    """Say whether scales or minima are plain, or codes of one sign times a factor of each row."""
    match format:
        case None:
            return True
        case GroupedFormat(offset="none", tile_rows=1, group=None, scale=None, minimum=None):
            return True
    return False


def in_blocks(rows: Tensor) -> Tensor:
    """View [rows, n] as [blocks, 16, n], zero-padded."""
    padded: Tensor = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % BLOCK))
    return padded.view(-1, BLOCK, padded.shape[1])


def unpacked(packed: Tensor, bits: int, cols: int) -> Tensor:
    """Return codes u8[rows, cols]; faster than the general way where no code straddles bytes."""
    if 8 % bits:
        return unpack_codes(packed, bits, cols)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :cols]
