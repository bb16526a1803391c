"""Products of several rows with a block of outputs that has been decoded to float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.layout import BLOCK
from qc.backends.tvm.linear.vectors import span, splat

ReadWeight = Callable[[Any, int], Any]
"""(input, first of `lanes` outputs of the block) -> float32 vector."""

FLOAT_TILES = {16: 3, 32: 6, 64: 12}
"""Rows of x in a tile, by bytes of a vector: 12 accumulators of 16 (or 32) registers."""


def new_panel(inner: int) -> Any:
    """Allocate float32[inner, 16]."""
    return T.alloc_buffer((inner * BLOCK,), "float32", layout=None)


def clear_outputs(panel: Any, inner: int, first: Any) -> None:
    """Emit zeros for the outputs from `first` on, which a block at the end of a matrix lacks."""
    with (
        T.serial(first, T.int64(BLOCK)) as number,
        T.serial(T.int64(0), T.int64(inner)) as column,
    ):
        T.buffer_store(panel, T.float32(0), [column * BLOCK + number])


def reader_of(panel: Any, lanes: int) -> ReadWeight:
    """Return how to read a panel."""
    return lambda inner, first: panel[span(inner * BLOCK + first, lanes)]


def add_tile(
    values: Any, inner: int, read: ReadWeight, lanes: int, row: Any, height: int, sums: Any
) -> None:
    """Emit sums[r] += values[row + r] times the block, for `height` rows."""
    with T.serial(T.int64(0), T.int64(inner)) as at:
        weights = [T.Bind(read(at, first)) for first in range(0, BLOCK, lanes)]
        for r in range(height):
            value = T.Bind(splat(values[row + r, at], lanes))
            for number, weight in enumerate(weights):
                where = span(number * lanes, lanes)
                T.buffer_store(sums[r], sums[r][where] + weight * value, [where])
