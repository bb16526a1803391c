"""Products of weight tiles [outputs, channels] with tiles of rows [channels, rows].

Weights stand on the left: decoded in registers, that is where tensor cores take them from, and few
rows are the narrow side of the product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def zeros(OUT: tl.constexpr, ROWS: tl.constexpr):
    """Return a cleared accumulator f32[OUT, ROWS]."""
    return tl.zeros([OUT, ROWS], tl.float32)


@triton.jit
def outputs(cell, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """Return the outputs of a tile, i32[SIZE]; beyond COUNT the last one again."""
    out = cell * SIZE + tl.arange(0, SIZE)
    if COUNT % SIZE == 0:
        return out
    return tl.minimum(out, COUNT - 1)


@triton.jit
def columns(start, WIDTH: tl.constexpr, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """Return channels start to start + WIDTH; beyond COUNT the last one again."""
    channel = start + tl.arange(0, WIDTH)
    if EVEN:
        return channel
    return tl.minimum(channel, COUNT - 1)


@triton.jit
def decoded(acc, weights, x):
    """acc + weights x, with float32 weights rounded to the type of x. A single row is multiplied
    where the weights are: tensor cores would have them go through shared memory."""
    rounded = weights.to(x.dtype)
    if x.shape[1] == 1:
        row = tl.reshape(x, [1, x.shape[0]]).to(tl.float32)
        return acc + tl.sum(rounded.to(tl.float32) * row, 1)[:, None]
    return tl.dot(rounded, x, acc)


@triton.jit
def inside(cell, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """Say which outputs of a tile there are, i1[SIZE, 1]."""
    return (cell * SIZE + tl.arange(0, SIZE) < COUNT)[:, None]


@triton.jit
def first_block(cell, SIZE: tl.constexpr):
    """Return the first block of 16 outputs of a tile."""
    return cell * (SIZE // 16)


@triton.jit
def first_channel(cell, SIZE: tl.constexpr):
    """Return the first channel of a tile of a copy."""
    return cell * SIZE


@triton.jit
def partial(at, acc, out, rows, live, cell, part, ROWS, OUT: tl.constexpr, SIZE: tl.constexpr):
    """Store a partial sum of live rows as f32[part, ROWS, OUT]."""
    here = (tl.cast(part, tl.int64) * ROWS + rows[None, :]) * OUT + out[:, None]
    if OUT % SIZE == 0:
        tl.store(at + here, acc, mask=live[None, :])
    else:
        tl.store(at + here, acc, mask=inside(cell, SIZE, OUT) & live[None, :])


@triton.jit
def summed(at, out, rows, ROWS, PARTS: tl.constexpr, OUT: tl.constexpr):
    """Add up partial sums, always in the same order: f32[out, rows]."""
    here = rows[None, :].to(tl.int64) * OUT + out[:, None]
    acc = tl.load(at + here)
    for part in tl.static_range(1, PARTS):
        acc += tl.load(at + here + part * OUT * ROWS)
    return acc


@triton.jit
def full(at, out, rows, OUT: tl.constexpr):
    """Load an operand [rows, OUT] as f32[out, rows]."""
    return tl.load(at + rows[None, :].to(tl.int64) * OUT + out[:, None]).to(tl.float32)


@triton.jit
def vector(at, out):
    """Load an operand [OUT] as f32[out, 1]."""
    return tl.load(at + out).to(tl.float32)[:, None]


@triton.jit
def number(at):
    """Load an operand of one element."""
    return tl.load(at).to(tl.float32)


@triton.jit
def store(y, acc, out, places, live, cell, OUT: tl.constexpr, AFTER: tl.constexpr,
          SIZE: tl.constexpr):  # fmt: skip
    """Store the live rows of a tile of the result."""
    at = y + places[None, :] + (out * AFTER)[:, None]
    value = acc.to(y.dtype.element_ty)
    if OUT % SIZE == 0:
        tl.store(at, value, mask=live[None, :])
    else:
        tl.store(at, value, mask=inside(cell, SIZE, OUT) & live[None, :])
