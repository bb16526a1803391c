"""Floats that tiles of weights share: scales and minima, plain or as a term of their own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qc.ir.weights.expression import Expr, Load, rename_arrays
from qc.ir.weights.tiles import Tile
from qc.ir.weights.weight import ArraySpec, TermFormat, inner_term, nested


def floats(
    name: str, inner: TermFormat | None, grid: tuple[int, int], dtype: torch.dtype = torch.float16
) -> dict[str, ArraySpec]:
    """Return how one float a tile is stored: plain, or as the term `inner`."""
    if inner is None:
        return {name: ArraySpec(grid, dtype)}
    return nested(name, inner.arrays(grid))


def decode_floats(
    name: str, inner: TermFormat | None, grid: tuple[int, int], at: tuple[Expr, Expr]
) -> Expr:
    """Read the float of a tile."""
    if inner is None:
        return Load(name, at)
    return rename_arrays(inner.decode(grid, *at), f"{name}.")


def dense_floats(
    name: str, inner: TermFormat | None, grid: tuple[int, int], arrays: Mapping[str, Tensor]
) -> Tensor:
    """Return the floats of all tiles, float32."""
    if inner is None:
        return arrays[name].float()
    return inner_term(name, inner, grid, arrays).dense().float()


def store_floats(
    name: str,
    inner: TermFormat | None,
    values: Tensor,
    stored: dict[str, Tensor],
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Add floats to `stored` and return them as they will be read, float32."""
    if inner is None:
        stored[name] = values.to(dtype)
        return stored[name].float()
    term = inner.nearest(values)
    stored |= {f"{name}.{array}": held for array, held in term.arrays().items()}
    return term.dense().float()


def verify_floats(
    name: str, inner: TermFormat | None, grid: tuple[int, int], arrays: Mapping[str, Tensor]
) -> None:
    """Refuse arrays of an inner term that it refuses."""
    if inner is not None:
        inner_term(name, inner, grid, arrays)


def rows_of_floats(
    name: str,
    inner: TermFormat | None,
    tile: Tile,
    grid: tuple[int, int],
    arrays: Mapping[str, Tensor],
    index: Tensor,
) -> dict[str, Tensor] | None:
    """Return the stored floats of some rows of a matrix; None where they cannot be taken apart.

    Tiles of all rows stay as they are; tiles of one row are taken as the rows of the inner term.
    """
    if tile.rows is None:
        return {a: held for a, held in arrays.items() if a == name or a.startswith(f"{name}.")}
    if tile.rows != 1:
        return None
    if inner is None:
        return {name: arrays[name][index]}
    taken = inner_term(name, inner, grid, arrays).rows(index)
    if taken is None:
        return None
    return {f"{name}.{array}": held for array, held in taken.arrays().items()}


def some(scale: Tensor) -> Tensor:
    """Give a group whose weights are all equal the scale 1: it needs one to divide by."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
