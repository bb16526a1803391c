"""One row of int8 activations times a stream: what is read of a group of weights is read once.

    y = sum over groups of s (sum over units of x_scale (sum of q a)) + m (sum over units of
        x_scale (sum of a))

where a unit is a part of a group whose activations share one scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.int8_dot import Tile
from qc.backends.tvm.linear.layout import BLOCK, STEP
from qc.backends.tvm.linear.vectors import span, splat

UNROLLED_UNITS = 4  # of a group; longer groups go unit by unit


@dataclass(frozen=True)
class RowTile(Tile):
    """The products of a single row with one block of a weight."""

    @property
    def units(self) -> int:
        """Units of a full group."""
        return self.reader.stream.group // self.unit

    @property
    def vectors(self) -> range:
        """The first outputs of the vectors of a block."""
        return range(0, BLOCK, self.reader.lanes)

    def add(self, sums: Any) -> None:
        """Add the products of the whole row to a block of sums."""
        units = self.reader.stream.inner // self.unit
        if not 1 < self.units <= UNROLLED_UNITS:
            with T.serial(T.int64(0), T.int64(units)) as unit:
                self.emit_unit(unit, [sums], [(first, first) for first in self.vectors])
            return
        with T.serial(T.int64(0), T.int64(units // self.units)) as group:
            self.emit_group(group, sums, self.units)
        if units % self.units:
            self.emit_group(T.int64(units // self.units), sums, units % self.units)

    def emit_group(self, group: Any, sums: Any, units: int) -> None:
        """Add the products of the first `units` units of a group."""
        stream, lanes = self.reader.stream, self.reader.lanes
        head = T.Bind(self.reader.head(group))
        first_unit = T.Bind(group * self.units)
        exact: dict[int, Any] = {}
        totals: list[Any] = []
        for number in range(units):
            skipped = number * (self.unit // STEP) * stream.step_bytes
            codes = T.Bind(head + (stream.head_bytes + skipped))
            first_input = T.Bind((first_unit + number) * self.unit)
            self.emit_prefetch(codes)
            scale = self.read(self.inputs.scale, 0, self.group_of(first_input))
            totals.append(self.total(0, first_unit + number, first_input, scale))
            for first in self.vectors:
                integers = T.Cast(
                    f"float32x{lanes}", self.emit_integers(codes, first_input, first)[0]
                )
                product = integers * splat(scale, lanes)
                exact[first] = T.Bind(exact[first] + product if number else product)
        total = T.Bind(sum(totals[1:], totals[0]))
        for first in self.vectors:
            at, scale = span(first, lanes), self.reader.scale(head, first)
            minimum = self.reader.minimum(head, first, scale)
            value = sums[at] + scale * exact[first] + minimum * splat(total, lanes)
            T.buffer_store(sums, value, [at])
