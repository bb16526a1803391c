"""Lanes as a batch of products, a warp each: acc[lane, output, row].

Tensor cores that a group of warps shares take x behind a fence, which waits for everything that a
thread has asked for: nothing could be on its way meanwhile. Products of a batch are each warp's own
(`mma.sync`). See device/lanes.py for what a lane is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qc.backends.triton.device import entries
from qc.backends.triton.device.fragments import conversion

FOURS = tl.constexpr(triton.__version__.startswith(("3.6.", "3.7.")))
"""These Triton versions let a thread hold four neighbouring channels of an operand that was put
together from pieces, later ones two: channels are renamed so that codes stay where they are."""


@triton.constexpr_function
def conversion_of_pairs(zero):
    """Return PTX that turns two words of codes q into four pairs of float16 q - zero, apart."""
    inside = conversion(4, 1, zero)[2:-2]
    for number in range(4):
        inside = inside.replace(f"${number}", f"pair{number}")
    lines = [".reg .b32 pair0, pair1, pair2, pair3;", inside.replace("$4", "$8")]
    for number in range(4):
        lines.append("mov.b32 {" + f"${2 * number}, ${2 * number + 1}" + "}, " + f"pair{number};")
    return "{ " + " ".join(lines) + " }"


@triton.jit
def unpack(pairs, ZERO: tl.constexpr):
    """Return the codes of pairs of words as float16 q - ZERO: four times that of the first word and
    of the second."""
    ASM: tl.constexpr = conversion_of_pairs(ZERO)
    return tl.inline_asm_elementwise(
        ASM, "=h,=h,=h,=h,=h,=h,=h,=h,r", [pairs],
        (tl.float16, tl.float16, tl.float16, tl.float16,
         tl.float16, tl.float16, tl.float16, tl.float16), True, 1,
    )  # fmt: skip


@triton.jit
def left(codes, LANES: tl.constexpr, OUT: tl.constexpr):
    """Turn unpacked pairs of two runs of 32 channels into left operands [LANES, OUT, 64]."""
    first = tl.join(tl.join(codes[0], codes[2]), tl.join(codes[4], codes[6]))
    second = tl.join(tl.join(codes[1], codes[3]), tl.join(codes[5], codes[7]))
    both = tl.join(first, second)  # [block, g, t, s, h, rows, run, p]
    if FOURS:
        turned = tl.permute(both, (0, 5, 1, 6, 3, 2, 4, 7))
    else:
        turned = tl.permute(both, (0, 5, 1, 6, 3, 4, 2, 7))
    return tl.reshape(turned, [LANES, OUT, 64])


@triton.jit
def tile(x, rows, start, CHANNELS: tl.constexpr, LANES: tl.constexpr):
    """Load 64 channels of every lane, from channel `start` of it on, [LANES, 64, rows]."""
    lane = tl.arange(0, LANES)[:, None, None] * (CHANNELS // LANES)
    channel = start + tl.arange(0, 64)[None, :, None]
    found = tl.load(x + (lane + channel + rows.to(tl.int64)[None, None, :] * CHANNELS))
    if FOURS:
        apart = tl.reshape(found, [LANES, 4, 2, 4, 2, rows.shape[0]])  # lane, s, h, t, p, row
        found = tl.reshape(tl.permute(apart, (0, 1, 3, 2, 4, 5)), [LANES, 64, rows.shape[0]])
    return found


@triton.jit
def groups(number, LANES: tl.constexpr, COUNT: tl.constexpr):
    """Return group `number` of the COUNT of every lane, i32[LANES, 1]."""
    return (tl.arange(0, LANES) * COUNT + number)[:, None]


@triton.jit
def across(out):
    """Return outputs as i32[1, OUT]."""
    return out[None, :]


@triton.jit
def zeros(LANES: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr):
    """Return a cleared accumulator f32[LANES, OUT, ROWS]."""
    return tl.zeros([LANES, OUT, ROWS], tl.float32)


@triton.jit
def scaled(acc, product, factor):
    """acc + factor product, one factor for a lane and an output."""
    return acc + product * factor[:, :, None].to(tl.float32)


@triton.jit
def joined(acc):
    """Add up the lanes: f32[OUT, ROWS]."""
    return tl.sum(acc, 0)


@triton.jit
def turns(first, programs, CELLS: tl.constexpr, WEIGHTS: tl.constexpr):
    """Return how many tiles a program takes, of WEIGHTS weights together: those of outputs `first`,
    `first` + `programs`, ... of the CELLS that there are."""
    return (CELLS - first + programs - 1) // programs * WEIGHTS


@triton.jit
def turn(number, first, programs, CELLS: tl.constexpr, WEIGHTS: tl.constexpr):
    """Return the outputs of the tile of a program's turn, the last ones beyond it; and the weight:
    all weights in turn for the same outputs."""
    cell = tl.minimum(first + number // WEIGHTS * programs, CELLS - 1)
    return cell, number % WEIGHTS


@triton.jit
def gathered(x, start, stop, columns, values, column, value, TOGETHER: tl.constexpr):
    """Return the sums of value x[column] over the entries of each output, f32[OUT]; the first ones
    are loaded."""
    total = value.to(tl.float32) * tl.load(x + column.to(tl.int32)).to(tl.float32)
    for more in range(TOGETHER, tl.max(stop - start, 0), TOGETHER):
        column, value = entries.first(start + more, stop, columns, values, TOGETHER)
        total += value.to(tl.float32) * tl.load(x + column.to(tl.int32)).to(tl.float32)
    return tl.sum(total, 1)


@triton.jit
def outputs(cell, SIZE: tl.constexpr):
    """Return the outputs of a tile, i32[SIZE]."""
    return cell * SIZE + tl.arange(0, SIZE)


@triton.jit
def every(first, programs, SIZE: tl.constexpr, TILES: tl.constexpr, COUNT: tl.constexpr):
    """Return the outputs of up to TILES tiles of a program, i32[SIZE TILES]; beyond COUNT the last
    one again."""
    at = tl.arange(0, SIZE * TILES)
    out = (first + at // SIZE * programs) * SIZE + at % SIZE
    return tl.minimum(out, COUNT - 1)


@triton.jit
def set_every(at, sums, first, programs, SIZE: tl.constexpr, TILES: tl.constexpr,
              COUNT: tl.constexpr):  # fmt: skip
    """Leave sums of the outputs of all tiles of a program."""
    each = tl.arange(0, SIZE * TILES)
    out = (first + each // SIZE * programs) * SIZE + each % SIZE
    tl.store(at + out, sums, mask=out < COUNT)


@triton.jit
def more_every(at, sums, first, programs, SIZE: tl.constexpr, TILES: tl.constexpr,
               COUNT: tl.constexpr):  # fmt: skip
    """Add to the sums of the outputs of all tiles of a program."""
    tl.debug_barrier()  # what it has left can be read by all of its threads
    each = tl.arange(0, SIZE * TILES)
    out = (first + each // SIZE * programs) * SIZE + each % SIZE
    before = tl.load(at + out, mask=out < COUNT, other=0.0)
    tl.store(at + out, before + sums, mask=out < COUNT)


@triton.jit
def kept_here(number):
    """Return a number as one that is not known to be what it is: what is computed from it stays
    where it stands, and takes no registers in a loop around it."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], tl.int32, False, 1)


@triton.jit
def meet():
    """Let all threads of a program read what it has stored."""
    tl.debug_barrier()
