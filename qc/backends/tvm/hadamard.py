"""Rotations of a row: a small matrix product, then sums and differences at doubling strides.

A block of 2^k m channels lies in a scratch row as [2^k, m]. The factor mixes each line of m as a
matrix product in registers. Then k rounds of butterflies mix the lines, three rounds each time a
vector passes through registers. Where m is 1 the first rounds happen within a vector, while the
row is being written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from qc.backends.tvm.function import Function, integer, pieces, span, store, walk
from qc.backends.tvm.vector_math import bind, convert, spread
from qc.ir import ops
from qc.ir.node import Node

PrimExpr = Any

# Three rounds read and write eight vectors, half of the registers of AVX2.
RADIX = 8
# Lines and vectors of a tile of the product: twelve sums, three vectors of the factor and one value
# fill the registers of AVX2.
LINES, VECTORS = 4, 3


def rotate(
    function: Function, node: Node, term: Callable[[PrimExpr, int], PrimExpr], factor: Any
) -> Any:
    """Write a whole row of `node` into scratch, float32; `term` reads what it rotates."""
    assert isinstance(node.op, ops.Hadamard)
    size, block = int(node.tensor.shape[-1]), node.op.block
    order = int(node.inputs[1].tensor.shape[0])
    lanes = function.lanes
    scale = tirx.const(math.sqrt(order / block), "float32")
    row = T.alloc_buffer((size,), "float32")

    def write(channel: PrimExpr, width: int) -> None:
        value = term(channel, width) * spread(scale, width)
        if order == 1:
            value = mix_lanes(value * spread(convert(factor[integer(0)], "float32"), width),
                              width, min(block, width))  # fmt: skip
        store(row, span(channel, width), value)

    walk(integer(0), size, lanes, write)
    if order == 1:
        stride = min(block, lanes)
    else:
        row, stride = multiply(row, factor, size, order, block // order, lanes), order
    while stride < block:
        radix = min(RADIX, block // stride)
        mix_lines(row, size, stride, radix, lanes)
        stride *= radix
    return row


def mix_lanes(value: PrimExpr, lanes: int, block: int) -> PrimExpr:
    """Butterflies within every `block` lanes of one vector."""
    stride = 1
    while stride < block:
        value = bind(value)
        partner = bind(T.Shuffle([value], [tirx.const(i ^ stride, "int32") for i in range(lanes)]))
        chosen = [tirx.const(i + (lanes if i & stride else 0), "int32") for i in range(lanes)]
        value = T.Shuffle([bind(value + partner), bind(partner - value)], chosen)
        stride *= 2
    return value


def multiply(row: Any, factor: Any, size: int, order: int, lines: int, lanes: int) -> Any:
    """Return row[size / order, order] x factor[order, order] in another scratch row.

    `lines` divides the number of lines, so that tiles of lines fit.
    """
    result = T.alloc_buffer((size,), "float32")
    tile, tiles = min(LINES, lines), size // order // min(LINES, lines)

    def one_tile(first: PrimExpr, columns: list[int], width: int) -> None:
        def place(line: int, number: int) -> PrimExpr:
            return span((line * len(columns) + number) * width, width)

        sums = T.alloc_buffer((tile * len(columns) * width,), "float32")
        each = [(line, number) for line in range(tile) for number in range(len(columns))]
        for line, number in each:
            store(sums, place(line, number), spread(tirx.const(0.0, "float32"), width))
        with T.serial(integer(0), integer(order)) as k:
            starts = [k * integer(order) + integer(column) for column in columns]
            weights = [bind(convert(factor[span(start, width)], "float32")) for start in starts]
            for line, number in each:
                x, at = row[first + integer(line * order) + k], place(line, number)
                store(sums, at, sums[at] + spread(x, width) * weights[number])
        for line, number in each:
            at = span(first + integer(line * order + columns[number]), width)
            store(result, at, sums[place(line, number)])

    with T.serial(integer(0), integer(tiles)) as i:
        first = bind(i * integer(tile * order))
        for columns, width in columns_of(order, lanes):
            one_tile(first, columns, width)
    return result


def columns_of(order: int, lanes: int) -> list[tuple[list[int], int]]:
    """Cover the columns of a factor with groups of vectors, (where each starts, width). The last
    vector computes some columns again, for a narrower one would cost as much."""
    if order < lanes:
        return [([start], width) for start, width in pieces(order, lanes)]
    starts = [min(start, order - lanes) for start in range(0, order, lanes)]
    groups = -(-len(starts) // VECTORS)
    bounds = [len(starts) * i // groups for i in range(groups + 1)]
    return [(starts[a:b], lanes) for a, b in pairwise(bounds)]


def mix_lines(row: Any, size: int, stride: int, radix: int, lanes: int) -> None:
    """log2(radix) rounds of butterflies in place between lines of `stride` channels."""

    def mix(channel: PrimExpr, width: int) -> None:
        places = [span(channel + integer(i * stride), width) for i in range(radix)]
        values = [bind(row[place]) for place in places]
        distance = 1
        while distance < radix:
            for i in range(radix):
                if not i & distance:
                    a, b = values[i], values[i + distance]
                    values[i], values[i + distance] = bind(a + b), bind(a - b)
            distance *= 2
        for place, value in zip(places, values, strict=True):
            store(row, place, value)

    with T.serial(integer(0), integer(size // (radix * stride))) as group:
        walk(bind(group * integer(radix * stride)), stride, lanes, mix)
