"""The nodes of the decode language that Triton has no sign for."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_int(at):
    """Load stored integers as i32."""
    return tl.load(at).to(tl.int32)


@triton.jit
def load_float(at):
    """Load stored floats as f32."""
    return tl.load(at).to(tl.float32)


@triton.jit
def code(row, position, WIDTH: tl.constexpr, BYTES: tl.constexpr, LAST: tl.constexpr):
    """Read WIDTH bits from bit `position` on, which lie in BYTES bytes; LAST is a row's last."""
    byte = position >> 3
    word = tl.load(row + byte).to(tl.int32)
    for more in tl.static_range(1, BYTES):
        word |= tl.load(row + tl.minimum(byte + more, LAST)).to(tl.int32) << (8 * more)
    return (word >> (position & 7)) & ((1 << WIDTH) - 1)


@triton.jit
def to_float(value):
    """i32 -> f32, by value."""
    return value.to(tl.float32)


@triton.jit
def as_float(value):
    """i32 -> f32, the same bits."""
    return value.to(tl.float32, bitcast=True)


@triton.jit
def as_half(value):
    """The low 16 bits are a float16, widened."""
    return value.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def equal(left, right):
    """1 where two integers are equal, else 0."""
    return (left == right).to(tl.int32)


@triton.jit
def less(left, right):
    """1 where left < right, else 0."""
    return (left < right).to(tl.int32)


@triton.jit
def wide(value):
    """An index into an array of more than 2 GiB."""
    return value.to(tl.int64)


@triton.jit
def zeros(first, second):
    """Return f32 zeros of the shape that two indices broadcast to."""
    return (first + second).to(tl.float32) * 0.0


@triton.jit
def lowest(start):
    """Return the least start of a range."""
    return tl.min(tl.ravel(start), 0)


@triton.jit
def highest(stop):
    """Return the greatest stop of a range."""
    return tl.max(tl.ravel(stop), 0)


@triton.jit
def within(start, number, stop, value):
    """Return `value` where start <= number < stop, else 0."""
    return tl.where((start <= number) & (number < stop), value, 0.0)
