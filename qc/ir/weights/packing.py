"""Bit streams: unsigned codes of 1 to 16 bits, packed little-endian, each row from a new byte."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from qc.ir.weights.expression import Code, Expr


def row_bytes(cols: int, bits: int) -> int:
    """Return the bytes of one row of codes."""
    return -(-cols * bits // 8)


def code_at(array: str, index: tuple[Expr, ...], number: Expr, bits: int) -> Expr:
    """Return code `number` of the row array[index, :]."""
    return Code(array, index, number * bits, bits)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [rows, cols] below 2^bits into bytes [rows, ceil(cols bits / 8)]."""
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    per_word, width = codes_per_word(bits)
    if width > 7:
        return pack_bits((codes.unsqueeze(-1).int() >> torch.arange(bits)) & 1)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    groups = padded.unflatten(1, (-1, per_word))
    words = groups[..., 0].to(word_dtype(width))
    for position in range(1, per_word):
        words |= groups[..., position].to(words.dtype) << (position * bits)
    packed = words.unsqueeze(-1) if width == 1 else bytes_of(words, width)
    return packed.flatten(1)[:, : row_bytes(codes.shape[1], bits)].contiguous()


def unpack_codes(packed: Tensor, bits: int, cols: int) -> Tensor:
    """Invert `pack_codes`: codes [rows, cols], u8 up to 8 bits and i32 above."""
    if bits == 8:
        return packed[:, :cols]
    per_word, width = codes_per_word(bits)
    if width > 7:
        single = unpack_codes(packed, 1, cols * bits).unflatten(1, (cols, bits)).int()
        whole: Tensor = (single << torch.arange(bits)).sum(-1)
        return whole.int()
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % width))
    parts = padded.unflatten(1, (-1, width))
    words = parts[..., 0].to(word_dtype(width))
    for position in range(1, width):
        words |= parts[..., position].to(words.dtype) << (position * 8)
    mask = (1 << bits) - 1
    codes = [(words >> (position * bits)) & mask for position in range(per_word)]
    kept = torch.stack(codes, -1).to(torch.uint8 if bits <= 8 else torch.int32)
    return kept.flatten(1)[:, :cols]


def codes_per_word(bits: int) -> tuple[int, int]:
    """Return the smallest number of codes that fill whole bytes together, and those bytes."""
    per_word = 8 // gcd(bits, 8)
    return (8 // bits, 1) if 8 % bits == 0 else (per_word, per_word * bits // 8)


def pack_bits(single: Tensor) -> Tensor:
    """Pack codes given bit by bit [rows, cols, bits], for words of more than 64 bits."""
    return pack_codes(single.flatten(1).to(torch.uint8), 1)


def word_dtype(width: int) -> torch.dtype:
    """Return the integers that hold a word of `width` bytes, up to 7."""
    return torch.uint8 if width == 1 else torch.int32 if width <= 3 else torch.int64


def bytes_of(words: Tensor, width: int) -> Tensor:
    """Split integers into their lowest `width` bytes, u8[..., width]."""
    parts = [(words >> (8 * position)) & 255 for position in range(width)]
    return torch.stack(parts, -1).to(torch.uint8)
