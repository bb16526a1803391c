"""Two-dimensional convolutions of plain values, of any stride, padding, dilation and groups.

A program computes a tile of places and output channels of one group: a matrix product whose left
side is read from the image as it is needed.
"""

from __future__ import annotations

from qc.backends.region import Region, Repack
from qc.backends.triton.glue import NAMES, Glue, Text, power_of_two
from qc.backends.triton.kernel import Call, Cells, KernelRule, Variant
from qc.backends.triton.storage import declare_input, declare_result, half_dtype, is_cache
from qc.ir import ops
from qc.ir.types import element_count

PLACES, OUTPUTS, STEP = 64, 64, 32
"""A tile, and how deep a step is: the accumulators of 128 threads take 32 registers each."""
LEAST = 16
"""Of each side of what the matrix units multiply."""


def convolution(region: Region) -> Call | None:
    """A convolution, with or without a bias."""
    root = region.root
    inner = [n for n in region.body.nodes if not isinstance(n.op, ops.Input)]
    if not isinstance(root.op, ops.Conv2d) or inner != [root]:
        return None
    if any(is_cache(operand) or operand.tensor.format for operand in region.operands):
        return None
    glue, op, repack = Glue("convolution"), root.op, dict[tuple[int, str], Repack]()
    pointers = {n: declare_input(glue, region, n, repack) for n in region.body.inputs}
    image, filters, *bias = root.inputs
    outputs, channels, *window = (int(d) for d in filters.tensor.shape)
    size, pixels = outputs // op.groups, root.tensor.shape[2:]
    count = element_count((root.tensor.shape[0], *pixels))
    tile = min(OUTPUTS, max(LEAST, power_of_two(size)))
    depth = channels * window[0] * window[1]
    place, output = (
        glue.call("convolution.places", PLACES),
        glue.call("convolution.outputs", tile),
    )
    first, places = glue.call("convolution.first_output", size), glue.size(count)
    value = glue.call(
        "convolution.products", pointers[image], pointers[filters], place, output, places, first,
        channels, *map(int, image.tensor.shape[2:]), size, *map(int, pixels), *window,
        *op.stride, *op.padding, *op.dilation, op.groups,
        min(STEP, max(LEAST, power_of_two(depth))), Text(NAMES[half_dtype(region.target)]),
    )  # fmt: skip
    if bias:
        value = glue.call("convolution.biased", value, pointers[bias[0]], output, first, size)
    result = declare_result(glue, region)
    where = (place, output, places, first, size, op.groups, *map(int, pixels))
    glue.do("convolution.store", result, value, *where)
    launch = glue.launch((Cells(count, PLACES), Cells(size, tile), Cells(op.groups)))
    return Call(count, (Variant(None, (launch,)),), repack)


convolution_rules: tuple[KernelRule, ...] = (convolution,)
