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
from qc.ir.weights.notation import refuse_rest, take_argument, take_tile, take_word
from qc.ir.weights.packing import code_at, pack_codes, row_bytes, unpack_codes
from qc.ir.weights.rounding import Ranges, Rounding
from qc.ir.weights.scales import decode_floats, dense_floats, floats, store_floats, verify_floats
from qc.ir.weights.tiles import Tile
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
            shape = tuple(band.shape)
            s, o = self.tile.spread(scale[tiles], shape), self.tile.spread(offset[tiles], shape)
            codes = ((band.float() - o) / s).round_().clamp_(0, self.top).to(torch.uint8)
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


def some(scale: Tensor) -> Tensor:
    """Give a group whose weights are all equal the scale 1: it needs one to divide by."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


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


# ---------------------------------------------------------------- column by column

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)
"""Parts of the range of a group that are tried; finer steps gain nothing before `REFITS`."""

REFITS = 3
"""Rounds of: least squares for the grid, then codes anew. The fourth gains below 0.1%."""


class GroupedRounding(Rounding):
    """Grouped integers column by column: scales and offsets a tile, then codes."""

    def __init__(self, format: GroupedFormat, shape: tuple[int, int], ranges: Ranges) -> None:
        self.format, self.shape, self.ranges = format, shape, ranges
        self.group = format.group_size(shape[1])
        grid = format.tile.grid(shape)
        self.scale, self.offset = torch.ones(grid), torch.zeros(grid)  # as they are wanted
        self.zero = torch.zeros(grid)
        self.steps = torch.ones(grid[1], shape[0])  # as they are read: [groups, out]
        self.starts = torch.zeros(grid[1], shape[0])
        self.codes = torch.zeros(shape[1], shape[0], dtype=torch.uint8)

    def fit(self, first: int, values: Tensor, importance: Tensor) -> None:
        weights = values.T
        scale, offset, zero = self.range_of(*self.extremes(weights))
        if self.ranges == "mse":
            scale, offset, zero = self.searched(weights, importance.float().T)
        self.put(first // self.group, scale, offset, zero)

    def put(self, group: int, scale: Tensor, offset: Tensor, zero: Tensor) -> None:
        """Store the grids of some groups, and what is read of them."""
        read, start = self.as_read(scale, offset, zero)
        part = slice(group, group + scale.shape[1])
        self.scale[:, part], self.offset[:, part], self.zero[:, part] = scale, offset, zero
        rows = self.format.tile.size(self.shape)[0]
        for held, found in ((self.steps, some(read)), (self.starts, start)):
            held[part] = found.repeat_interleave(rows, 0)[: self.shape[0]].T

    def round(self, column: int, values: Tensor) -> Tensor:
        step = self.steps[column // self.group]
        start = self.starts[column // self.group]
        codes = ((values - start) / step).round_().clamp_(0, self.format.top)
        self.codes[column] = codes
        return codes.mul_(step).add_(start)

    def values(self) -> Tensor:
        spread = torch.arange(self.shape[1]) // self.group
        return self.codes.float().mul_(self.steps[spread]).add_(self.starts[spread])

    def term(self) -> Term:
        stored: dict[str, Tensor] = {}
        read, _ = self.as_read(self.scale, self.offset, self.zero, stored)
        rows = self.format.tile.size(self.shape)[0]
        used = (some(read).repeat_interleave(rows, 0)[: self.shape[0]].T, self.steps)
        if not torch.equal(*used):
            raise ValueError(
                f"the scales of {self.format} share a grid of their own across groups of inputs: "
                "fit all groups at once"
            )
        stored["codes"] = pack_codes(self.codes.T.contiguous(), self.format.bits_per_code)
        return self.format.term(self.shape, stored)

    # scale and offset of a tile, w = q s + o; zero is the integer zero point of that kind

    def extremes(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the largest weight of each tile, 0 between them where the kind has
        its 0 on the grid."""
        low, high = self.format.tile.extremes(weights)
        if self.format.offset == "zero":
            return low.clamp_max(0), high.clamp_min(0)
        return low, high

    def range_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the grid that spans a range."""
        top, kind = self.format.top, self.format.offset
        zero = torch.zeros_like(low)
        if kind == "symmetric":
            scale = torch.maximum(-low, high) / max(1, self.format.middle - 1)
            return scale, -self.format.middle * scale, zero
        if kind == "none":
            return torch.where(-low > high, low, high) / top, zero, zero
        if kind == "minimum":
            return (high - store_floats("minimum", self.format.minimum, low, {})) / top, low, zero
        scale = (high - low) / top
        zero = (-low / some(scale)).round().clamp(0, top)
        return scale, -zero * scale, zero

    def as_read(
        self, scale: Tensor, offset: Tensor, zero: Tensor, stored: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return scale and offset as they will be read; add them to `stored`."""
        held: dict[str, Tensor] = {} if stored is None else stored
        kind, inner = self.format.offset, self.format.scale
        read = store_floats("scale", inner, some(scale) if inner is None else scale, held)
        if kind == "minimum":
            return read, store_floats("minimum", self.format.minimum, offset, held)
        if kind == "zero":
            held["zero"] = zero.to(torch.uint8)
            return read, -zero * read
        return read, -self.format.middle * read if kind == "symmetric" else torch.zeros_like(read)

    def searched(self, weights: Tensor, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the grids with the least weighted squared error: shrunken ranges, then least
        squares for the codes that they give, in turn."""
        low, high = self.extremes(weights)
        best = self.range_of(low, high)
        least, _ = self.error_of(weights, importance, best)
        for shrink in SHRINKS[1:]:
            least = self.better(weights, importance, self.shrunken(low, high, shrink), best, least)
        for _ in range(REFITS):
            codes = self.error_of(weights, importance, best)[1]
            tried = self.least_squares(weights, importance, codes, best)
            least = self.better(weights, importance, tried, best, least)
        return best

    def shrunken(self, low: Tensor, high: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the grid over a part of a range: around its middle, or around 0."""
        if self.format.offset != "minimum":
            return self.range_of(low * share, high * share)
        middle, half = (low + high) / 2, (high - low) * (share / 2)
        return self.range_of(middle - half, middle + half)

    def better(
        self, weights: Tensor, importance: Tensor, tried: tuple[Tensor, Tensor, Tensor],
        best: tuple[Tensor, Tensor, Tensor], least: Tensor,
    ) -> Tensor:  # fmt: skip
        """Keep what is better, tile by tile, in `best`; return the least errors."""
        error, _ = self.error_of(weights, importance, tried)
        chosen = error < least
        for held, found in zip(best, tried, strict=True):
            held[chosen] = found[chosen]
        return torch.where(chosen, error, least)

    def error_of(
        self, weights: Tensor, importance: Tensor, grid: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted squared error of each tile, and the codes."""
        shape, tile = tuple(weights.shape), self.format.tile
        read, start = self.as_plain(grid)
        step, offset = tile.spread(some(read), shape), tile.spread(start, shape)
        codes = ((weights - offset) / step).round_().clamp_(0, self.format.top)
        wrong = (codes * step).add_(offset).sub_(weights).square_().mul_(importance)
        return tile.reduced(wrong, "sum"), codes

    def as_plain(self, grid: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return scale and offset in float16: stored as terms they cannot be judged one by one."""
        scale, offset, zero = grid
        read = scale.half().float()
        if self.format.offset == "minimum":
            return read, offset.half().float()
        return read, self.offset_of(read, zero)

    def offset_of(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the offset that follows from a scale."""
        if self.format.offset == "zero":
            return -zero * scale
        return -self.format.middle * scale if self.format.offset == "symmetric" else 0 * scale

    def least_squares(
        self, weights: Tensor, importance: Tensor, codes: Tensor,
        grid: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return the grid with the least error for these codes."""
        tile, shape = self.format.tile, tuple(weights.shape)
        scale, offset, zero = grid
        if self.format.offset != "minimum":
            shift = zero if self.format.offset == "zero" else -self.offset_of(zero + 1, zero)
            codes = codes - tile.spread(shift, shape)
        mass = tile.reduced(importance.expand(shape), "sum")
        q, w = (tile.reduced(each * importance, "sum") for each in (codes, weights))
        qq = tile.reduced(codes.square() * importance, "sum")
        qw = tile.reduced(codes * weights * importance, "sum")
        if self.format.offset != "minimum":
            found = torch.where(qq > 0, qw / some(qq), scale)
            return found, self.offset_of(found, zero), zero
        spread = qq * mass - q * q
        slope = torch.where(spread > 1e-6 * qq * mass, (qw * mass - q * w) / some(spread), scale)
        level = torch.where(mass > 0, (w - slope * q) / some(mass), offset)
        return slope, level, zero

    def refit(self, target: Tensor, hessian: Tensor) -> bool:
        """Solve for all scales (and minima) of a row at once: they enter its error linearly."""
        format = self.format
        if format.tile_rows != 1:
            return False
        groups = torch.arange(self.shape[1]) // self.group
        shift = self.zero[:, groups].T if format.offset == "zero" else float(format.middle)
        shift = shift if format.offset in ("zero", "symmetric") else 0.0
        moved = self.codes.float() - shift  # [in, out]
        solved = solve_grids(target, hessian, moved, self.group, format.offset == "minimum")
        if solved is None:
            return False
        scale, level = solved
        usable = torch.isfinite(scale) & (scale.abs() < torch.finfo(torch.float16).max)
        scale = torch.where(usable & (scale.half() != 0), scale, self.scale)
        offset = level if level is not None else self.offset_of(scale, self.zero)
        self.put(0, scale, torch.where(usable, offset, self.offset), self.zero)
        return True


def solve_grids(
    target: Tensor, hessian: Tensor, codes: Tensor, group: int, with_level: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Return scales s (and levels m) [out, groups] that minimise, for every row w of the target,
    (w - B p)^T H (w - B p), where B p = codes s + m group by group.

    target, codes [in, out]; hessian float64 [in, in]. None where the equations are singular.
    """
    channels, rows = target.shape
    number = -(-channels // group)
    fill = number * group - channels
    h = torch.nn.functional.pad(hessian.double(), (0, fill, 0, fill))
    q = torch.nn.functional.pad(codes.T.double(), (0, fill))  # [out, in]
    w = torch.nn.functional.pad(target.T.double(), (0, fill))

    def by_group(values: Tensor) -> Tensor:
        summed: Tensor = values.unflatten(-1, (number, group)).sum(-1)
        return summed

    hw = w @ h
    a = torch.empty(rows, number * (1 + with_level), number * (1 + with_level)).double()
    for each in range(number):
        columns = slice(each * group, (each + 1) * group)
        left = q[:, columns] @ h[columns]
        a[:, each, :number] = by_group(left * q)
        if with_level:
            a[:, each, number:] = by_group(left)
    b = by_group(hw * q)
    if with_level:
        a[:, number:, :number] = a[:, :number, number:].transpose(1, 2)
        a[:, number:, number:] = by_group(by_group(h).T)
        b = torch.cat((b, by_group(hw)), 1)
    diagonal = a.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-7 * diagonal.mean(1, keepdim=True))
    factor, info = torch.linalg.cholesky_ex(a)
    if bool(info.any()):
        return None
    solved = torch.cholesky_solve(b.unsqueeze(2), factor).squeeze(2).float()
    return solved[:, :number].contiguous(), solved[:, number:].contiguous() if with_level else None
