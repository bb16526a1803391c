"""Grouped integers column by column: ranges that are searched, grids that are solved for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qc.ir.weights.packing import pack_codes
from qc.ir.weights.rounding import Ranges, Rounding
from qc.ir.weights.scales import some, store_floats
from qc.ir.weights.weight import Term

if TYPE_CHECKING:
    from qc.ir.weights.grouped import GroupedFormat  # which imports this file

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)
"""Parts of the range of a group that are tried; finer steps gain nothing before `REFITS`."""

REFITS = 3
"""Rounds of: least squares for the grid, then codes anew. The fourth gains below 0.1%."""


PRODUCTS_AT_ONCE = 1 << 22
"""Products of codes and H that `solve_grids` holds: 16 MiB, which the caches hold."""

STAY = 1e-6
"""Part of the mean of the diagonal that is added to equations: what float32 products lose."""


WEIGHTS_AT_ONCE = 1 << 15
"""Weights of a band while ranges are searched: 128 KiB, of which the caches hold a few."""

Grid = tuple[Tensor, Tensor, Tensor]
"""Scale, offset and integer zero of every tile."""


@dataclass(frozen=True)
class Band:
    """Some rows of tiles of a matrix: weights [tiles, rows, tiles, cols], and their importance,
    which is the same for all rows where it has one."""

    tiles: slice
    weights: Tensor
    importance: Tensor


class GroupedRounding(Rounding):
    """Grouped integers column by column: scales and offsets a tile, then codes."""

    def __init__(self, format: GroupedFormat, shape: tuple[int, int], ranges: Ranges) -> None:
        self.format, self.shape, self.ranges = format, shape, ranges
        self.group, self.levels = format.group_size(shape[1]), format.top + 1
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
        bands = list(self.bands(weights, importance))
        low, high = self.extremes(weights)
        best = self.range_of(low, high)
        least = self.error_of(bands, best)
        for shrink in SHRINKS[1:]:
            least = self.better(bands, self.shrunken(low, high, shrink), best, least)
        for _ in range(REFITS):
            least = self.better(bands, self.least_squares(bands, best), best, least)
        return best

    def bands(self, weights: Tensor, importance: Tensor) -> Iterator[Band]:
        """Cut a matrix and its importance into bands of whole tiles that the caches hold."""
        tile = self.format.tile
        rows = tile.size(tuple(weights.shape))[0]
        tiles = max(1, WEIGHTS_AT_ONCE // (rows * weights.shape[1]))
        alike = rows == 1 and importance.shape[0] == 1
        each = importance if alike else importance.expand(weights.shape)
        for number, band in enumerate(weights.split(tiles * rows)):
            start = number * tiles
            mass = each if alike else each[start * rows : start * rows + len(band)]
            yield Band(
                slice(start, start + -(-len(band) // rows)), tile.split(band), tile.split(mass)
            )

    def shrunken(self, low: Tensor, high: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the grid over a part of a range: around its middle, or around 0."""
        if self.format.offset != "minimum":
            return self.range_of(low * share, high * share)
        middle, half = (low + high) / 2, (high - low) * (share / 2)
        return self.range_of(middle - half, middle + half)

    def better(
        self, bands: Sequence[Band], tried: Grid, best: Grid, least: Tensor
    ) -> Tensor:  # fmt: skip
        """Keep what is better, tile by tile, in `best`; return the least errors."""
        error = self.error_of(bands, tried)
        chosen = error < least
        for held, found in zip(best, tried, strict=True):
            held[chosen] = found[chosen]
        return torch.where(chosen, error, least)

    def error_of(self, bands: Sequence[Band], grid: Grid) -> Tensor:
        """Return the weighted squared error of each tile."""
        read = self.as_divided(grid)
        found = []
        for band in bands:
            codes, step, offset = self.codes_of(band, read)
            wrong = codes.mul_(step).add_(offset).sub_(band.weights).square_()
            found.append(wrong.mul_(band.importance).sum((1, 3)))
        return torch.cat(found)

    def codes_of(self, band: Band, read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the codes of a band, and the steps and offsets of its tiles."""
        step, offset = (each[band.tiles, None, :, None] for each in read)
        codes = torch.sub(band.weights, offset).div_(step).round_().clamp_(0, self.format.top)
        return codes, step, offset

    def as_divided(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return steps that can be divided by, and offsets, as `as_plain` reads them."""
        read, start = self.as_plain(grid)
        return some(read), start

    def as_plain(self, grid: Grid) -> tuple[Tensor, Tensor]:
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

    def least_squares(self, bands: Sequence[Band], grid: Grid) -> Grid:
        """Return the grid with the least error for the codes that it gives now."""
        scale, offset, zero = grid
        shift = torch.zeros_like(zero)
        if self.format.offset != "minimum":
            shift = zero if self.format.offset == "zero" else -self.offset_of(zero + 1, zero)
        read, sums = self.as_divided(grid), []
        for band in bands:
            codes, _, _ = self.codes_of(band, read)
            codes -= shift[band.tiles, None, :, None]
            mass = band.importance.expand(codes.shape)
            weighed = codes * mass
            q, w = weighed.sum((1, 3)), (band.weights * mass).sum((1, 3))
            qq, qw = codes.mul_(weighed).sum((1, 3)), weighed.mul_(band.weights).sum((1, 3))
            sums.append(torch.stack((mass.sum((1, 3)), q, w, qq, qw)))
        mass, q, w, qq, qw = torch.cat(sums, 1)
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

    target, codes [in, out]; hessian [in, in]. None where the equations are singular. Products are
    taken in float32, a band of rows at a time, the equations are solved in float64.
    """
    channels, rows = target.shape
    number = -(-channels // group)
    fill = number * group - channels
    h = torch.nn.functional.pad(hessian.float(), (0, fill, 0, fill))
    bands = h.view(number, group, -1)
    q = torch.nn.functional.pad(codes.T, (0, fill)).view(rows, number, group)
    hw = torch.nn.functional.pad(target.T, (0, fill)) @ h
    between = h.view(number, group, number, group).sum((1, 3), dtype=torch.float64)
    solved = []
    at_once = max(1, PRODUCTS_AT_ONCE // (number * number * group))
    for part, wanted in zip(
        q.split(at_once), hw.view(rows, number, group).split(at_once), strict=True
    ):
        # basis [rows, groups, group, 1 or 2]: the codes of a group, and 1 for its level
        basis = torch.stack((part, torch.ones_like(part)), 3) if with_level else part.unsqueeze(3)
        left = torch.bmm(part.transpose(0, 1), bands)  # [groups, rows, in]
        left = left.view(number, -1, number, group).permute(1, 2, 0, 3)
        found = (left @ basis).double()  # [rows, groups, groups, 1 or 2]
        a = found[..., 0]
        b = (wanted.unsqueeze(2) @ basis).squeeze(2).double()
        if with_level:
            mixed = found[..., 1]  # [row, j, i]: codes of group i with the level of group j
            even = between.expand(len(part), -1, -1)
            a = torch.cat((torch.cat((a, mixed.mT), 2), torch.cat((mixed, even), 2)), 1)
        b = b.transpose(1, 2).flatten(1)
        solution = solve_rows((a + a.mT) / 2, b)
        if solution is None:
            return None
        solved.append(solution)
    whole = torch.cat(solved)
    return whole[:, :number].contiguous(), whole[:, number:].contiguous() if with_level else None


def solve_rows(a: Tensor, b: Tensor) -> Tensor | None:
    """Return x with a x = b for every row, a [rows, n, n] positive definite but for rounding;
    float32. None where one is not."""
    a.diagonal(dim1=1, dim2=2).add_(STAY * a.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
    factor, info = torch.linalg.cholesky_ex(a)
    if bool(info.any()):
        return None
    return torch.cholesky_solve(b.unsqueeze(2), factor).squeeze(2).float()
