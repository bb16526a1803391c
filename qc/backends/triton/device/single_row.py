"""Whole rows in registers: BLOCK channels, a power of two, of which SIZE exist.

Channels beyond are 0 when a row is loaded; what is computed there is never stored.
"""

import triton
import triton.language as tl

from qc.backends.triton.device.constants import LOWEST


@triton.jit
def number():
    """The row of this program."""
    return tl.program_id(0)


@triton.jit
def channels(BLOCK: tl.constexpr):
    return tl.arange(0, BLOCK)


@triton.jit
def load(pointer, row, channel, SIZE: tl.constexpr):
    """One row of values."""
    found = tl.load(pointer + row.to(tl.int64) * SIZE + channel, mask=channel < SIZE, other=0)
    return found.to(tl.float32)


@triton.jit
def load_vector(pointer, channel, SIZE: tl.constexpr):
    """One row for all."""
    return tl.load(pointer + channel, mask=channel < SIZE, other=0).to(tl.float32)


@triton.jit
def load_number(pointer, row):
    """One value a row."""
    return tl.load(pointer + row).to(tl.float32)


@triton.jit
def store(pointer, row, channel, SIZE: tl.constexpr, value):
    at = pointer + row.to(tl.int64) * SIZE + channel
    value = tl.broadcast_to(value.to(pointer.dtype.element_ty), channel.shape)
    tl.store(at, value, mask=channel < SIZE)


@triton.jit
def store_number(pointer, row, value):
    tl.store(pointer + row, value.to(pointer.dtype.element_ty))


@triton.jit
def existing(x, channel, SIZE: tl.constexpr, other):
    """x where there are channels, `other` beyond."""
    return tl.where(channel < SIZE, x, other)


@triton.jit
def sum(x, channel, SIZE: tl.constexpr):
    return tl.sum(existing(x, channel, SIZE, 0.0), 0)


@triton.jit
def mean(x, channel, SIZE: tl.constexpr):
    return sum(x, channel, SIZE) / SIZE


@triton.jit
def max(x, channel, SIZE: tl.constexpr):
    return tl.max(existing(x, channel, SIZE, float("-inf")), 0)


@triton.jit
def min(x, channel, SIZE: tl.constexpr):
    return tl.min(existing(x, channel, SIZE, float("inf")), 0)


@triton.jit
def rms_norm(x, gain, channel, SIZE: tl.constexpr, EPS: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) * gain. Zhang and Sennrich 2019, eq. 4."""
    return x * (1.0 / tl.sqrt(mean(x * x, channel, SIZE) + EPS)) * gain


@triton.jit
def layer_norm(x, gain, bias, channel, SIZE: tl.constexpr, EPS: tl.constexpr):
    """The variance of the deviations: subtracting squares cancels. Ba et al. 2016."""
    deviation = x - mean(x, channel, SIZE)
    variance = mean(deviation * deviation, channel, SIZE)
    return deviation * (1.0 / tl.sqrt(variance + EPS)) * gain + bias


@triton.jit
def softmax(x, channel, SIZE: tl.constexpr):
    largest = tl.maximum(max(x, channel, SIZE), LOWEST)
    power = existing(tl.exp(x - largest), channel, SIZE, 0.0)
    return power / tl.sum(power, 0)


@triton.jit
def in_steps(x, channel, SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
             LIMIT: tl.constexpr):  # fmt: skip
    """Return x / scale [groups, GROUP] and scale = max |x| / LIMIT of each GROUP of channels."""
    groups = tl.reshape(existing(x, channel, SIZE, 0.0), (BLOCK // GROUP, GROUP))
    largest = tl.max(tl.abs(groups), 1)
    inverse = tl.where(largest > 0, LIMIT / tl.where(largest > 0, largest, 1.0), 0.0)
    scaled = groups * inverse[:, None]
    return tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT), largest * (1.0 / LIMIT)


@triton.jit
def quantize(
    codes, scales, x, row, channel,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr,
    encode: tl.constexpr,
):  # fmt: skip
    """Store encode(x / scale) and scale for each GROUP of channels."""
    STORED: tl.constexpr = (SIZE + GROUP - 1) // GROUP
    scaled, scale = in_steps(x, channel, SIZE, BLOCK, GROUP, LIMIT)
    flat = encode(tl.reshape(scaled, (BLOCK,)))
    tl.store(codes + row.to(tl.int64) * SIZE + channel, flat, mask=channel < SIZE)
    group = tl.arange(0, BLOCK // GROUP)
    tl.store(scales + row * STORED + group, scale, mask=group < STORED)


@triton.jit
def fake_quantize(
    x, channel,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr,
    rounded: tl.constexpr,
):  # fmt: skip
    """scale rounded(x / scale) for each GROUP of channels."""
    scaled, scale = in_steps(x, channel, SIZE, BLOCK, GROUP, LIMIT)
    return tl.reshape(rounded(scaled) * scale[:, None], (BLOCK,))
