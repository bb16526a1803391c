"""Small floats: ExMy codes of 2 to 8 bits, a scale for every tile of weights, or none.

A code is, from its top bit, a sign (absent in the unsigned kind), an exponent E of `exponent` bits
and a mantissa M of `mantissa` bits; its value, with y mantissa bits, is

    E > 0    ± 2^(E - bias) (1 + M / 2^y)         bias: 2^(exponent - 1) - 1 where none is given
    E = 0    ± 2^(1 - bias) (M / 2^y)             subnormal; 0 at M = 0
    unsigned without mantissa                     2^(E - bias) for every E: no zero (scales)

and w = value · s with the scale s of the tile. What the top codes mean is fixed by the widths:

    e4m3     S.1111.111 is not a number: the largest value is 448        torch.float8_e4m3fn
    e5m2     E = 31 is infinite or not a number: the largest is 57344    torch.float8_e5m2
    e8m0     255 is not a number: 2^-127 to 2^127                        torch.float8_e8m0fnu
    others   every code is a number: e2m1 ends at 6, e2m3 at 7.5, e3m2 at 28

Codes that are no number are refused where a term is made, and never chosen.

Printed `e2m1·g32`; `ue4m3` has no sign bit (8 bits of exponent and mantissa leave no room for one:
e8m0), `e4m3b11` has bias 11. Without the word of a tile there is no scale at all: `e8m0`. Scales
are float16, or a term of their own: `e2m1·g16·scale(e4m3·tensor·scale(f32))`.

Sources: OCP Microscaling Formats (MX) 1.0 (2023), sections 5 and 6, for FP4, FP6, FP8, E8M0 and
blocks of 32; FP8 Formats for Deep Learning (Micikevicius et al. 2022), section 3, for the top
codes; Pretraining Large Language Models with NVFP4 (NVIDIA 2025), section 2, for scales of scales;
FP6-LLM (Xia et al. 2024) for e3m2 with a scale a row; LLM-FP4 (Liu et al. 2023) for other biases.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from qc.ir.weights.expression import AsFloat, AsHalf, Const, Expr, equal, less
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

SHORT_NAMES = {
    "fp4": "e2m1·g32",
    "fp6": "e3m2·row",
    "fp8": "e4m3·row",
    "mxfp4": "e2m1·g32·scale(e8m0)",
    "mxfp6": "e2m3·g32·scale(e8m0)",
    "mxfp8": "e4m3·g32·scale(e8m0)",
    "nvfp4": "e2m1·g16·scale(e4m3·tensor·scale(f32))",
}

NO_NUMBERS = {(4, 3): 1, (5, 2): 4, (8, 0): 1}
"""(exponent, mantissa) -> how many of the top codes, the sign apart, are no numbers."""

LEAST_SCALE = 2.0**-24
"""The smallest float16 that is not 0."""

COARSE = 17 / 16
"""A stored scale is below the wanted one by more than this only where it is stored coarsely: e4m3,
the finest small float, is off by at most 1/16."""

ROWS_AT_ONCE = 4096
"""Rows whose codes are computed together: bounds the float32 copies of wide matrices."""


@dataclass(frozen=True)
class FloatingFormat(TermFormat):
    """`group` inputs x `tile_rows` outputs share a scale; None means all of them."""

    exponent: int
    mantissa: int
    group: int | None = None
    tile_rows: int | None = 1
    scale: TermFormat | None = None
    sign: Literal["signed", "unsigned"] = "signed"
    bias: int | None = None
    scaling: Literal["tiles", "none"] = "tiles"

    examples: ClassVar[tuple[str, ...]] = (
        "e2m1·g32·scale(e8m0)", "e2m1·g16·scale(e4m3·tensor·scale(dense f32))", "e2m3·row",
        "e4m3·tensor", "e5m2·g64", "e4m3b11·col·scale(e5m2·row)", "ue3m2·t16x16", "e8m0",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.exponent < 1 or self.mantissa < 0 or not 2 <= self.bits_per_code <= 8:
            raise ValueError(
                f"a float of 2 to 8 bits has at least one bit of exponent; {self.name} has "
                f"{self.bits_per_code} bits"
            )
        if not 0 <= self.offset <= 127 or (self.exponent == 8 and self.offset != 127):
            raise ValueError(f"{self.name} does not fit float32: its bias is {self.offset}")
        if self.scaling == "none" and (self.group, self.tile_rows, self.scale) != (None, 1, None):
            raise ValueError("a float without a scale has no tiles and no scale format")
        Tile(self.tile_rows, self.group)

    @property
    def tile(self) -> Tile:
        return Tile(self.tile_rows, self.group)

    @property
    def magnitude_bits(self) -> int:
        """The bits below the sign."""
        return self.exponent + self.mantissa

    @property
    def bits_per_code(self) -> int:
        return self.magnitude_bits + (self.sign == "signed")

    @property
    def offset(self) -> int:
        """The bias, given or not."""
        return (1 << (self.exponent - 1)) - 1 if self.bias is None else self.bias

    @property
    def has_zero(self) -> bool:
        return self.sign == "signed" or self.mantissa > 0

    @property
    def top(self) -> float:
        """The largest value, without a scale."""
        return self.magnitudes()[-1]

    def magnitudes(self) -> list[float]:
        """Return the values of the codes that are numbers, the sign apart, in rising order."""
        found = []
        for code in range((1 << self.magnitude_bits) - self.no_numbers):
            power, fraction = divmod(code, 1 << self.mantissa)
            one = power > 0 or not self.has_zero
            power = power if one else 1
            found.append((one + fraction / (1 << self.mantissa)) * 2.0 ** (power - self.offset))
        return found

    @property
    def no_numbers(self) -> int:
        """How many top codes, the sign apart, are no numbers."""
        return NO_NUMBERS.get((self.exponent, self.mantissa), 0)

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        stored = {
            "codes": ArraySpec((shape[0], row_bytes(shape[1], self.bits_per_code)), torch.uint8)
        }
        if self.scaling == "tiles":
            stored |= floats("scale", self.scale, self.tile.grid(shape))
        return stored

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        value = self.value(code_at("codes", (row,), col, self.bits_per_code))
        if self.scaling == "none":
            return value
        grid, at = self.tile.grid(shape), self.tile.index(shape, row, col)
        return value * decode_floats("scale", self.scale, grid, at)

    def value(self, code: Expr) -> Expr:
        """Return the value of a code: its bits moved to where a wider float has them, exactly.

        Up to five bits of exponent that is float16, whose subnormals machines widen as fast as any
        number. Wider exponents go into float32, and there a subnormal must not appear, for
        processors are slow on them or flush them to 0: with z = 1 for a subnormal, else 0, the
        float32 with exponent E + z and the mantissa M is too large by z 2^(1 - bias), which is
        subtracted.
        """
        if not self.has_zero:
            place = 23 - self.mantissa
            if self.exponent < 8:
                return AsFloat((code + Const((127 - self.offset) << self.mantissa)) << place)
            return AsFloat((code << place) | (equal(code, 0) << 22))  # 2^-127 is itself subnormal
        magnitude = code & ((1 << self.magnitude_bits) - 1)
        if self.exponent <= 5:
            bits = magnitude << (10 - self.mantissa)
            if self.sign == "signed":
                bits = bits | ((code >> self.magnitude_bits) << 15)
            return AsHalf(bits) * 2.0 ** (15 - self.offset)
        return self.as_float32(code, magnitude)

    def as_float32(self, code: Expr, magnitude: Expr) -> Expr:
        """Return the value of a code with more than five bits of exponent."""
        place = 23 - self.mantissa
        rebias = Const((127 - self.offset) << self.mantissa)
        subnormal = less(magnitude, 1 << self.mantissa)
        high = (magnitude + (subnormal << self.mantissa) + rebias) << place
        low = subnormal * ((128 - self.offset) << 23)
        if self.sign == "signed":
            sign = (code >> self.magnitude_bits) << 31
            high, low = high | sign, low | sign
        return AsFloat(high) - AsFloat(low)

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        why = None if self.scale is None else self.scale.refusal(self.tile.grid(shape))
        return None if why is None else f"the scales of {self}: {why}"

    def verify(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> None:
        if self.no_numbers:
            codes = unpack_codes(arrays["codes"], self.bits_per_code, shape[1])
            mask = (1 << self.magnitude_bits) - 1
            if bool(((codes & mask) > mask - self.no_numbers).any()):
                raise ValueError(f"array 'codes' of {self} holds a code that is no number")
        if self.scaling == "tiles":
            verify_floats("scale", self.scale, self.tile.grid(shape), arrays)

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        codes = unpack_codes(arrays["codes"], self.bits_per_code, shape[1])
        values = value_table(self).take(codes.long())
        if self.scaling == "none":
            return values
        scale = dense_floats("scale", self.scale, self.tile.grid(shape), arrays)
        return values.mul_(self.tile.spread(scale, shape))

    def rows(self, term: Term, index: Tensor) -> Term | None:
        kept = {"codes": term.stored["codes"][index]}
        if self.scaling == "tiles":
            grid = self.tile.grid(term.shape)
            scale = rows_of_floats("scale", self.scale, self.tile, grid, term.stored, index)
            if scale is None:
                return None
            kept.update(scale)
        return self.term((len(index), term.shape[1]), kept)

    def nearest(self, values: Tensor) -> Term:
        """Round to the nearest float, ties to even, with the scale max|w| / top in each tile.

        The codes are chosen with the scale as it is stored. Where a scale is stored so coarsely
        (e8m0) that the largest weights of its tile would be cut off, twice that scale is taken if
        the squared error of the tile is then less. Without a scale, what is beyond the largest
        float becomes it. Minimises the error of each weight by itself on that grid.
        """
        shape = (values.shape[0], values.shape[1])
        stored: dict[str, Tensor] = {}
        if self.scaling == "none":
            one = torch.ones(self.tile.grid(shape))
            return self.term(shape, {"codes": self.codes(values, one)})
        scale = self.stored_scales(values, stored)
        stored["codes"] = self.codes(values, some(scale))
        return self.term(shape, stored)

    def stored_scales(self, values: Tensor, stored: dict[str, Tensor]) -> Tensor:
        """Choose the scales, add them to `stored`, and return them as they will be read."""
        wanted = self.extremes(values) / self.top
        if self.scale is None:
            # A wide float loses nothing by a larger scale; a scale of 0 would lose everything.
            wanted = torch.where(wanted > 0, wanted.clamp_min(LEAST_SCALE), wanted)
        scale = store_floats("scale", self.scale, wanted, stored)
        if bool((wanted > COARSE * scale).any()):
            better = self.squared_error(values, 2 * scale) < self.squared_error(values, scale)
            scale = store_floats("scale", self.scale, torch.where(better, 2 * scale, scale), stored)
        return scale

    def extremes(self, values: Tensor) -> Tensor:
        """Return max|w| of the tiles; of the unsigned kind, the value that is furthest from 0."""
        parts = [self.tile.extremes(rows.float()) for rows, _ in self.bands(values)]
        low, high = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        if self.sign == "signed":
            return torch.maximum(-low, high)
        return torch.where(-low > high, low, high)

    def squared_error(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return the squared error of the tiles with these scales."""
        parts = []
        for band, tiles in self.bands(values):
            spread = self.tile.spread(some(scale[tiles]), tuple(band.shape))
            codes = self.round(band.float() / spread)
            error = value_table(self).take(codes.long()) * spread - band
            parts.append(self.tile.reduced(error.square(), "sum"))
        return torch.cat(parts)

    def bands(self, values: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Cut a matrix into bands of whole tiles; the slice is the band's rows of tiles."""
        rows = self.tile.size(tuple(values.shape))[0]
        tiles = max(1, ROWS_AT_ONCE // rows)
        for number, band in enumerate(values.split(tiles * rows)):
            yield band, slice(number * tiles, (number + 1) * tiles)

    def codes(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return the codes of values / scale, packed."""
        packed = []
        for band, tiles in self.bands(values):
            scaled = band.float() / self.tile.spread(scale[tiles], tuple(band.shape))
            packed.append(pack_codes(self.round(scaled), self.bits_per_code))
        return torch.cat(packed)

    def round(self, scaled: Tensor) -> Tensor:
        """Return the codes of the nearest floats, u8."""
        if self.sign == "unsigned":
            return torch.bucketize(scaled, boundaries(self), out_int32=True).to(torch.uint8)
        codes = torch.bucketize(scaled.abs(), boundaries(self), out_int32=True).to(torch.uint8)
        return codes | (scaled.signbit().to(torch.uint8) << self.magnitude_bits)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        head = re.fullmatch(r"(u?)e(\d+)m(\d+)(?:b(\d+))?", words[0])
        if head is None:
            return None
        exponent, mantissa = int(head[2]), int(head[3])
        sign: Literal["signed", "unsigned"] = "signed"
        if head[1] or exponent + mantissa == 8:
            sign = "unsigned"
        bias = None if head[4] is None else int(head[4])
        rest = list(words[1:])
        if not rest:
            return cls(exponent, mantissa, sign=sign, bias=bias, scaling="none")
        scale, tile = take_argument(rest, "scale"), take_tile(rest, Tile(1, None))
        refuse_rest(rest, "a group (g32, row, o32, tensor) and scale(...)")
        return cls(exponent, mantissa, tile.cols, tile.rows, scale, sign, bias)

    @property
    def name(self) -> str:
        """The name of the codes, without what scales them."""
        unsigned = self.sign == "unsigned" and self.magnitude_bits < 8
        bias = "" if self.bias is None else f"b{self.bias}"
        return f"{'u' if unsigned else ''}e{self.exponent}m{self.mantissa}{bias}"

    def __str__(self) -> str:
        if self.scaling == "none":
            return self.name
        scale = "" if self.scale is None else f"·scale({self.scale})"
        return f"{self.name}·{self.tile}{scale}"


@cache
def value_table(format: FloatingFormat) -> Tensor:
    """Return the values of all codes, float32; those that are no numbers are NaN."""
    positive = torch.tensor(format.magnitudes() + [float("nan")] * format.no_numbers)
    return torch.cat([positive, -positive]) if format.sign == "signed" else positive


@cache
def boundaries(format: FloatingFormat) -> Tensor:
    """Return the largest values that round to each magnitude but the last, float32.

    Halfway between two the even code wins: below an odd code, halfway itself is no longer its own.
    """
    points = torch.tensor(format.magnitudes())
    halfway = (points[1:] + points[:-1]) / 2
    halfway[1::2] = torch.nextafter(halfway[1::2], torch.zeros(()))
    return halfway


def some(scale: Tensor) -> Tensor:
    """Give a tile that is stored as zeros the scale 1: it needs one to divide by."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
