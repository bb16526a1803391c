"""Floats of 4 bits (e2m1), two in a byte, with scales of e4m3 for 16 channels, and their products.

Tensor cores of sm_100 and sm_120 take codes and scales as they are (`mma` of kind mxf4nvf4; PTX
ISA 8.8, section 9.7.14). What the scales of all channels have in common, a factor of a token and
one of the matrix, multiplies the finished sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qc.backends.triton.device.codes import from_e4m3, to_e4m3
from qc.backends.triton.device.single_row import existing


@triton.jit
def to_e2m1(x):
    """Round to floats of 4 bits, ties to even: |x| is 6 at most.

    A float32 2^-126 times as large has its exponent where that of e2m1 has the same value: what is
    left is to round 22 of its bits away. OCP Microscaling Formats 1.0, section 5.3.3.
    """
    bits = (tl.abs(x) * 1.1754943508222875e-38).to(tl.uint32, bitcast=True)
    rounded = (bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22
    sign = x.to(tl.uint32, bitcast=True) >> 31
    return (rounded | sign << 3).to(tl.uint8)


@triton.jit
def from_e2m1(codes):
    """What codes stand for, times 2^-14: the exponents of float16 are larger by 14."""
    bits = codes.to(tl.int16)
    return (((bits & 7) << 9) | ((bits & 8) << 12)).to(tl.float16, bitcast=True)


@triton.jit
def encoded(x, channel, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Return codes [groups, GROUP], the scale of each GROUP of channels, the factor of the row's
    scales, and the product of both."""
    groups = tl.reshape(existing(x, channel, SIZE, 0.0), (BLOCK // GROUP, GROUP))
    largest = tl.max(tl.abs(groups), 1)
    token = tl.max(largest, 0)
    inverse = tl.where(token > 0, 448.0 / tl.where(token > 0, token, 1.0), 0.0)
    scale = to_e4m3(tl.minimum(largest * inverse, 448.0))
    factor = token * (1.0 / 2688.0)
    whole = from_e4m3(scale).to(tl.float32) * 256.0 * factor
    inverse = tl.where(whole > 0, 1.0 / tl.where(whole > 0, whole, 1.0), 0.0)
    scaled = tl.minimum(tl.maximum(groups * inverse[:, None], -6.0), 6.0)
    return to_e2m1(scaled), scale, factor, whole


@triton.jit
def quantize(codes, scales, factors, x, row, channel, SIZE: tl.constexpr, BLOCK: tl.constexpr,
             GROUP: tl.constexpr):  # fmt: skip
    """Store codes, the scale of each GROUP of channels, and the factor of the row's scales."""
    code, scale, factor, _ = encoded(x, channel, SIZE, BLOCK, GROUP)
    low, high = tl.split(tl.reshape(code, (BLOCK // 2, 2)))
    pair = tl.arange(0, BLOCK // 2)
    at = codes + row.to(tl.int64) * (SIZE // 2) + pair
    tl.store(at, low | (high << 4), mask=pair < SIZE // 2)
    group = tl.arange(0, BLOCK // GROUP)
    inside = group < SIZE // GROUP
    tl.store(scales + row.to(tl.int64) * (SIZE // GROUP) + group, scale, mask=inside)
    tl.store(factors + row, factor)


@triton.jit
def fake_quantize(x, channel, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """What the codes of a row stand for."""
    code, _, _, whole = encoded(x, channel, SIZE, BLOCK, GROUP)
    values = from_e2m1(code).to(tl.float32) * 16384.0 * whole[:, None]
    return tl.reshape(values, (BLOCK,))


@triton.jit
def row_tile(codes, scale, factor, rows, places, start, CHANNELS: tl.constexpr,
             GROUP: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Load channels of quantized rows and widen them, [WIDTH, rows], rounded to DTYPE; 0 beyond
    CHANNELS."""
    channel = start + tl.arange(0, WIDTH)
    inside = (channel < CHANNELS)[:, None]
    pair = tl.load(codes + places[None, :] + (channel // 2)[:, None], mask=inside, other=0)
    code = (pair.to(tl.int32) >> ((channel % 2) * 4)[:, None]) & 15
    GROUPS: tl.constexpr = CHANNELS // GROUP
    at = scale + rows[None, :] * GROUPS + tl.minimum(channel // GROUP, GROUPS - 1)[:, None]
    whole = from_e4m3(tl.load(at)).to(tl.float32) * tl.load(factor + rows)[None, :]
    return (from_e2m1(code).to(tl.float32) * 4194304.0 * whole).to(DTYPE)  # 2^14, and 2^8 of e4m3


@triton.jit
def groups(codes, scale, out, start, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Load the codes of some channels as words of 16 bits, i16[OUT, WIDTH / 16, 4], and the scales
    of groups, f32[OUT, WIDTH / 16, 1] times what `from_e2m1` leaves out. Beyond CHANNELS the last
    group again."""
    group = start // 16 + tl.arange(0, WIDTH // 16)[None, :, None]
    if CHANNELS % WIDTH != 0:
        group = tl.minimum(group, CHANNELS // 16 - 1)
    words = codes.to(tl.pointer_type(tl.int16), bitcast=True)
    row = out[:, None, None]
    found = tl.load(words + row * (CHANNELS // 4) + group * 4 + tl.arange(0, 4)[None, None, :])
    factor = from_e4m3(tl.load(scale + row * (CHANNELS // 16) + group)).to(tl.float32)
    return found, factor * 4194304.0  # 2^14, and 2^8 of e4m3


@triton.jit
def widened(halves, factor, WIDTH: tl.constexpr):
    """Put the numbers of four codes of each word in order and multiply the scales of their groups:
    f32[OUT, WIDTH], exact in float16, too."""
    even = tl.join(halves[0].to(tl.float32) * factor, halves[2].to(tl.float32) * factor)
    odd = tl.join(halves[1].to(tl.float32) * factor, halves[3].to(tl.float32) * factor)
    return tl.reshape(tl.join(even, odd), [halves[0].shape[0], WIDTH])


@triton.jit
def whole(acc, factor):
    """Multiply sums by the factor of the matrix."""
    return acc * tl.load(factor)


@triton.jit
def weights(codes, out, start, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Load the codes of a left operand [OUT, WIDTH], two a byte."""
    pair = start // 2 + tl.arange(0, WIDTH // 2)
    return tl.load(codes + out[:, None] * (CHANNELS // 2) + pair[None, :])


@triton.jit
def scales(scale, rows, start, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Load the scales of the groups of 16 of some rows or outputs, [rows, WIDTH / 16]."""
    group = start // 16 + tl.arange(0, WIDTH // 16)
    found = tl.load(scale + rows[:, None] * (CHANNELS // 16) + group[None, :])
    return found.to(tl.float8e4nv, bitcast=True)


@triton.jit
def more(acc, left, left_scale, x, x_scale):
    """acc + left x, both with their scales."""
    return tl.dot_scaled(left, left_scale, "e2m1", x, x_scale, "e2m1", acc)


@triton.jit
def scaled(acc, factor, rows, whole):
    """Multiply sums [out, rows] by the factors of the rows and by that of the matrix."""
    return acc * (tl.load(factor + rows) * tl.load(whole))[None, :]
