"""Grouped integer codes: int2 to int8, one scale for every `group` weights of a row.

A row is a little-endian bit stream of codes; its last group may be shorter than the others.
With code q of `bits` bits, scale s and, by kind of offset:

    symmetric   w = (q - 2^(bits-1)) s
    zero        w = (q - z) s          z: integer zero point, u8
    minimum     w = q s + m            m: float16

Scales and minima are float16. Source of the layout: section 3 of GPTQ (Frantar et al. 2022)
for groups, llama.cpp's Q4_1 for float minima.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch
from torch import Tensor

from qc.ir.weights.expression import Const, Expr, Load, ToFloat, minimum
from qc.ir.weights.weight import ArraySpec, Term, TermFormat

Offset = Literal["symmetric", "zero", "minimum"]


@dataclass(frozen=True)
class GroupedFormat(TermFormat):
    """`group=None` means one group a row."""

    bits_per_code: int
    group: int | None = None
    offset: Offset = "symmetric"

    def __post_init__(self) -> None:
        if not 2 <= self.bits_per_code <= 8:
            raise ValueError(f"grouped codes have 2 to 8 bits, not {self.bits_per_code}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"a group holds at least one weight, not {self.group}")

    def group_size(self, cols: int) -> int:
        """Return the weights per full group of a row of `cols`."""
        return max(1, cols if self.group is None else min(self.group, cols))

    def groups(self, cols: int) -> int:
        """Return the groups per row, the tail included."""
        return -(-cols // self.group_size(cols))

    def row_bytes(self, cols: int) -> int:
        """Return the bytes of one row of codes."""
        return -(-cols * self.bits_per_code // 8)

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        rows, cols = shape
        per_group = (rows, self.groups(cols))
        stored = {
            "codes": ArraySpec((rows, self.row_bytes(cols)), torch.uint8),
            "scale": ArraySpec(per_group, torch.float16),
        }
        if self.offset == "zero":
            stored["zero"] = ArraySpec(per_group, torch.uint8)
        if self.offset == "minimum":
            stored["minimum"] = ArraySpec(per_group, torch.float16)
        return stored

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        at = (row, col // self.group_size(shape[1]))
        code = self.decode_code(shape, row, col)
        scale = Load("scale", at)
        if self.offset == "minimum":
            return ToFloat(code) * scale + Load("minimum", at)
        zero: Expr = Const(1 << (self.bits_per_code - 1))
        if self.offset == "zero":
            zero = Load("zero", at)
        return ToFloat(code - zero) * scale

    def decode_code(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        """Return the integer code of one element."""
        bits = self.bits_per_code
        if bits == 8:
            return Load("codes", (row, col))
        position = col * bits
        byte, shift = position >> 3, position & 7
        word: Expr = Load("codes", (row, byte))
        if 8 % bits:  # a code may straddle two bytes; the last one of a row never does
            following = minimum(byte + 1, self.row_bytes(shape[1]) - 1)
            word = word | (Load("codes", (row, following)) << 8)
        return (word >> shift) & ((1 << bits) - 1)

    def term(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Grouped:
        self.check(shape, arrays)
        offset = arrays.get(self.offset)
        return Grouped(self, (shape[0], shape[1]), arrays["codes"], arrays["scale"], offset)

    def __str__(self) -> str:
        group = "row" if self.group is None else f"g{self.group}"
        offset = {"symmetric": "", "zero": "·zero", "minimum": "·min"}[self.offset]
        return f"int{self.bits_per_code}·{group}{offset}"


@dataclass(frozen=True, eq=False)
class Grouped(Term):
    """Packed codes u8[out, row_bytes], scale f16[out, groups], offset of the same shape."""

    layout: GroupedFormat
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None

    @property
    def format(self) -> GroupedFormat:
        return self.layout

    def arrays(self) -> dict[str, Tensor]:
        stored = {"codes": self.codes, "scale": self.scale}
        if self.offset is not None:
            stored[self.layout.offset] = self.offset
        return stored

    def stacked(self, others: Sequence[Term]) -> Grouped:
        terms = [self.arrays(), *(o.arrays() for o in others)]
        rows = self.shape[0] + sum(o.shape[0] for o in others)
        joined = {name: torch.cat([t[name] for t in terms]) for name in terms[0]}
        return self.layout.term((rows, self.shape[1]), joined)

    def unpacked(self) -> Tensor:
        """Return the integer codes u8[out, in]."""
        return unpack_codes(self.codes, self.layout.bits_per_code, self.shape[1])

    def dense(self) -> Tensor:
        size = self.layout.group_size(self.shape[1])

        def spread(per_group: Tensor) -> Tensor:
            return per_group.float().repeat_interleave(size, 1)[:, : self.shape[1]]

        codes = self.unpacked().float()
        if self.layout.offset == "symmetric":
            return (codes - (1 << (self.layout.bits_per_code - 1))) * spread(self.scale)
        assert self.offset is not None
        if self.layout.offset == "zero":
            return (codes - spread(self.offset)) * spread(self.scale)
        return codes * spread(self.scale) + spread(self.offset)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack u8 codes [rows, cols] below 2^bits into bytes [rows, ceil(cols bits / 8)]."""
    if bits == 8:
        return codes.contiguous()
    per_word, width = codes_per_word(bits)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    groups = padded.unflatten(1, (-1, per_word))
    words = groups[..., 0].to(WORDS[width])
    for position in range(1, per_word):
        words |= groups[..., position].to(words.dtype) << (position * bits)
    packed = words.unsqueeze(-1) if width == 1 else bytes_of(words, width)
    return packed.flatten(1)[:, : -(-codes.shape[1] * bits // 8)].contiguous()


def unpack_codes(packed: Tensor, bits: int, cols: int) -> Tensor:
    """Invert `pack_codes`: u8 codes [rows, cols]."""
    if bits == 8:
        return packed
    per_word, width = codes_per_word(bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % width))
    parts = padded.unflatten(1, (-1, width))
    words = parts[..., 0].to(WORDS[width])
    for position in range(1, width):
        words |= parts[..., position].to(words.dtype) << (position * 8)
    mask = (1 << bits) - 1
    codes = [(words >> (position * bits)) & mask for position in range(per_word)]
    return torch.stack(codes, -1).to(torch.uint8).flatten(1)[:, :cols]


WORDS = {1: torch.uint8, 3: torch.int32, 5: torch.int64, 6: torch.int64, 7: torch.int64}
"""The integers that hold a word of so many bytes."""


def codes_per_word(bits: int) -> tuple[int, int]:
    """Return the smallest number of codes that fill whole bytes together, and those bytes."""
    per_word = 8 // gcd(bits, 8)
    return (8 // bits, 1) if 8 % bits == 0 else (per_word, per_word * bits // 8)


def bytes_of(words: Tensor, width: int) -> Tensor:
    """Split integers into their lowest `width` bytes, u8[..., width]."""
    parts = [(words >> (8 * position)) & 255 for position in range(width)]
    return torch.stack(parts, -1).to(torch.uint8)


def encode_codes(
    layout: GroupedFormat, codes: Tensor, scale: Tensor, offset: Tensor | None = None
) -> Grouped:
    """Store codes u8[out, in] with their scales and offsets [out, groups]."""
    rows, cols = codes.shape
    stored = {"codes": pack_codes(codes, layout.bits_per_code), "scale": scale.to(torch.float16)}
    if offset is not None:
        stored[layout.offset] = offset.to(torch.uint8 if layout.offset == "zero" else torch.float16)
    return layout.term((rows, cols), stored)
