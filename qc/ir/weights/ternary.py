"""Ternary weights: -1, 0 or 1 times the scale of a tile.

With trits t = 0, 1, 2 the weight is w = (t - 1) s. Two ways to store them, each row from a new
byte:

    ternary·g128        five trits a byte, 1.6 bits a weight
    ternary2bit·g128    fields of 2 bits; 3 is refused

Five trits are the number v = 81 t0 + 27 t1 + 9 t2 + 3 t3 + t4 < 243, stored as the fraction v / 243
of 256, rounded up: b = ceil(256 v / 243). Multiplying the fraction by 3^k moves the digits before
t_k out of the byte, and t_k is what the next factor 3 moves out: t_k = ((b 3^k mod 256) 3) // 256.
The 13 bytes that no v gives are refused.

Scales are float16, or a term of their own: `ternary·g64·scale(uint8·row)`.

Sources: The Era of 1-bit LLMs (Ma et al. 2024), section 2, for absolute means; llama.cpp's TQ1_0
for base 3 as a fraction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from qc.ir.weights.expression import Const, Expr, Load, ToFloat
from qc.ir.weights.notation import refuse_rest, take_argument, take_tile
from qc.ir.weights.packing import code_at, pack_codes, row_bytes, unpack_codes
from qc.ir.weights.scales import (
    decode_floats,
    dense_floats,
    floats,
    rows_of_floats,
    store_floats,
    verify_floats,
)
from qc.ir.weights.tiles import Tile
from qc.ir.weights.weight import ArraySpec, Term, TermFormat

Packing = Literal["base3", "fields"]

NAMES: dict[str, Packing] = {"ternary": "base3", "ternary2bit": "fields"}

TRITS = 5
"""Trits a byte: 3^5 = 243 <= 256."""

HALVES = sum((3**k // 2) << (6 * k) for k in range(TRITS))
"""The halves of 3^0 to 3^4, rounded down, in fields of 6 bits: a table in one integer."""


@dataclass(frozen=True)
class TernaryFormat(TermFormat):
    """`group` inputs x `tile_rows` outputs share a scale; None means all of them."""

    group: int | None = None
    tile_rows: int | None = 1
    scale: TermFormat | None = None
    packing: Packing = "base3"

    examples: ClassVar[tuple[str, ...]] = (
        "ternary·tensor", "ternary·g128", "ternary·row", "ternary·t16x16",
        "ternary·g64·scale(uint8·row)", "ternary2bit·g128", "ternary2bit·o32·scale(e4m3·tensor)",
    )  # fmt: skip

    def __post_init__(self) -> None:
        Tile(self.tile_rows, self.group)

    @property
    def tile(self) -> Tile:
        return Tile(self.tile_rows, self.group)

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        width = -(-shape[1] // TRITS) if self.packing == "base3" else row_bytes(shape[1], 2)
        codes = ArraySpec((shape[0], width), torch.uint8)
        return {"codes": codes, **floats("scale", self.scale, self.tile.grid(shape))}

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        grid, at = self.tile.grid(shape), self.tile.index(shape, row, col)
        if self.packing == "base3":
            trit = third_digit(Load("codes", (row, col // TRITS)), col % TRITS)
        else:
            trit = code_at("codes", (row,), col, 2)
        return ToFloat(trit - 1) * decode_floats("scale", self.scale, grid, at)

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        why = None if self.scale is None else self.scale.refusal(self.tile.grid(shape))
        return None if why is None else f"the scales of {self}: {why}"

    def verify(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> None:
        if self.packing == "base3":
            known = trits_of_bytes()[:, 0] < 3
            refused = not bool(known[arrays["codes"].long()].all())
        else:
            refused = bool((unpack_codes(arrays["codes"], 2, shape[1]) > 2).any())
        if refused:
            raise ValueError(f"array 'codes' of {self} holds a code that no trit has")
        verify_floats("scale", self.scale, self.tile.grid(shape), arrays)

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        if self.packing == "base3":
            trits = trits_of_bytes()[arrays["codes"].long()].flatten(1)[:, : shape[1]]
        else:
            trits = unpack_codes(arrays["codes"], 2, shape[1])
        scale = dense_floats("scale", self.scale, self.tile.grid(shape), arrays)
        return (trits.float() - 1) * self.tile.spread(scale, shape)

    def rows(self, term: Term, index: Tensor) -> Term | None:
        grid = self.tile.grid(term.shape)
        scale = rows_of_floats("scale", self.scale, self.tile, grid, term.stored, index)
        if scale is None:
            return None
        return self.term(
            (len(index), term.shape[1]), {"codes": term.stored["codes"][index], **scale}
        )

    def nearest(self, values: Tensor) -> Term:
        """Round w / s to -1, 0 or 1, with s the mean of |w| in each tile (absmean).

        Minimises the error of each weight by itself given that scale, as it is stored; the scale
        is the published one of networks trained so, not the one of least squared error.
        """
        shape = (values.shape[0], values.shape[1])
        values = values.float()
        stored: dict[str, Tensor] = {}
        count = self.tile.reduced(torch.ones_like(values), "sum")
        mean = self.tile.reduced(values.abs(), "sum") / count
        scale = store_floats("scale", self.scale, mean, stored)
        divisor = self.tile.spread(torch.where(scale == 0, torch.ones_like(scale), scale), shape)
        trits = ((values / divisor).round_().clamp_(-1, 1) + 1).to(torch.uint8)
        stored["codes"] = pack_trits(trits) if self.packing == "base3" else pack_codes(trits, 2)
        return self.term(shape, stored)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        if words[0] not in NAMES:
            return None
        rest = list(words[1:])
        scale, tile = take_argument(rest, "scale"), take_tile(rest, Tile(1, None))
        refuse_rest(rest, "a group (g128, row, o32, tensor) and scale(...)")
        return cls(tile.cols, tile.rows, scale, NAMES[words[0]])

    def __str__(self) -> str:
        name = next(name for name, packing in NAMES.items() if packing == self.packing)
        scale = "" if self.scale is None else f"·scale({self.scale})"
        return f"{name}·{self.tile}{scale}"


def third_digit(byte: Expr, place: Expr) -> Expr:
    """Return digit `place` (0 to 4) of the fraction byte / 256 in base 3; constants fold."""
    power = ((Const(HALVES) >> (place * 6)) & 63) * 2 + 1  # every power of 3 is odd
    return (((byte * power) & 255) * 3) >> 8


def pack_trits(trits: Tensor) -> Tensor:
    """Pack trits [rows, cols] of 0 to 2 into bytes [rows, ceil(cols / 5)]."""
    digits = torch.nn.functional.pad(trits, (0, -trits.shape[1] % TRITS)).unflatten(1, (-1, TRITS))
    number = torch.zeros(digits.shape[:-1], dtype=torch.int32)
    for place in range(TRITS):
        number = number * 3 + digits[..., place]
    return ((number * 256 + 242) // 243).to(torch.uint8)


@cache
def trits_of_bytes() -> Tensor:
    """Return the five trits of each byte, u8[256, 5]; 3 where no trits give that byte."""
    number = torch.arange(3**TRITS)
    trits = torch.stack([number // 3 ** (TRITS - 1 - k) % 3 for k in range(TRITS)], 1)
    table = torch.full((256, TRITS), 3, dtype=torch.uint8)
    table[pack_trits(trits).flatten().long()] = trits.to(torch.uint8)
    return table
