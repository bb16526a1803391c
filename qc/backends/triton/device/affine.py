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
    found = tl.load(factors + (here * (BLOCKS * 8) + block * 8 + at % 32 // 4))
    return tl.reshape(found, [OUT * LANES // 16, 8, 4])


@triton.jit
def of_run(factors):
    """Return what all channels of a run share, to go with its words."""
    return factors[:, :, :, None, None, None]


@triton.jit
def of_halves(first, second):
    """Return what the halves of a run have, to go with its words. Two loads: of one that is twice
    as long Triton gives a thread the wrong halves, and everything goes through shared memory."""
    return tl.join(first, second)[:, :, :, :, None, None]


@triton.jit
def words(factors, LOWER: tl.constexpr):
    """Return the scale, and above it the offset, of outputs g, or g + 8 with LOWER."""
    return (factors >> 32 if LOWER else factors).to(tl.int32)


SCALED = tl.constexpr(
    "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.f16x2 $0, $1, $2, zero; }"
)


@triton.jit
def scaled(codes, factors, LOWER: tl.constexpr, OFFSET: tl.constexpr):
    """Turn unpacked codes of outputs g, or g + 8 with LOWER, into weights, in float16: bfloat16
    would round scales too far (linear/stages.py)."""
    both = words(factors, LOWER)
    scale = both.to(tl.int16).to(tl.float16, bitcast=True)
    if OFFSET:
        offset = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        fused: tl.constexpr = "fma.rn.f16x2 $0, $1, $2, $3;"
        operands = [codes, scale, offset]
        return tl.inline_asm_elementwise(fused, "=r,r,r,r", operands, tl.float16, True, 2)
    return tl.inline_asm_elementwise(SCALED, "=r,r,r", [codes, scale], tl.float16, True, 2)


@triton.jit
def whole(acc, sums, factors, out):
    """Add sums, times the factors of their outputs."""
    return acc + sums * tl.load(factors + out)[:, None]
