"""Grouped integer codes: int2 to int8, one scale for every tile of weights.

A row is a little-endian bit stream of codes; the last group of a row may be shorter than the
others. With code q of `bits` bits, scale s and, by kind of offset:

    symmetric   w = (q - 2^(bits-1)) s
    zero        w = (q - z) s          z: integer zero point, u8
    minimum     w = q s + m
    none        w = q s                printed uint4·g32: values of one sign, such as scales

Groups lie along the inputs (g32), along the outputs (o32: per input channel) or in any other tile.
Scales and minima are float16, or terms of their own over the matrix of groups:
`int4·g32·min·scale(uint6·g8)·minimum(uint6·g8)` stores them in 6 bits in groups of 8.

Sources: GPTQ (Frantar et al. 2022), section 3, for groups; AdaDim (Heo et al. 2023), section 3,
for groups along the outputs; SpQR (Dettmers et al. 2023), section 4.2, for quantized scales;
llama.cpp's Q4_1 and Q4_K for float minima.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from qc.ir.weights.expression import Const, Expr, Load, ToFloat
from qc.ir.weights.grouped_rounding import GroupedRounding
from qc.ir.weights.notation import refuse_rest, take_argument, take_tile, take_word
from qc.ir.weights.packing import code_at, pack_codes, row_bytes, unpack_codes
from qc.ir.weights.rounding import Ranges
from qc.ir.weights.scales import (
    decode_floats,
    dense_floats,
    floats,
    some,
    store_floats,
    verify_floats,
)
from qc.ir.weights.tiles import Tile, joined
from qc.ir.weights.weight import ArraySpec, Term, TermFormat

Offset = Literal["symmetric", "zero", "minimum", "none"]

WORDS = {"symmetric": "", "zero": "·zero", "minimum": "·min", "none": ""}

AT_ONCE = 1 << 18
"""Weights whose codes are computed together: their float32 copies fit a cache."""


@dataclass(frozen=True)
class GroupedFormat(TermFormat):
    """`group` inputs x `tile_rows` outputs share a scale; None means all of them."""

    bits_per_code: int
    group: int | None = None
    offset: Offset = "symmetric"
    tile_rows: int | None = 1
    scale: TermFormat | None = None
    minimum: TermFormat | None = None

    examples: ClassVar[tuple[str, ...]] = (
        "int2·g32·min", "int3·g64·zero", "int4·g32", "int4·g128·zero", "int4·row·min", "int5·g32",
        "int6·g64·min", "int7·g16", "int8·g32", "int8·row", "int4·o32·min", "int3·o16",
        "int4·tensor", "int4·t16x16·zero", "uint4·g32",
        "int4·g32·min·scale(uint6·g8)·minimum(uint6·g8)",
        "int3·g16·min·scale(int3·o16·min)·minimum(int3·o16·min)",
        "int2·g16·scale(uint4·g16·scale(uint8·o16))",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 2 <= self.bits_per_code <= 8:
            raise ValueError(f"grouped codes have 2 to 8 bits, not {self.bits_per_code}")
        if self.minimum is not None and self.offset != "minimum":
            raise ValueError("only a format with a float minimum (·min) stores minima")
        Tile(self.tile_rows, self.group)

    @property
    def tile(self) -> Tile:
        return Tile(self.tile_rows, self.group)

    def group_size(self, cols: int) -> int:
        """Return the weights per full group of a row of `cols`."""
        return self.tile.size((1, cols))[1]

    def groups(self, cols: int) -> int:
        """Return the groups per row, the tail included."""
        return -(-cols // self.group_size(cols))

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        grid = self.tile.grid(shape)
        codes = ArraySpec((shape[0], row_bytes(shape[1], self.bits_per_code)), torch.uint8)
        stored = {"codes": codes, **floats("scale", self.scale, grid)}
        if self.offset == "zero":
            stored["zero"] = ArraySpec(grid, torch.uint8)
        if self.offset == "minimum":
            stored |= floats("minimum", self.minimum, grid)
        return stored

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        grid, at = self.tile.grid(shape), self.tile.index(shape, row, col)
        code = code_at("codes", (row,), col, self.bits_per_code)
        scale = decode_floats("scale", self.scale, grid, at)
        match self.offset:
            case "minimum":
                return ToFloat(code) * scale + decode_floats("minimum", self.minimum, grid, at)
            case "none":
                return ToFloat(code) * scale
            case "zero":
                return ToFloat(code - Load("zero", at)) * scale
        return ToFloat(code - Const(self.middle)) * scale

    @property
    def middle(self) -> int:
        """The code of zero in the symmetric kind."""
        return 1 << (self.bits_per_code - 1)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits_per_code) - 1

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        grid = self.tile.grid(shape)
        for inner in (self.scale, self.minimum):
            if inner is not None and (why := inner.refusal(grid)) is not None:
                return f"the scales of {self}: {why}"
        return None

    def verify(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> None:
        grid = self.tile.grid(shape)
        verify_floats("scale", self.scale, grid, arrays)
        verify_floats("minimum", self.minimum, grid, arrays)

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        def spread(name: str, inner: TermFormat | None) -> Tensor:
            return self.tile.spread(dense_floats(name, inner, self.tile.grid(shape), arrays), shape)

        codes = unpack_codes(arrays["codes"], self.bits_per_code, shape[1]).float()
        scale = spread("scale", self.scale)
        match self.offset:
            case "minimum":
                return codes * scale + spread("minimum", self.minimum)
            case "none":
                return codes * scale
            case "zero":
                return (codes - self.tile.spread(arrays["zero"], shape)) * scale
        return (codes - self.middle) * scale

    def rows(self, term: Term, index: Tensor) -> Term | None:
        if self.tile_rows != 1 or self.scale is not None or self.minimum is not None:
            return None
        kept = {name: array[index] for name, array in term.stored.items()}
        return self.term((len(index), term.shape[1]), kept)

    def nearest(self, values: Tensor) -> Term:
        """Round to the grid that spans the extremes of each tile (round-to-nearest, RTN).

        symmetric: s = max|w| / (2^(b-1) - 1); minimum: s = (max - min) / (2^b - 1), m = min; zero:
        the same with 0 inside the range and z = round(-min / s); none: s = max w / (2^b - 1), or
        the least where it is further from 0. Codes are computed with the scale and the offset as
        they are stored, so that storing them costs nothing more. Minimises the error of each weight
        by itself on that grid.
        """
        shape = (values.shape[0], values.shape[1])
        low, high = self.extremes(values)
        stored: dict[str, Tensor] = {}
        offset = torch.zeros_like(low)
        if self.offset == "minimum":
            offset = store_floats("minimum", self.minimum, low, stored)
            scale = (high - offset) / self.top
        elif self.offset == "zero":
            low, high = low.clamp_max(0), high.clamp_min(0)
            scale = (high - low) / self.top
        elif self.offset == "none":
            scale = torch.where(-low > high, low, high) / self.top
        else:
            scale = torch.maximum(-low, high) / max(1, self.middle - 1)
        # plainly stored, a group of equal weights gets 1, which decodes as cheaply as any scale;
        # stored as a term, one such 1 would coarsen the scales around it
        scale = some(scale) if self.scale is None else scale
        scale = store_floats("scale", self.scale, scale, stored)
        if self.offset == "zero":
            zero = (-low / some(scale)).round().clamp(0, self.top)
            stored["zero"] = zero.to(torch.uint8)
            offset = -zero * scale
        if self.offset == "symmetric":
            offset = -self.middle * scale
        stored["codes"] = self.codes(values, some(scale), offset)
        return self.term(shape, stored)

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the minima and maxima of the tiles, a band of rows at a time."""
        parts = [self.tile.extremes(rows.float()) for rows, _ in self.bands(values)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def bands(self, values: Tensor) -> list[tuple[Tensor, slice]]:
        """Cut a matrix into bands of whole tiles; the slice is the band's rows of tiles."""
        rows = self.tile.size(tuple(values.shape))[0]
        tiles = max(1, AT_ONCE // max(1, rows * values.shape[1]))
        return [
            (band, slice(number * tiles, (number + 1) * tiles))
            for number, band in enumerate(values.split(tiles * rows))
        ]

    def codes(self, values: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """Round values to codes q with q s + offset nearest, packed."""
        packed = []
        for band, tiles in self.bands(values):
            steps = self.tile.split(band.float()) - self.tile.over(offset[tiles])
            steps = steps.div_(self.tile.over(scale[tiles])).round_().clamp_(0, self.top)
            codes = joined(steps.to(torch.uint8), tuple(band.shape))
            packed.append(pack_codes(codes, self.bits_per_code))
        return torch.cat(packed)

    def rounding(self, shape: tuple[int, ...], ranges: Ranges = "extremes") -> GroupedRounding:
        return GroupedRounding(self, (shape[0], shape[1]), ranges)

    def turned(self) -> GroupedFormat | None:
        nested = self.scale is not None or self.minimum is not None
        return None if nested else replace(self, group=self.tile_rows, tile_rows=self.group)

    def resized(self, bits: int | None = None, group: int | None = None) -> GroupedFormat:
        return replace(self, bits_per_code=bits or self.bits_per_code, group=group or self.group)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        head = re.fullmatch(r"(u?)int(\d+)", words[0])
        if head is None:
            return None
        rest = list(words[1:])
        tile = take_tile(rest, Tile(1, None))
        kind = take_word(rest, ("zero", "min"))
        offset: Offset = "none" if head[1] else "symmetric"
        if kind is not None:
            offset = "zero" if kind == "zero" else "minimum"
        scale, minimum = take_argument(rest, "scale"), take_argument(rest, "minimum")
        refuse_rest(rest, "a group (g32, row, o32), zero or min, scale(...), minimum(...)")
        return cls(int(head[2]), tile.cols, offset, tile.rows, scale, minimum)

    def __str__(self) -> str:
        sign = "u" if self.offset == "none" else ""
        scale = "" if self.scale is None else f"·scale({self.scale})"
        minimum = "" if self.minimum is None else f"·minimum({self.minimum})"
        kind = WORDS[self.offset]
        return f"{sign}int{self.bits_per_code}·{self.tile}{kind}{scale}{minimum}"


def grouped_term(
    format: GroupedFormat, codes: Tensor, scale: Tensor, offset: Tensor | None = None
) -> Term:
    """Store codes u8[out, in] with plain scales and offsets, one a tile."""
    rows, cols = codes.shape
    stored = {"codes": pack_codes(codes, format.bits_per_code), "scale": scale.to(torch.float16)}
    if offset is not None:
        kind = torch.uint8 if format.offset == "zero" else torch.float16
        stored[format.offset] = offset.to(kind)
    return format.term((rows, cols), stored)
