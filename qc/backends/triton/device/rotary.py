"""Rotary position embedding of heads, and appending to caches: tiles of [HEADS, CHANNELS], powers
of two, of which heads and dim exist."""

import triton
import triton.language as tl


@triton.jit
def heads(HEADS: tl.constexpr):
    return tl.arange(0, HEADS)[:, None]


@triton.jit
def channels(CHANNELS: tl.constexpr):
    return tl.arange(0, CHANNELS)[None, :]


@triton.jit
def token():
    """The number of this program's token among batch * seq."""
    return tl.program_id(0)


@triton.jit
def load(x, token, head, channel, NUMBER: tl.constexpr, DIM: tl.constexpr):
    """The heads of a token: x [batch, seq, NUMBER, DIM]."""
    at = x + token.to(tl.int64) * (NUMBER * DIM) + head * DIM + channel
    return tl.load(at, mask=(head < NUMBER) & (channel < DIM), other=0).to(tl.float32)


@triton.jit
def partner(channel, ROTARY: tl.constexpr):
    """The channel that one is rotated with: i with i + ROTARY / 2."""
    HALF: tl.constexpr = ROTARY // 2
    turned = tl.where(channel < HALF, channel + HALF, channel - HALF)
    return tl.where(channel < ROTARY, turned, channel)


@triton.jit
def rotate(
    x, cos, sin, token, seq, batches, head, channel,
    NUMBER: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """x cos + rotate_half(x) sin, of the first ROTARY channels; cos, sin [batches, seq, ROTARY].
    Su et al. 2021, eq. 34."""
    straight = load(x, token, head, channel, NUMBER, DIM)
    turned = load(x, token, head, partner(channel, ROTARY), NUMBER, DIM)
    place = tl.where(batches == 1, token % seq, token)
    inside = channel < ROTARY
    c = tl.load(cos + place * ROTARY + channel, mask=inside, other=1.0).to(tl.float32)
    s = tl.load(sin + place * ROTARY + channel, mask=inside, other=0.0).to(tl.float32)
    return straight * c + tl.where(channel < ROTARY // 2, -turned, turned) * s


@triton.jit
def store(result, token, head, channel, value, NUMBER: tl.constexpr, DIM: tl.constexpr):
    """Write the heads of a token to [batch, seq, NUMBER, DIM]."""
    at = result + token.to(tl.int64) * (NUMBER * DIM) + head * DIM + channel
    tl.store(at, value.to(result.dtype.element_ty), mask=(head < NUMBER) & (channel < DIM))


@triton.jit
def append(
    cache, token, seq, past, context, head, channel, value,
    NUMBER: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Write the heads of a token behind the past: cache [batch, context, NUMBER, DIM]."""
    place = (token // seq).to(tl.int64) * context + past + token % seq
    at = cache + place * (NUMBER * DIM) + head * DIM + channel
    tl.store(at, value.to(cache.dtype.element_ty), mask=(head < NUMBER) & (channel < DIM))


@triton.jit
def append_codes(
    codes, scales, encode: tl.constexpr, token, seq, past, context, head, channel, value,
    NUMBER: tl.constexpr, DIM: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Write the heads of a token behind the past as codes with a scale a head: codes
    [batch, context, NUMBER, DIM], scales [batch, context, NUMBER]."""
    place = (token // seq).to(tl.int64) * context + past + token % seq
    largest = tl.max(tl.abs(tl.where(channel < DIM, value, 0.0)), 1)[:, None]
    inverse = tl.where(largest > 0, LIMIT / tl.where(largest > 0, largest, 1.0), 0.0)
    inside = head < NUMBER
    at = codes + place * (NUMBER * DIM) + head * DIM + channel
    scaled = tl.minimum(tl.maximum(value * inverse, -LIMIT), LIMIT)
    tl.store(at, encode(scaled), mask=inside & (channel < DIM))
    tl.store(scales + place * NUMBER + head, largest * (1.0 / LIMIT), mask=inside)
