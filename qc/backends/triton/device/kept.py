"""Groups of weights that a matrix keeps, of codes of 4 bits.

Outputs are sorted by how many groups they have and cut into slices; a step is some groups of every
output of a slice. The steps of all slices stand one after another, and every program takes equally
many, wherever slices end: what several programs add to a slice, the last one of them adds up in
their order. GQSA (Zeng et al. 2024), section 3.4; Stream-K (Osama et al. 2023), section 4.

Threads of a warp have neighbouring outputs of one slice, which have about as many groups: what they
read of x at a time lies close together.

Where there are more rows, `tile` puts the groups of some channels where they belong, for tensor
cores to multiply.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGIC = tl.constexpr(0x4B000000)
"""2^23 as bits of a float32, whose lowest bits count from there."""
BASE = tl.constexpr(8388608.0)


@triton.jit
def number(at, index):
    """Load one of a list of numbers."""
    return tl.load(at + index)


@triton.jit
def outputs(order, cell, SIZE: tl.constexpr):
    """Return the outputs of a slice, i32[SIZE]."""
    return tl.load(order + cell * SIZE + tl.arange(0, SIZE))


@triton.jit
def value(codes, PLACE: tl.constexpr, zero):
    """Return the code at bit PLACE, 16 at most, less `zero`: a float32 of 2^23 with those bits is
    2^23 + code 2^PLACE, from which one multiplication and subtraction takes the rest, exactly."""
    UNIT: tl.constexpr = 1.0 / (1 << PLACE)
    bits = ((codes & (15 << PLACE)) | MAGIC).to(tl.float32, bitcast=True)
    return bits * UNIT - (zero + BASE * UNIT)


# ---------------------------------------------------------------- few rows


@triton.jit
def ends(step, last, stop):
    """Say whether a step is the last one of a slice, or of this program."""
    return (step + 1 == last) | (step + 1 == stop)


@triton.jit
def following(step, stop):
    """Return the next step, or the last one again."""
    return tl.minimum(step + 1, stop - 1)


@triton.jit
def zeros(ROWS: tl.constexpr, GROUPS: tl.constexpr, OUT: tl.constexpr):
    """Return a cleared accumulator f32[ROWS, GROUPS, OUT]."""
    return tl.zeros([ROWS, GROUPS, OUT], tl.float32)


@triton.jit
def load(at, step, GROUPS: tl.constexpr, OUT: tl.constexpr, WORDS: tl.constexpr,
         WORD: tl.constexpr):  # fmt: skip
    """Load one of the WORDS that the groups of a step have, [1, GROUPS, OUT]."""
    group = tl.arange(0, GROUPS)[None, :, None]
    word = (step * GROUPS + group) * WORDS + WORD
    return tl.load(at + word * OUT + tl.arange(0, OUT)[None, None, :])


@triton.jit
def places(rows, place, CHANNELS: tl.constexpr, SIZE: tl.constexpr):
    """Return where groups lie in rows of x, in units of 64 bits, [rows, GROUPS, OUT]."""
    return rows[:, None, None] * (CHANNELS // 4) + place.to(tl.int32) * (SIZE // 4)


@triton.jit
def widened(bits, TYPE: tl.constexpr):
    """Return what the lowest 16 bits are as a number of a type, in float32."""
    if tl.bfloat16 == TYPE:
        return (bits << 16).to(tl.float32, bitcast=True)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def dot(total, x, places, words, zero, NUMBER: tl.constexpr):
    """total + the products of the 16 codes of words, less `zero`, with x; the words are number
    NUMBER of their groups."""
    wide = x.to(tl.pointer_type(tl.int64), bitcast=True)
    for quarter in tl.static_range(4):
        values = tl.load(wide + places + (NUMBER * 4 + quarter))
        codes = (words >> (16 * quarter)).to(tl.int32)
        low, high = values.to(tl.int32), (values >> 32).to(tl.int32)
        for each in tl.static_range(4):
            half = (low if each < 2 else high) >> (16 * (each % 2))
            total += value(codes, 4 * each, zero) * widened(half, x.dtype.element_ty)
    return total


@triton.jit
def scaled(acc, total, scale):
    """acc + total times the scales of groups."""
    return acc + total * scale.to(tl.float32)


@triton.jit
def joined(acc):
    """Add up the groups of every output: f32[rows, OUT]."""
    return tl.sum(acc, 1)


# ---------------------------------------------------------------- more rows


@triton.jit
def bits(at, step, cell, SLICES: tl.constexpr, OUT: tl.constexpr):
    """Load what the outputs of a slice have for the channels of a step, i32[OUT]."""
    return tl.load(at + (step * SLICES + cell) * OUT + tl.arange(0, OUT)).to(tl.int32)


@triton.jit
def counted(mask):
    """Count the bits of numbers of 8 bits."""
    pairs = mask - ((mask >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 15


@triton.jit
def weight(words, NUMBER: tl.constexpr, zero, factor):
    """Return what code NUMBER of words stands for."""
    low = words if NUMBER < 4 else words >> 16
    return value(low, 4 * (NUMBER % 4), zero) * factor


@triton.jit
def tile(codes, scale, zero, middle, first, mask, before, SIZE: tl.constexpr, GROUPS: tl.constexpr,
         OUT: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Return the weights of CHANNELS channels of a slice, f32[OUT, CHANNELS], 0 where none is kept.

    `first` is the first step of the slice; an output has the groups of SIZE channels that bits of
    `mask` say, and `before` of them in front. Without `zero`, all zero points are `middle`.
    """
    group = tl.arange(0, CHANNELS // SIZE)[None, :]
    kept = ((mask[:, None] >> group) & 1) != 0
    ahead = counted(mask[:, None] & ((1 << group) - 1))
    place = first * GROUPS + before[:, None] + ahead
    at = place * OUT + tl.arange(0, OUT)[:, None]
    factor = tl.load(scale + at, mask=kept, other=0.0).to(tl.float32)[:, :, None]
    offset = middle
    if zero is not None:
        offset = tl.load(zero + at, mask=kept, other=0).to(tl.float32)[:, :, None]
    WORDS: tl.constexpr = SIZE // 8
    word = tl.arange(0, WORDS)[None, None, :]
    lane = tl.arange(0, OUT)[:, None, None]
    here = ((place[:, :, None] * (WORDS // 2) + word // 2) * OUT + lane) * 2 + word % 2
    narrow = codes.to(tl.pointer_type(tl.int32), bitcast=True)
    words = tl.load(narrow + here, mask=kept[:, :, None], other=0)
    low = tl.join(weight(words, 0, offset, factor), weight(words, 4, offset, factor))
    lower = tl.join(weight(words, 2, offset, factor), weight(words, 6, offset, factor))
    high = tl.join(weight(words, 1, offset, factor), weight(words, 5, offset, factor))
    higher = tl.join(weight(words, 3, offset, factor), weight(words, 7, offset, factor))
    whole = tl.join(tl.join(low, lower), tl.join(high, higher))  # a thread has all of a word
    return tl.reshape(whole, [OUT, CHANNELS])


@triton.jit
def turned(acc):
    """Turn sums f32[OUT, rows]."""
    return tl.trans(acc)


# ---------------------------------------------------------------- pieces


@triton.jit
def leave(at, sums, piece):
    """Store a piece of a slice, f32[rows, OUT]."""
    SIZE: tl.constexpr = sums.shape[1]
    row = piece * sums.shape[0] + tl.arange(0, sums.shape[0])[:, None]
    tl.store(at + row * SIZE + tl.arange(0, SIZE)[None, :], sums)


@triton.jit
def summed(at, piece, count, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Add up `count` pieces from `piece` on, always in the same order: f32[SIZE, ROWS]."""
    here = at + tl.arange(0, ROWS)[None, :] * SIZE + tl.arange(0, SIZE)[:, None]
    acc = tl.zeros([SIZE, ROWS], tl.float32)
    for number in range(piece, piece + count):
        acc += tl.load(here + number * (ROWS * SIZE))
    return acc
