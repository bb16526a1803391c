"""Tiles that hold several stretches of channels, lanes, of the same outputs.

Few outputs a program would keep few warps busy, and more programs would leave partial sums to add
up. So the rows of a tile are (lane, output), its columns (lane, row of x): where both lanes are the
same, an accumulator holds the sum of that stretch. The other columns cost nothing where tensor
cores would pad them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def outputs(cell, SIZE: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr):
    """Return the outputs of the rows of a tile, i32[LANES SIZE]; beyond COUNT the last again."""
    out = cell * SIZE + tl.arange(0, SIZE * LANES) % SIZE
    if COUNT % SIZE == 0:
        return out
    return tl.minimum(out, COUNT - 1)


@triton.jit
def numbers(tile, SIZE: tl.constexpr, COUNT, LANES: tl.constexpr):
    """Return the rows of x of the columns of a tile, i32[LANES SIZE]."""
    rows = tile * SIZE + tl.arange(0, SIZE * LANES) % SIZE
    return tl.minimum(rows, COUNT - 1)


@triton.jit
def live(tile, SIZE: tl.constexpr, COUNT, LANES: tl.constexpr):
    """Say which columns of a tile have rows of x, i1[LANES SIZE]."""
    return tile * SIZE + tl.arange(0, SIZE * LANES) % SIZE < COUNT


@triton.jit
def places(rows, SIZE: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr):
    """Return where the columns of a tile start in an array [rows, CHANNELS], i64."""
    lane = tl.arange(0, SIZE * LANES) // SIZE
    return rows.to(tl.int64) * CHANNELS + lane * (CHANNELS // LANES)


@triton.jit
def groups(group, SIZE: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr):
    """Return group `group` of the COUNT of every lane, one a row of a tile."""
    return group + tl.arange(0, SIZE * LANES) // SIZE * COUNT


@triton.jit
def joined(acc, LANES: tl.constexpr):
    """Add up the lanes, always in the same order: f32[LANES OUT, LANES ROWS] to f32[OUT, ROWS]."""
    OUT: tl.constexpr = acc.shape[0] // LANES
    ROWS: tl.constexpr = acc.shape[1] // LANES
    lanes = tl.reshape(acc, [LANES, OUT, LANES, ROWS])
    first = tl.arange(0, LANES)[:, None, None, None]
    second = tl.arange(0, LANES)[None, None, :, None]
    return tl.sum(tl.sum(tl.where(first == second, lanes, 0.0), 2), 0)
