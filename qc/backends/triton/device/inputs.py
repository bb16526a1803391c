"""Rows of activations: where they lie, and tiles of them as right operands [channels, rows]."""

from __future__ import annotations

import triton
import triton.language as tl

from qc.backends.triton.device.codes import from_e4m3


@triton.jit
def numbers(tile, SIZE: tl.constexpr, COUNT):
    """Return the rows of a tile, i32[SIZE]; beyond COUNT the last row again."""
    rows = tile * SIZE + tl.arange(0, SIZE)
    return tl.minimum(rows, COUNT - 1)


@triton.jit
def live(tile, SIZE: tl.constexpr, COUNT):
    """Say which rows of a tile there are, i1[SIZE]. Nothing is loaded for others: all programs
    would ask for the last row again and again, and wait for the few lines that it lies in."""
    return tile * SIZE + tl.arange(0, SIZE) < COUNT


@triton.jit
def places(rows, CHANNELS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """Return where rows start, i64: row (r BEFORE + b) AFTER + a is [r, b, :, a] of an array
    [..., BEFORE, CHANNELS, AFTER]."""
    if AFTER == 1:
        return rows.to(tl.int64) * CHANNELS
    return (rows // AFTER).to(tl.int64) * (CHANNELS * AFTER) + rows % AFTER


@triton.jit
def tile(x, places, live, start, CHANNELS: tl.constexpr, AFTER: tl.constexpr, WIDTH: tl.constexpr,
         EVEN: tl.constexpr):  # fmt: skip
    """Load channels start to start + WIDTH of some rows, [WIDTH, rows]; 0 beyond CHANNELS, and in
    rows that are not live."""
    channel = start + tl.arange(0, WIDTH)
    at = x + places[None, :] + (channel * AFTER)[:, None]
    if EVEN:
        return tl.load(at, mask=live[None, :], other=0)
    return tl.load(at, mask=(channel < CHANNELS)[:, None] & live[None, :], other=0)


@triton.jit
def codes_and_scales(codes, scale, rows, places, live, start, CHANNELS: tl.constexpr,
                     GROUP: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Load channels of quantized rows and the scales of their groups, [WIDTH, rows] both."""
    channel = start + tl.arange(0, WIDTH)
    inside = (channel < CHANNELS)[:, None] & live[None, :]
    GROUPS: tl.constexpr = (CHANNELS + GROUP - 1) // GROUP
    code = tl.load(codes + places[None, :] + channel[:, None], mask=inside, other=0)
    at = scale + rows[None, :] * GROUPS + tl.minimum(channel // GROUP, GROUPS - 1)[:, None]
    return code, tl.load(at, mask=live[None, :], other=0.0)


@triton.jit
def quantized_tile(codes, scale, rows, places, live, start, CHANNELS: tl.constexpr,
                   GROUP: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Load channels of quantized rows and widen them: code * scale, rounded to DTYPE."""
    code, factor = codes_and_scales(codes, scale, rows, places, live, start, CHANNELS, GROUP, WIDTH)
    return (code.to(tl.float32) * factor).to(DTYPE)


@triton.jit
def small_float_tile(codes, scale, rows, places, live, start, CHANNELS: tl.constexpr,
                     GROUP: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Load channels of rows of e4m3 and widen them like `quantized_tile`."""
    code, factor = codes_and_scales(codes, scale, rows, places, live, start, CHANNELS, GROUP, WIDTH)
    return (from_e4m3(code).to(tl.float32) * (factor * 256.0)).to(DTYPE)


@triton.jit
def selected_tile(x, index, places, start, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Load the channels that index[start], ... name, [WIDTH, rows]; 0 beyond COUNT."""
    number = start + tl.arange(0, WIDTH)
    inside = number < COUNT
    channel = tl.load(index + number, mask=inside, other=0).to(tl.int32) & 0xFFFFFF
    return tl.load(x + places[None, :] + channel[:, None], mask=inside[:, None], other=0.0)


@triton.jit
def summed_tile(partial, places, start, size, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
                WIDTH: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Add up PARTS arrays of `size` float32 that follow each other, in that order: a tile of
    their sum, [WIDTH, rows]; 0 beyond CHANNELS."""
    channel = start + tl.arange(0, WIDTH)
    inside = (channel < CHANNELS)[:, None]
    at = partial + places[None, :] + channel[:, None]
    total = tl.load(at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(at + part * size, mask=inside, other=0.0)
    return total.to(DTYPE)


@triton.jit
def tile_across(tile, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return where the rows of a tile lie, i64[ROWS], in an array [tiles, CHANNELS, ROWS];
    channels are ROWS apart."""
    first = tl.cast(tile, tl.int64) * (CHANNELS * ROWS)
    return first + tl.arange(0, ROWS)
