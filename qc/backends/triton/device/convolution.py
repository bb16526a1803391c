"""Convolutions as products of matrices that are never written: tiles of [PLACES, OUTPUTS], a place
being a pixel of an image of the batch; the elements under a filter are read where they lie."""

import triton
import triton.language as tl


@triton.jit
def places(PLACES: tl.constexpr):
    """The numbers of this program's places among batch * height * width of the result."""
    return tl.program_id(0) * PLACES + tl.arange(0, PLACES)[:, None]


@triton.jit
def outputs(OUTPUTS: tl.constexpr):
    """This program's output channels within its group."""
    return tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]


@triton.jit
def first_output(SIZE: tl.constexpr):
    """The first output channel of this program's group."""
    return tl.program_id(2) * SIZE


@triton.jit
def products(
    x, weight, place, output, count, first,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FILTER_ROWS: tl.constexpr, FILTER_COLUMNS: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, GROUPS: tl.constexpr, STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """sum over c, i, j of x[n, c, STRIDE_Y y - PAD_Y + DILATION_Y i, ...] weight[o, c, i, j], in
    DTYPE with float32 sums: x [batch, CHANNELS GROUPS, HEIGHT, WIDTH], result [.., ROWS, COLUMNS]
    for `count` places, weight [OUTPUTS GROUPS, CHANNELS, FILTER_ROWS, FILTER_COLUMNS]."""
    WINDOW: tl.constexpr = FILTER_ROWS * FILTER_COLUMNS
    DEPTH: tl.constexpr = CHANNELS * WINDOW
    inside = place < count
    image = place // (ROWS * COLUMNS)
    top = (place // COLUMNS) % ROWS * STRIDE_Y - PAD_Y
    left = place % COLUMNS * STRIDE_X - PAD_X
    start = (image * GROUPS + tl.program_id(2)).to(tl.int64) * (CHANNELS * HEIGHT * WIDTH)
    total = tl.zeros((place.shape[0], output.shape[1]), tl.float32)
    for block in range(0, DEPTH, STEP):
        across = block + tl.arange(0, STEP)[None, :]
        y = top + across % WINDOW // FILTER_COLUMNS * DILATION_Y
        z = left + across % FILTER_COLUMNS * DILATION_X
        exists = (y >= 0) & (y < HEIGHT) & (z >= 0) & (z < WIDTH) & inside & (across < DEPTH)
        at = start + (across // WINDOW * HEIGHT + y) * WIDTH + z
        pixels = tl.load(x + at, mask=exists, other=0)
        down = block + tl.arange(0, STEP)[:, None]
        filters = tl.load(
            weight + (first + output) * DEPTH + down,
            mask=(down < DEPTH) & (output < OUTPUTS), other=0,
        )  # fmt: skip
        total = tl.dot(pixels.to(DTYPE), filters.to(DTYPE), total)
    return total


@triton.jit
def biased(total, bias, output, first, OUTPUTS: tl.constexpr):
    """Add a number an output channel."""
    found = tl.load(bias + first + output, mask=output < OUTPUTS, other=0)
    return total + found.to(tl.float32)


@triton.jit
def store(
    result, value, place, output, count, first, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write to [batch, OUTPUTS GROUPS, ROWS, COLUMNS]."""
    PIXELS: tl.constexpr = ROWS * COLUMNS
    image = (place // PIXELS).to(tl.int64) * (OUTPUTS * GROUPS)
    at = result + (image + first + output) * PIXELS + place % PIXELS
    inside = (place < count) & (output < OUTPUTS)
    tl.store(at, value.to(result.dtype.element_ty), mask=inside)
