"""What a term multiplies: rows of float32 values, or of int8 codes with their scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.vectors import float_lanes, span, splat
from qc.ir.target import Target
from qc.ir.types import ActivationFormat

PARALLEL_ROWS = 16
"""From so many rows on, what prepares them is spread over the threads."""


@dataclass
class Inputs:
    """Rows of `inner` inputs. `values` is float32[rows, inner]; quantized inputs come as `codes`
    int8[rows, inner], `scale` and `total` float32[rows, groups], and have values only after
    `need_values`."""

    rows: Any
    inner: int
    target: Target
    values: Any = None
    format: ActivationFormat | None = None
    codes: Any = None
    scale: Any = None
    total: Any = None

    def need_values(self) -> None:
        """Emit the dequantization of all rows, once."""
        if self.values is not None:
            return
        assert self.format is not None
        self.values = T.alloc_buffer((self.rows, T.int64(self.inner)), "float32", layout=None)
        group = min(self.format.group or self.inner, self.inner)
        lanes = float_lanes(self.target)

        def dequantize(row: Any) -> None:
            for start in range(0, self.inner, group):
                size = min(group, self.inner - start)
                scale = T.Bind(self.scale[row, T.int64(start // group)])
                with T.serial(T.int64(0), T.int64(size // lanes)) as step:
                    self.dequantize(row, start + step * lanes, lanes, scale)
                for rest in range(size - size % lanes, size):
                    self.dequantize(row, T.int64(start + rest), 1, scale)

        def dequantize_even(row: Any) -> None:
            with T.serial(T.int64(0), T.int64(self.inner // group)) as number:
                scale = T.Bind(self.scale[row, number])
                for at in range(0, group, lanes):
                    self.dequantize(row, number * group + at, lanes, scale)

        even = self.inner % group == 0 and group % lanes == 0 and group <= 8 * lanes
        for_each_row(self.rows, dequantize_even if even else dequantize)

    def dequantize(self, row: Any, at: Any, lanes: int, scale: Any) -> None:
        """Emit values = codes * scale for `lanes` inputs."""
        kind = "float32" if lanes == 1 else f"float32x{lanes}"
        value = T.Cast(kind, self.codes[row, span(at, lanes)]) * splat(scale, lanes)
        T.buffer_store(self.values, value, [row, span(at, lanes)])


def for_each_row(rows: Any, emit: Callable[[Any], None]) -> None:
    """Emit `emit(row)` for all rows, on all threads where there are many."""
    with T.If(rows >= PARALLEL_ROWS):
        with T.Then(), T.parallel(T.int64(0), rows) as row:
            emit(row)
        with T.Else(), T.serial(T.int64(0), rows) as row:
            emit(row)
