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


@triton.jit
def numbers(start, stop, BLOCKS: tl.constexpr, TOGETHER: tl.constexpr):
    """Return the entries of each of BLOCKS blocks of outputs, the first TOGETHER of them, and where
    they stop: i32[BLOCKS, TOGETHER] and i32[BLOCKS]."""
    OUT: tl.constexpr = start.shape[0] // BLOCKS
    first = tl.min(tl.reshape(start, [BLOCKS, OUT]), 1)
    last = tl.max(tl.reshape(stop, [BLOCKS, OUT]), 1)
    return first[:, None] + tl.arange(0, TOGETHER)[None, :], last


@triton.jit
def ahead(entry, last, columns, values):
    """Load the columns and values of entries, 0 beyond the last ones."""
    inside = entry < last[:, None]
    column = tl.load(columns + entry, mask=inside, other=0)
    return column, tl.load(values + entry, mask=inside, other=0.0)


@triton.jit
def limits(start, stop, BLOCKS: tl.constexpr):
    """Return where the entries of outputs start and how many there are, i32[BLOCKS, outputs, 1]."""
    OUT: tl.constexpr = start.shape[0] // BLOCKS
    count = stop - start
    begin = tl.reshape(start, [BLOCKS, OUT])[:, :, None]
    return begin, tl.reshape(count, [BLOCKS, OUT])[:, :, None].to(tl.uint32)


@triton.jit
def most(entry, last):
    """Return how many entries the block with most has."""
    return tl.max(last - tl.min(entry, 1), 0)


@triton.jit
def turn(total, x, places, begin, count, entry, column, value, APART: tl.constexpr):
    """Add the products of some entries of every block: tensor cores multiply the rows of x that
    entries name by their values, each in the row of its output."""
    at = places[None, None, :] + (column.to(tl.int32) * APART)[:, :, None]
    found = tl.load(x + at)
    here = (entry[:, None, :] - begin).to(tl.uint32) < count
    weight = tl.where(here, value.to(found.dtype)[:, None, :], 0.0)
    return tl.dot(weight, found, total)


@triton.jit
def cleared(acc, BLOCKS: tl.constexpr):
    """Return zeros for the products of entries, f32[BLOCKS, outputs of a block, rows]."""
    return tl.zeros([BLOCKS, acc.shape[0] // BLOCKS, acc.shape[1]], tl.float32)


@triton.jit
def joined(acc, total):
    """Add the products of all blocks to an accumulator."""
    return acc + tl.reshape(total, acc.shape)


@triton.jit
def rest(total, x, places, begin, count, entry, last, columns, values, column, value,
         FIRST: tl.constexpr, APART: tl.constexpr):  # fmt: skip
    """Take turns until there are no entries."""
    TOGETHER: tl.constexpr = entry.shape[1]
    for _ in range(FIRST * TOGETHER, most(entry, last) + FIRST * TOGETHER, TOGETHER):
        then = entry + TOGETHER
        next_column, next_value = ahead(then, last, columns, values)
        total = turn(total, x, places, begin, count, entry, column, value, APART)
        entry, column, value = then, next_column, next_value
    return total


@triton.jit
def doubled(acc, x, places, start, stop, columns, values, column, value, APART: tl.constexpr,
             TOGETHER: tl.constexpr):  # fmt: skip
    """Like outliers, gathers a turn ahead."""
    OUT: tl.constexpr = acc.shape[0]
    ROWS: tl.constexpr = places.shape[0]
    entry = start[:, None] + tl.arange(0, TOGETHER)[None, :]
    total = tl.zeros([OUT, TOGETHER, ROWS], tl.float32)
    found = tl.load(x + places[None, None, :] + (column.to(tl.int32) * APART)[:, :, None])
    entry += TOGETHER
    inside = entry < stop[:, None]
    column = tl.load(columns + entry, mask=inside, other=0)
    after = tl.load(values + entry, mask=inside, other=0.0)
    for _ in range(0, longest(start, stop), TOGETHER):
        ahead = tl.load(x + places[None, None, :] + (column.to(tl.int32) * APART)[:, :, None])
        entry += TOGETHER
        inside = entry < stop[:, None]
        column = tl.load(columns + entry, mask=inside, other=0)
        later = tl.load(values + entry, mask=inside, other=0.0)
        total += value.to(tl.float32)[:, :, None] * found.to(tl.float32)
        found, value, after = ahead, after, later
    return acc + tl.sum(total, 1)


@triton.jit
def fma_cleared(acc, TOGETHER: tl.constexpr):
    return tl.zeros([acc.shape[0], TOGETHER, acc.shape[1]], tl.float32)


@triton.jit
def fma_first(start, TOGETHER: tl.constexpr):
    return start[:, None] + tl.arange(0, TOGETHER)[None, :]


@triton.jit
def gathered(x, places, column, APART: tl.constexpr):
    return tl.load(x + places[None, None, :] + (column.to(tl.int32) * APART)[:, :, None])


@triton.jit
def fma(total, value, found):
    return total + value.to(tl.float32)[:, :, None] * found.to(tl.float32)


@triton.jit
def fma_rest(total, x, places, entry, stop, columns, values, column, value, start,
             FIRST: tl.constexpr, APART: tl.constexpr):  # fmt: skip
    TOGETHER: tl.constexpr = entry.shape[1]
    for _ in range(FIRST * TOGETHER, longest(start, stop), TOGETHER):
        entry += TOGETHER
        next_column, next_value = ahead(entry, stop, columns, values)
        total = fma(total, value, gathered(x, places, column, APART))
        column, value = next_column, next_value
    return total


@triton.jit
def summed(acc, total):
    return acc + tl.sum(total, 1)


@triton.jit
def static(acc, x, places, start, stop, columns, values, column, value, APART: tl.constexpr,
           TOGETHER: tl.constexpr, TURNS: tl.constexpr):  # fmt: skip
    OUT: tl.constexpr = acc.shape[0]
    ROWS: tl.constexpr = places.shape[0]
    entry = start[:, None] + tl.arange(0, TOGETHER)[None, :]
    total = tl.zeros([OUT, TOGETHER, ROWS], tl.float32)
    cols = (column,)
    vals = (value,)
    for t in tl.static_range(1, TURNS):
        here = entry + t * TOGETHER
        inside = here < stop[:, None]
        cols = cols + (tl.load(columns + here, mask=inside, other=0),)
        vals = vals + (tl.load(values + here, mask=inside, other=0.0),)
    for t in tl.static_range(TURNS):
        there = (entry + t * TOGETHER < stop[:, None])[:, :, None]
        at = places[None, None, :] + (cols[t].to(tl.int32) * APART)[:, :, None]
        got = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        total += vals[t].to(tl.float32)[:, :, None] * got
    for turn in range(TURNS * TOGETHER, longest(start, stop), TOGETHER):
        late = entry + turn
        more = late < stop[:, None]
        late_column = tl.load(columns + late, mask=more, other=0)
        late_value = tl.load(values + late, mask=more, other=0.0)
        late_at = places[None, None, :] + (late_column.to(tl.int32) * APART)[:, :, None]
        found = tl.load(x + late_at, mask=more[:, :, None], other=0.0).to(tl.float32)
        total += late_value.to(tl.float32)[:, :, None] * found
    return acc + tl.sum(total, 1)


@triton.jit
def flat(acc, x, places, start, stop, columns, values, APART: tl.constexpr,
         TOGETHER: tl.constexpr, TURNS: tl.constexpr):  # fmt: skip
    """One slot a turn, no sum over threads."""
    OUT: tl.constexpr = acc.shape[0]
    ROWS: tl.constexpr = places.shape[0]
    total = tl.zeros([OUT, ROWS], tl.float32)
    for turn in range(0, longest(start, stop), TOGETHER):
        cols = ()
        vals = ()
        for t in tl.static_range(TOGETHER):
            here = start + turn + t
            inside = here < stop
            cols = cols + (tl.load(columns + here, mask=inside, other=0),)
            vals = vals + (tl.load(values + here, mask=inside, other=0.0),)
        for t in tl.static_range(TOGETHER):
            inside = (start + turn + t < stop)[:, None]
            at = places[None, :] + (cols[t].to(tl.int32) * APART)[:, None]
            found = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            total += vals[t].to(tl.float32)[:, None] * found
    return acc + total
