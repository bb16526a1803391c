"""Rotations of blocks of 2^k ORDER channels: tiles [LINES, PADDED] with ORDER columns of values."""

import triton
import triton.language as tl


@triton.jit
def block():
    """The number of this program's block among those of all rows."""
    return tl.program_id(0)


@triton.jit
def load(x, block, LINES: tl.constexpr, ORDER: tl.constexpr, PADDED: tl.constexpr):
    line = tl.arange(0, LINES)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    at = x + block.to(tl.int64) * (LINES * ORDER) + line * ORDER + column
    return tl.load(at, mask=column < ORDER, other=0).to(tl.float32)


@triton.jit
def mix(tile, factor, ORDER: tl.constexpr, PADDED: tl.constexpr):
    """Multiply every line by the factor [ORDER, ORDER], in float32."""
    row = tl.arange(0, PADDED)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    inside = (row < ORDER) & (column < ORDER)
    entries = tl.load(factor + row * ORDER + column, mask=inside, other=0).to(tl.float32)
    return tl.dot(tile, entries, input_precision="ieee")


@triton.jit
def scale(tile, factor):
    """Multiply by a factor of order 1."""
    return tile * tl.load(factor).to(tl.float32)


@triton.jit
def butterfly(tile, LINES: tl.constexpr, PADDED: tl.constexpr, APART: tl.constexpr):
    """Sums and differences of elements APART."""
    pairs = tl.reshape(tile, (LINES * PADDED // (2 * APART), 2, APART))
    low, high = tl.split(tl.permute(pairs, (0, 2, 1)))
    mixed = tl.permute(tl.join(low + high, low - high), (0, 2, 1))
    return tl.reshape(mixed, (LINES, PADDED))


@triton.jit
def butterflies(tile, LINES: tl.constexpr, ROUNDS: tl.constexpr, PADDED: tl.constexpr):
    """Sums and differences of lines 1, 2, 4, ... apart. Sylvester 1867."""
    for turn in tl.static_range(ROUNDS):
        tile = butterfly(tile, LINES, PADDED, (1 << turn) * PADDED)
    return tile


@triton.jit
def store(
    result, block, tile, NORM: tl.constexpr,
    LINES: tl.constexpr, ORDER: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    line = tl.arange(0, LINES)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    at = result + block.to(tl.int64) * (LINES * ORDER) + line * ORDER + column
    tl.store(at, (tile * NORM).to(result.dtype.element_ty), mask=column < ORDER)
