"""Tiles: which weights share a scale, an offset or a table.

A matrix [out, in] is cut into tiles of `rows` x `cols` weights; None means all of that axis. The
last tile of an axis may be smaller. Printed: g32 (32 inputs of one output), row, o32 (32 outputs of
one input, per-input-channel groups), col, tensor, t16x16.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from qc.ir.weights.expression import Expr


@dataclass(frozen=True)
class Tile:
    """The size of a tile."""

    rows: int | None = 1
    cols: int | None = None

    def __post_init__(self) -> None:
        for size in (self.rows, self.cols):
            if size is not None and size < 1:
                raise ValueError(f"a group holds at least one weight, not {size}")

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the rows and columns of a full tile of a matrix."""
        rows, cols = (
            max(1, whole if part is None else min(part, whole))
            for part, whole in zip((self.rows, self.cols), shape, strict=True)
        )
        return rows, cols

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return how many tiles there are along each axis."""
        rows, cols = self.size(shape)
        return -(-shape[0] // rows), -(-shape[1] // cols)

    def index(self, shape: tuple[int, ...], row: Expr, col: Expr) -> tuple[Expr, Expr]:
        """Return the tile that holds an element."""
        rows, cols = self.size(shape)
        return row // rows, col // cols

    def spread(self, per_tile: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Repeat values [tiles, tiles] to float32[out, in]."""
        rows, cols = self.size(shape)
        return joined(self.over(per_tile.float()).expand(-1, rows, -1, cols), shape)

    def over(self, per_tile: Tensor) -> Tensor:
        """Lay values [tiles, tiles] out so that they broadcast over what `split` returns."""
        return per_tile[:, None, :, None]

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the minima and maxima of the tiles of a matrix."""
        return self.reduced(values, "amin", float("inf")), self.reduced(
            values, "amax", -float("inf")
        )

    def reduced(self, values: Tensor, kind: str, neutral: float = 0.0) -> Tensor:
        """Apply `amin`, `amax` or `sum` to every tile; `neutral` fills what tiles lack."""
        result: Tensor = getattr(self.split(values, neutral), kind)((1, 3))
        return result

    def split(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """View a matrix as [tiles, rows, tiles, cols], filled up with `fill`."""
        rows, cols = self.size(tuple(values.shape))
        below, right = -values.shape[0] % rows, -values.shape[1] % cols
        padded: Tensor = values
        if below or right:
            padded = _pad(values, below, right, fill)
        tiles: Tensor = padded.unflatten(1, (-1, cols)).unflatten(0, (-1, rows))
        return tiles

    def __str__(self) -> str:
        match self.rows, self.cols:
            case 1, None:
                return "row"
            case None, None:
                return "tensor"
            case None, 1:
                return "col"
            case 1, int(cols):
                return f"g{cols}"
            case int(rows), 1:
                return f"o{rows}"
        return f"t{self.rows or 'all'}x{self.cols or 'all'}"


def joined(split: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Invert `split`: [tiles, rows, tiles, cols] to a matrix of `shape`."""
    return split.flatten(2).flatten(0, 1)[: shape[0], : shape[1]]


def _pad(values: Tensor, below: int, right: int, fill: float) -> Tensor:
    padded: Tensor = values.new_full((values.shape[0] + below, values.shape[1] + right), fill)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded


NAMED = {"row": Tile(1, None), "tensor": Tile(None, None), "col": Tile(None, 1)}


def parse_tile(word: str) -> Tile | None:
    """Invert `str`; None where a word names no tile."""
    if word in NAMED:
        return NAMED[word]
    if found := re.fullmatch(r"g(\d+)", word):
        return Tile(1, int(found[1]))
    if found := re.fullmatch(r"o(\d+)", word):
        return Tile(int(found[1]), 1)
    if found := re.fullmatch(r"t(all|\d+)x(all|\d+)", word):
        rows, cols = (None if size == "all" else int(size) for size in found.groups())
        return Tile(rows, cols)
    return None
