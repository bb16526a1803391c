"""Terms that list the entries of each row: single outliers, groups of neighbours."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def longest(start, stop):
    """Return how many entries the longest of some rows has."""
    return tl.max(stop - start, 0)


@triton.jit
def outliers(acc, x, places, start, stop, columns, values, TOGETHER: tl.constexpr):
    """Add value x[column] of single entries, TOGETHER of a row at once."""
    lane = tl.arange(0, TOGETHER)
    for first in range(0, longest(start, stop), TOGETHER):
        entry = start[:, None] + first + lane[None, :]
        inside = entry < stop[:, None]
        column = tl.load(columns + entry, mask=inside, other=0).to(tl.int32)
        value = tl.load(values + entry, mask=inside, other=0.0).to(tl.float32)
        at = places[None, None, :] + column[:, :, None]
        acc += tl.sum(value[:, :, None] * tl.load(x + at).to(tl.float32), 1)
    return acc


@triton.jit
def numbered(start, stop, number):
    """Return the entries `number` of some rows, i32[rows, 1]; the last one again beyond it."""
    return tl.maximum(tl.minimum(start + number, stop - 1), 0)[:, None]


@triton.jit
def group(acc, x, places, start, stop, number, column, value, lane, WIDTH: tl.constexpr,
          CHANNELS: tl.constexpr):  # fmt: skip
    """Add the products of entry `number` of each row: `value` covers WIDTH channels from `column`."""
    at = column + lane
    inside = (lane < WIDTH) & (at < CHANNELS) & ((start + number < stop)[:, None])
    weight = tl.where(inside, value, 0.0)
    channel = tl.minimum(at, CHANNELS - 1)
    values = tl.load(x + places[None, None, :] + channel[:, :, None]).to(tl.float32)
    return acc + tl.sum(weight[:, :, None] * values, 1)


@triton.jit
def lanes(WIDTH: tl.constexpr):
    """Return the places inside an entry, i32[1, WIDTH]."""
    return tl.arange(0, WIDTH)[None, :]
