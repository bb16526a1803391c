"""Codes of 1 to 8 bits into small tables of values: non-uniform grids.

A table holds 2^bits float16 values in rising order; there is one for every tile of weights, which
may be all of them (`lookup4·tensor`), a row, a group of columns (g128) or some rows (t64xall):

    lookup3·row                  w = table[tile][code]
    lookup4·tensor·by(g64)       w = table[tile][code] s     s: a float for every tile of by(...)
    nf4·g64                      the same, stored alike; `nearest` takes the quantiles of a normal
                                 distribution for the one table (NormalFloat) and does not fit it

Scales are float16, or a term of their own: `nf4·g64·scale(uint8·row)`.

Sources: SqueezeLLM (Kim et al. 2023), section 4.1, for a table a row by weighted k-means; QLoRA
(Dettmers et al. 2023), section 3 and appendix E, for NF4 and quantized scales.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from qc.ir.weights.expression import Expr, Load
from qc.ir.weights.notation import argument, refuse_rest, take_argument, take_tile
from qc.ir.weights.packing import code_at, pack_codes, row_bytes, unpack_codes
from qc.ir.weights.rounding import Ranges, Rounding
from qc.ir.weights.scales import (
    decode_floats,
    dense_floats,
    floats,
    rows_of_floats,
    store_floats,
    verify_floats,
)
from qc.ir.weights.tiles import Tile, parse_tile
from qc.ir.weights.weight import ArraySpec, Term, TermFormat

ROUNDS = 50
"""Rounds of k-means at most; on normal weights 20 to 40 leave nothing to gain."""

VALUES_AT_ONCE = 1 << 22
"""Values whose tables are fitted together: bounds the float64 sums."""

LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class LookupFormat(TermFormat):
    """`group` inputs x `tile_rows` outputs share a table; None means all of them.

    `by` is the tile of a scale beside the tables, as it is printed; None: there is no scale.
    """

    bits_per_code: int
    group: int | None = None
    tile_rows: int | None = 1
    by: str | None = None
    scale: TermFormat | None = None
    grid: Literal["means", "normal"] = "means"

    examples: ClassVar[tuple[str, ...]] = (
        "lookup2·t64xall", "lookup3·row", "lookup4·g128", "lookup4·tensor·by(g64)", "lookup5·col",
        "lookup8·tensor", "lookup3·t32xall·by(g32)·scale(e4m3·tensor)", "nf4·g64·scale(uint8·row)",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 1 <= self.bits_per_code <= 8:
            raise ValueError(f"codes into a table have 1 to 8 bits, not {self.bits_per_code}")
        if self.by is None and self.scale is not None:
            raise ValueError("a scale format without the tile of the scales, such as by(g64)")
        if self.by is not None and str(parse_tile(self.by)) != self.by:
            raise ValueError(f"by({self.by}) names no tile, such as g64, row or tensor")
        if self.grid == "normal" and (self.group, self.tile_rows) != (None, None):
            raise ValueError("the quantiles of a normal distribution are one table")
        if self.grid == "normal" and (self.by is None or self.bits_per_code < 2):
            raise ValueError("quantiles of a normal distribution have 2 to 8 bits and a scale")
        Tile(self.tile_rows, self.group)

    @property
    def tile(self) -> Tile:
        """The weights that share a table."""
        return Tile(self.tile_rows, self.group)

    @property
    def scale_tile(self) -> Tile | None:
        """The weights that share a scale."""
        return None if self.by is None else parse_tile(self.by)

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        entries = (*self.tile.grid(shape), 1 << self.bits_per_code)
        stored = {
            "codes": ArraySpec((shape[0], row_bytes(shape[1], self.bits_per_code)), torch.uint8),
            "table": ArraySpec(entries, torch.float16),
        }
        if self.scale_tile is not None:
            stored |= floats("scale", self.scale, self.scale_tile.grid(shape))
        return stored

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        code = code_at("codes", (row,), col, self.bits_per_code)
        value = Load("table", (*self.tile.index(shape, row, col), code))
        tile = self.scale_tile
        if tile is None:
            return value
        at = tile.index(shape, row, col)
        return value * decode_floats("scale", self.scale, tile.grid(shape), at)

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        if self.scale_tile is None or self.scale is None:
            return None
        why = self.scale.refusal(self.scale_tile.grid(shape))
        return None if why is None else f"the scales of {self}: {why}"

    def verify(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> None:
        if self.scale_tile is not None:
            verify_floats("scale", self.scale, self.scale_tile.grid(shape), arrays)

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        codes = unpack_codes(arrays["codes"], self.bits_per_code, shape[1]).long()
        rows, cols = self.tile.size(shape)
        across = self.tile.grid(shape)[1]
        number = (
            torch.arange(shape[0]).unsqueeze(1) // rows * across + torch.arange(shape[1]) // cols
        )
        values = arrays["table"].float().take(codes.add_(number << self.bits_per_code))
        return values if self.scale_tile is None else values.mul_(self.spread_scale(shape, arrays))

    def spread_scale(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the scale of every weight, float32[out, in]; 1 without scales."""
        tile = self.scale_tile
        if tile is None:
            return torch.ones(shape)
        return tile.spread(dense_floats("scale", self.scale, tile.grid(shape), arrays), shape)

    def rows(self, term: Term, index: Tensor) -> Term | None:
        if self.tile_rows not in (1, None):
            return None
        table = term.stored["table"]
        kept = {"codes": term.stored["codes"][index]}
        kept["table"] = table[index] if self.tile_rows == 1 else table
        tile = self.scale_tile
        if tile is not None:
            grid = tile.grid(term.shape)
            scale = rows_of_floats("scale", self.scale, tile, grid, term.stored, index)
            if scale is None:
                return None
            kept.update(scale)
        return self.term((len(index), term.shape[1]), kept)

    def nearest(self, values: Tensor) -> Term:
        """Fit the tables by k-means (`fit_tables`), then take the nearest value of the table.

        A scale beside the tables is max|w| of its tile, and errors count by its square. Minimises
        the squared error of each tile as far as k-means does, which finds a local minimum; the
        codes are chosen with tables and scales as they are stored. The normal grid is not fitted.
        """
        values = values.float()
        shape = (values.shape[0], values.shape[1])
        stored: dict[str, Tensor] = {}
        if self.scale_tile is not None:
            store_floats("scale", self.scale, self.largest(values), stored)
        scale = self.spread_scale(shape, stored)
        scaled = self.tables_first(values / torch.where(scale == 0, torch.ones(()), scale))
        if self.grid == "normal":
            table = normal_quantiles(self.bits_per_code).unsqueeze(0)
        else:
            # Also leaves out what fills the last tiles up: there the weight is 0.
            table = fit_tables(scaled, self.tables_first(scale.square()), self.bits_per_code)
        table = table.clamp(-LARGEST, LARGEST).half()
        codes = codes_of(scaled, table.float())
        stored["table"] = table.view(*self.tile.grid(shape), -1)
        stored["codes"] = pack_codes(self.tables_last(codes, shape), self.bits_per_code)
        return self.term(shape, stored)

    def rounding(self, shape: tuple[int, ...], ranges: Ranges = "extremes") -> Rounding | None:
        rows = self.tile.size(shape)[0]
        plain = self.by is None and self.grid == "means" and rows in (1, shape[0])
        return LookupRounding(self, (shape[0], shape[1])) if plain else None

    def resized(self, bits: int | None = None, group: int | None = None) -> LookupFormat | None:
        if group is not None and self.group is None:
            return None
        return replace(self, bits_per_code=bits or self.bits_per_code, group=group or self.group)

    def largest(self, values: Tensor) -> Tensor:
        """Return max|w| of the tiles of scales."""
        return (self.scale_tile or self.tile).reduced(values.abs(), "amax")

    def tables_first(self, values: Tensor) -> Tensor:
        """View a matrix as [tables, weights of a tile], filled up with 0."""
        tiles: Tensor = self.tile.split(values).transpose(1, 2)
        return tiles.flatten(2).flatten(0, 1)

    def tables_last(self, values: Tensor, shape: tuple[int, int]) -> Tensor:
        """Invert `tables_first`."""
        (down, across), (rows, cols) = self.tile.grid(shape), self.tile.size(shape)
        tiles = values.view(down, across, rows, cols).transpose(1, 2)
        return tiles.reshape(down * rows, across * cols)[: shape[0], : shape[1]]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        head = re.fullmatch(r"(lookup|nf)(\d+)", words[0])
        if head is None:
            return None
        bits, rest = int(head[2]), list(words[1:])
        scale, tile = take_argument(rest, "scale"), take_tile(rest, Tile(1, None))
        if head[1] == "nf":
            refuse_rest(rest, "a group (g64, row, o32, tensor) and scale(...)")
            return cls(bits, None, None, str(tile), scale, "normal")
        by = next((found for word in rest if (found := argument(word, "by")) is not None), None)
        refuse_rest(
            [word for word in rest if word != f"by({by})"],
            "a tile of a table (row, g128, tensor, t64xall), by(...) and scale(...)",
        )
        return cls(bits, tile.cols, tile.rows, by, scale)

    def __str__(self) -> str:
        scale = "" if self.scale is None else f"·scale({self.scale})"
        if self.grid == "normal":
            return f"nf{self.bits_per_code}·{self.by}{scale}"
        by = "" if self.by is None else f"·by({self.by})"
        return f"lookup{self.bits_per_code}·{self.tile}{by}{scale}"


class LookupRounding(Rounding):
    """Tables column by column: k-means of the weights of a tile, then the nearest value.

    A tile is a row of one group, or all rows of it.
    """

    def __init__(self, format: LookupFormat, shape: tuple[int, int]) -> None:
        self.format, self.shape = format, shape
        self.group = format.tile.size(shape)[1]
        down, across = format.tile.grid(shape)
        self.tables = torch.zeros(across, down, 1 << format.bits_per_code)
        self.codes = torch.zeros(shape[1], shape[0], dtype=torch.uint8)

    def fit(self, first: int, values: Tensor, importance: Tensor) -> None:
        for start in range(0, len(values), self.group):
            part = values[start : start + self.group].T  # [out, columns]
            weight = importance[start : start + self.group].float().T.expand_as(part)
            shape = (self.tables.shape[1], -1)
            found = fit_tables(
                part.reshape(shape), weight.reshape(shape), self.format.bits_per_code
            )
            stored = found.clamp(-LARGEST, LARGEST).half().float()
            self.tables[(first + start) // self.group] = stored

    def round(self, column: int, values: Tensor) -> Tensor:
        tables = self.tables[column // self.group]
        codes = codes_of(values.view(len(tables), -1), tables)
        self.codes[column] = codes.flatten()
        return tables.gather(1, codes.long()).flatten()

    def term(self) -> Term:
        stored = {
            "codes": pack_codes(self.codes.T.contiguous(), self.format.bits_per_code),
            "table": self.tables.transpose(0, 1).half().contiguous(),
        }
        return self.format.term(self.shape, stored)


def normal_quantiles(bits: int) -> Tensor:
    """Return the NormalFloat grid: 2^bits quantiles of N(0, 1) with an exact 0, from -1 to 1.

    With n = 2^bits, the n / 2 lowest (0 the last) are even in probability from d to 1/2, the
    n / 2 + 1 highest (0 the first) from 1/2 to 1 - d, with d = (1 / 2n + 1 / (2n - 2)) / 2; all
    are divided by the largest. QLoRA, appendix E.
    """
    half = 1 << (bits - 1)
    margin = (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    below = torch.linspace(margin, 0.5, half, dtype=torch.float64)[:-1]
    above = torch.linspace(0.5, 1 - margin, half + 1, dtype=torch.float64)
    found: Tensor = torch.special.ndtri(torch.cat([below, above]))
    return (found / found[-1]).float()


def fit_tables(values: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Return tables [tables, 2^bits], rising, of values [tables, n] by weighted 1-D k-means.

    Each round (Lloyd) cuts the line halfway between neighbours of a table and replaces each by the
    weighted mean of its interval, which never raises sum weights (value - nearest)^2; an empty
    interval keeps its value. Sorting once makes a round a few searches in prefix sums.
    """
    bands = values.split(max(1, VALUES_AT_ONCE // max(1, values.shape[1])))
    each = weights.split(len(bands[0]))
    return torch.cat([fit_band(v, w, bits) for v, w in zip(bands, each, strict=True)])


def fit_band(values: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Fit tables, all together."""
    values, order = values.double().contiguous().sort(dim=1)
    weights = weights.double().gather(1, order)
    mass, moment = sums_before(weights), sums_before(weights * values)
    table = first_table(values, weights, 1 << bits)
    for _ in range(ROUNDS):
        cuts = torch.searchsorted(values, halfway(table))
        none = torch.zeros_like(cuts[:, :1])
        edges = torch.cat([none, cuts, none + values.shape[1]], 1)
        inside = mass.gather(1, edges).diff()
        means = moment.gather(1, edges).diff() / torch.where(inside > 0, inside, 1)
        previous, table = table, torch.where(inside > 0, means, table)
        if torch.equal(previous, table):
            break
    return table.float()


def first_table(values: Tensor, weights: Tensor, size: int) -> Tensor:
    """Return `size` quantiles of the distribution with density (weight · density)^(1/3).

    So fine grids of least squared error lie (Panter and Dite 1951): denser than even steps where
    weights are many, but further out than the quantiles of the weights. A gap between neighbours in
    order is 1 / density there.
    """
    gaps = values.diff() * weights[:, 1:].sign() * weights[:, :-1].sign()
    share = (gaps.square() * weights[:, 1:]).pow(1 / 3)
    below = sums_before(share)
    wanted = (torch.arange(size, dtype=torch.float64) + 0.5) / size * below[:, -1:]
    at = torch.searchsorted(below, wanted).clamp_max(values.shape[1] - 1)
    return values.gather(1, at)


def sums_before(values: Tensor) -> Tensor:
    """Return the sums of values[:, :i] for i = 0 to n."""
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def halfway(table: Tensor) -> Tensor:
    """Return the points halfway between neighbours of each table."""
    return ((table[:, 1:] + table[:, :-1]) / 2).contiguous()


def codes_of(values: Tensor, table: Tensor) -> Tensor:
    """Return the numbers of the nearest table values, u8[tables, n]; halfway, the lower one."""
    return torch.searchsorted(halfway(table), values.contiguous(), out_int32=True).to(torch.uint8)
