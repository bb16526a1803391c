"""Products of floats of 8 bits (e4m3) on tensor cores from sm_89 on. The weights' bytes lie in the
order of int8.py, for `mma.m16n8k32` takes both kinds alike.

Tensor cores of sm_90 add the products of a group with 14 bits or so (DeepSeek-V3 2024, section
3.3.2): sums of groups are added in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(left, x):
    """left x in float32, from zero; both are bytes of e4m3."""
    weights = left.to(tl.float8e4nv, bitcast=True)
    return tl.dot(weights, x.to(tl.float8e4nv, bitcast=True))


@triton.jit
def more(acc, left, x):
    """acc + left x."""
    weights = left.to(tl.float8e4nv, bitcast=True)
    return tl.dot(weights, x.to(tl.float8e4nv, bitcast=True), acc)
