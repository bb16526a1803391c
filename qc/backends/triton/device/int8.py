"""Codes of 4 and 8 bits times int8 activations, on the integer units of tensor cores.

As in fragments.py, codes are stored in blocks of 16 outputs, 16 bytes a thread of a warp (g, t).
Byte (r, h, i) belongs to output g + 8 r and channel 16 h + 4 t + i of a run of 32: the A operand of
`mma.m16n8k32`. With 8 bits it is q - 128, signed; with 4 bits, its low half is of one run and its
high half of the next, and they become 16 (q - 8), which a factor of 1/16 takes back.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(codes, first, start, BLOCKS: tl.constexpr, BITS: tl.constexpr, STEPS: tl.constexpr,
         OUT: tl.constexpr):  # fmt: skip
    """Load the bytes of OUT outputs, from block `first` of BLOCKS on, at channel `start`.

    STEPS: the blocks along the channels, 256 / BITS each.
    """
    at = tl.arange(0, OUT * 32)
    block = first + at // 512
    if BLOCKS * 16 % OUT != 0:
        block = tl.minimum(block, BLOCKS - 1)
    step = start // (256 // BITS)
    bytes = tl.load(codes + (block * (STEPS * 512) + at % 512) + step * 512)
    return tl.reshape(bytes, [OUT // 16, 8, 4, 2, 2, 4])


@triton.jit
def unpack(bytes):
    """Return 16 (q - 8) of both halves of bytes, as int8."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 moved; shl.b32 moved, $2, 4; "
        "lop3.b32 $0, moved, 0xf0f0f0f0, 0x80808080, 0x6a; "
        "lop3.b32 $1, $2, 0xf0f0f0f0, 0x80808080, 0x6a; }",
        "=r,=r,r", [bytes], (tl.int8, tl.int8), True, 4,
    )  # fmt: skip


@triton.jit
def left(codes, OUT: tl.constexpr):
    """Turn the bytes of a run of 32 channels into a left operand [OUT, 32]."""
    return tl.reshape(tl.permute(codes, (0, 3, 1, 4, 2, 5)), [OUT, 32])


@triton.jit
def left64(first, second, OUT: tl.constexpr):
    """Turn the bytes of two runs into a left operand [OUT, 64]."""
    both = tl.join(first, second)  # [block, g, t, r, h, i, run]
    return tl.reshape(tl.permute(both, (0, 3, 1, 6, 4, 2, 5)), [OUT, 64])


@triton.jit
def ones(OUT: tl.constexpr, WIDTH: tl.constexpr):
    """Return a left operand that adds up the channels of a tile."""
    return tl.full([OUT, WIDTH], 1, tl.int8)


@triton.jit
def product(left, x):
    """left x in int32, from zero."""
    return tl.dot(left, x, out_dtype=tl.int32)


@triton.jit
def more(acc, left, x):
    """acc + left x in int32."""
    return tl.dot(left, x, acc, out_dtype=tl.int32)


@triton.jit
def row_scales(scale, rows, group, GROUPS: tl.constexpr):
    """Load the scale of a group of every row, f32[rows]."""
    return tl.load(scale + rows * GROUPS + group)


@triton.jit
def scaled(product, scale, UNIT: tl.constexpr):
    """Return what a product in int32 means, but for the weights' factor."""
    return product.to(tl.float32) * (scale * UNIT)[None, :]
