"""Codes become weights in registers: scale q + offset of small groups, before they are multiplied.

A product of a group that is scaled afterwards costs two instructions a row of x and group of an
output, and as many again for its offset. Where groups are small, one `fma` for two weights is less.
Results are rounded once, as float16 weights would be.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(factors, first, group, BLOCKS: tl.constexpr, OUT: tl.constexpr, LANES: tl.constexpr,
         GROUPS: tl.constexpr):  # fmt: skip
    """Load scales and offsets of a group of OUT outputs, from block `first` of BLOCKS on; a lane
    has GROUPS. A thread of a warp has those of outputs g and g + 8, as in fragments.py: a number of
    64 bits, for a thread that had two would not have neighbours."""
    at = tl.arange(0, OUT * LANES * 2)
    block = first + at // 32 % (OUT // 16)
    if BLOCKS * 16 % OUT != 0:
        block = tl.minimum(block, BLOCKS - 1)
    here = group + at // (OUT * 2) * GROUPS
    return tl.load(factors + (here * (BLOCKS * 8) + block * 8 + at % 32 // 4))


@triton.jit
def words(factors, LOWER: tl.constexpr):
    """Return the scale, and above it the offset, of outputs g, or g + 8 with LOWER."""
    each = tl.reshape(factors, [factors.shape[0] // 32, 8, 4, 1, 1, 1])
    return (each >> 32 if LOWER else each).to(tl.int32)


@triton.constexpr_function
def fused(type, offset):
    """Return PTX for scale q + offset of a pair, or for scale q."""
    kind = "bf16x2" if type == tl.bfloat16 else "f16x2"
    if offset:
        return f"fma.rn.{kind} $0, $1, $2, $3;"
    return "{ .reg .b32 zero; mov.b32 zero, 0x80008000; " + f"fma.rn.{kind} $0, $1, $2, zero; }}"


@triton.constexpr_function
def one(type):
    """Return the type of the one result."""
    return (type,)


@triton.jit
def scaled(codes, factors, LOWER: tl.constexpr, OFFSET: tl.constexpr, TYPE: tl.constexpr):
    """Turn unpacked codes of outputs g, or g + 8 with LOWER, into weights."""
    both = words(factors, LOWER)
    scale = both.to(tl.int16).to(TYPE, bitcast=True)
    ASM: tl.constexpr = fused(TYPE, OFFSET)
    OUT: tl.constexpr = one(TYPE)
    if OFFSET:
        offset = (both >> 16).to(tl.int16).to(TYPE, bitcast=True)
        return tl.inline_asm_elementwise(ASM, "=r,r,r,r", [codes, scale, offset], OUT, True, 2)[0]
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [codes, scale], OUT, True, 2)[0]
