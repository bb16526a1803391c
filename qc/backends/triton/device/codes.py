"""Codes of 8 bits, int8 and floats (e4m3), without their scales."""

import triton
import triton.language as tl

from qc.backends.triton.device.constants import ROUND


@triton.jit
def rounded_int8(x):
    """Round to whole numbers, ties to even."""
    return (x + ROUND) - ROUND


@triton.jit
def to_int8(x):
    """Round to int8, ties to even."""
    return rounded_int8(x).to(tl.int8)


@triton.jit
def rounded_e4m3(x):
    """Round to what bytes of e4m3 stand for: |x| is 448 at most."""
    return from_e4m3(to_e4m3(x)).to(tl.float32) * 256.0


@triton.jit
def to_e4m3(x):
    """Round to floats of 8 bits, ties to even, as bytes: |x| is 448 at most.

    A float32 2^-120 times as large has its exponent where that of e4m3 has the same value: what is
    left is to round 20 of its bits away. OCP 8-bit floating point specification, section 5.
    """
    bits = (tl.abs(x) * 7.52316384526264e-37).to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    return (rounded | (x < 0).to(tl.uint32) << 7).to(tl.uint8)


@triton.jit
def plain(codes):
    """Values of a cache that is not quantized."""
    return codes


@triton.jit
def from_int8(codes):
    """What codes stand for, but for their scales."""
    return codes.to(tl.float16)


@triton.jit
def from_e4m3(codes):
    """What bytes of e4m3 stand for, divided by 256: the exponents of float16 are larger by 8."""
    bits = codes.to(tl.int16)
    return (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True)
