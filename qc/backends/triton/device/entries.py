"""Terms that list the entries of each row: single outliers, groups of neighbours."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def longest(start, stop):
    """Return how many entries the longest of some rows has."""
    return tl.max(stop - start, 0)


@triton.jit
def first(start, stop, columns, values, TOGETHER: tl.constexpr):
    """Load the first TOGETHER columns and values of each row."""
    entry = start[:, None] + tl.arange(0, TOGETHER)[None, :]
    inside = entry < stop[:, None]
    column = tl.load(columns + entry, mask=inside, other=0)
    return column, tl.load(values + entry, mask=inside, other=0.0)


@triton.jit
def outliers(acc, x, places, start, stop, columns, values, column, value, APART: tl.constexpr,
             TOGETHER: tl.constexpr):  # fmt: skip
    """Add value x[column] of single entries, TOGETHER of a row at once; the `first` ones are there.
    Channels of x are APART. Entries are loaded a turn ahead."""
    OUT: tl.constexpr = acc.shape[0]
    ROWS: tl.constexpr = places.shape[0]
    entry = start[:, None] + tl.arange(0, TOGETHER)[None, :]
    total = tl.zeros([OUT, TOGETHER, ROWS], tl.float32)
    for _ in range(0, longest(start, stop), TOGETHER):
        entry += TOGETHER
        inside = entry < stop[:, None]
        next_column = tl.load(columns + entry, mask=inside, other=0)
        next_value = tl.load(values + entry, mask=inside, other=0.0)
        at = places[None, None, :] + (column.to(tl.int32) * APART)[:, :, None]
        found = tl.load(x + at).to(tl.float32)
        total += value.to(tl.float32)[:, :, None] * found
        column, value = next_column, next_value
    return acc + tl.sum(total, 1)


@triton.jit
def across(acc, x, start, stop, columns, values, SHARES: tl.constexpr, TOGETHER: tl.constexpr):
    """Add value x[column] of single entries to the rows of one tile, which lie side by side in x,
    i.e. x[channels, rows]. SHARES sets of threads share the entries of an output, so that each
    thread loads 16 bytes of x for an entry; TOGETHER entries are loaded at once."""
    OUT: tl.constexpr = acc.shape[0]
    ROWS: tl.constexpr = acc.shape[1]
    share = tl.arange(0, SHARES)[None, :]
    first = tl.reshape(start[:, None] + share, [OUT * SHARES])
    left = tl.reshape((stop - start)[:, None] - share, [OUT * SHARES])
    column_at, value_at = columns + first, values + first
    row = tl.arange(0, ROWS)[None, :]
    total = tl.zeros([OUT * SHARES, ROWS], tl.float32)
    for _ in range(0, tl.max(left, 0), SHARES * TOGETHER):
        column = ()
        value = ()
        for n in tl.static_range(TOGETHER):  # Triton knows no [*found, ...]
            there = left > n * SHARES
            found = (tl.load(column_at + n * SHARES, mask=there, other=0),)
            column = column + found  # type: ignore[assignment]
            found = (tl.load(value_at + n * SHARES, mask=there, other=0.0),)
            value = value + found  # type: ignore[assignment]
        for n in tl.static_range(TOGETHER):
            at = (column[n].to(tl.int32) * ROWS)[:, None] + row
            inside = (left > n * SHARES)[:, None]
            rows = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            total += value[n].to(tl.float32)[:, None] * rows
        column_at += SHARES * TOGETHER
        value_at += SHARES * TOGETHER
        left -= SHARES * TOGETHER
    if SHARES > 1:
        total = tl.sum(tl.reshape(total, [OUT, SHARES, ROWS]), 1)
    return acc + total


@triton.jit
def numbered(start, stop, number):
    """Return the entries `number` of some rows, i32[rows, 1]; the last one again beyond it."""
    return tl.maximum(tl.minimum(start + number, stop - 1), 0)[:, None]


@triton.jit
def group(total, x, places, start, stop, number, column, value, lane, WIDTH: tl.constexpr,
          CHANNELS: tl.constexpr, APART: tl.constexpr):  # fmt: skip
    """Add the products of entry `number` of each row to f32[out, lanes, rows]: `value` covers WIDTH
    channels from `column`."""
    at = column + lane
    inside = (lane < WIDTH) & (at < CHANNELS) & ((start + number < stop)[:, None])
    weight = tl.where(inside, value, 0.0)
    channel = tl.minimum(at, CHANNELS - 1)
    values = tl.load(x + places[None, None, :] + (channel * APART)[:, :, None]).to(tl.float32)
    return total + weight[:, :, None] * values


@triton.jit
def zeros(out, lane, places):
    """Return f32 zeros [out, lanes, rows]."""
    return tl.zeros([out.shape[0], lane.shape[1], places.shape[0]], tl.float32)


@triton.jit
def reduced(acc, total):
    """Add products to an accumulator, all lanes of an output."""
    return acc + tl.sum(total, 1)


@triton.jit
def lanes(WIDTH: tl.constexpr):
    """Return the places inside an entry, i32[1, WIDTH]."""
    return tl.arange(0, WIDTH)[None, :]
