"""Terms that list the entries of each row: single outliers, groups of neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.layout import BLOCK
from qc.backends.tvm.linear.rendering import StoredArray, VectorRendering, widened
from qc.backends.tvm.linear.skeleton import Signature, accumulator
from qc.backends.tvm.linear.stored import declare_plain, plain_arrays
from qc.backends.tvm.linear.term import STORED_NAMES, Place, Products, TermKernel, held
from qc.backends.tvm.linear.vectors import float_lanes, prefetch, span, splat, sum_of_lanes, typed
from qc.ir.weights.expression import (
    ENTRY,
    LANE,
    ROW,
    Const,
    Expr,
    Load,
    TorchRendering,
    substitute_indices,
)
from qc.ir.weights.structure import Entries

TOGETHER = 8
"""Entries that are added at once: one instruction widens their places, one their values. For a
single row of x each of them has sums of its own. Outliers crowd in some outputs (in a gate
projection of SmolLM2 half of a block's belong to one), and a sum that waits for the one before it
takes about 11 cycles on Zen 3, through memory."""


def as_int32(places: Any, at: Any, lanes: int) -> Any:
    """Load places as int32."""
    loaded = places[span(at, lanes)]
    return loaded if str(places.dtype) == "int32" else T.Cast(typed("int32", lanes), loaded)


def added(parts: Sequence[Any]) -> Any:
    """Add vectors in pairs: few additions wait for one another."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [*(a + b for a, b in pairs), *parts[len(parts) // 2 * 2 :]]
    return parts[0]


@dataclass(frozen=True, eq=False)
class OutliersKernel(TermKernel):
    """Single entries, sorted by block of 16 outputs, then by their number in the row.

    Neighbours in the list belong to different outputs, so that no sum waits for the one before
    it. `places` holds 16 * column + output in the block: 2 bytes where that is enough.
    """

    rule: ClassVar[str] = "outliers"
    place: Place
    entries: Entries
    value: Load

    @property
    def count(self) -> int:
        """How many entries the matrix has."""
        return self.place.specs[self.value.array].shape[0]

    @property
    def work(self) -> float:
        return 8.0 * 8 * self.count / max(1, self.place.outer * self.place.inner)

    @property
    def wide(self) -> bool:
        """Say whether a place takes 4 bytes."""
        return self.place.inner * BLOCK > 1 << 15

    def declare(self, signature: Signature) -> None:
        values = self.place.specs[self.value.array].dtype
        blocks = -(-self.place.outer // BLOCK)
        kind = "int32" if self.wide else "int16"
        for name, dtype, size in (
            ("block_starts", "int32", blocks + 1),
            ("places", kind, self.count),
            ("block_values", STORED_NAMES[values], self.count),
        ):
            self.place.declare(signature, name, dtype, (size,), partial(self.repack, name))

    def repack(self, name: str, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the entries in the order of the blocks."""
        rows = torch.arange(self.place.outer, dtype=torch.int32)
        of_rows = TorchRendering(arrays, {ROW.axis: rows})
        start = of_rows.value(self.entries.start).long()
        counts = of_rows.value(self.entries.stop).long() - start
        row = torch.arange(len(rows)).repeat_interleave(counts)
        number = torch.arange(len(row)) - start[row]
        order = ((row // BLOCK * self.place.inner + number) * BLOCK + row % BLOCK).argsort()
        if name == "block_starts":
            per_block = torch.nn.functional.pad(counts, (0, -len(counts) % BLOCK))
            ends = per_block.view(-1, BLOCK).sum(1).cumsum(0)
            return torch.nn.functional.pad(ends, (1, 0)).int()
        entry = TorchRendering(arrays, {ENTRY.axis: (start[row] + number)[order].int()})
        if name == "places":
            columns = entry.value(self.entries.column).long()
            places = columns * BLOCK + row[order] % BLOCK
            return places.to(torch.int32 if self.wide else torch.int16)
        return held(entry.value(self.value).to(self.place.specs[self.value.array].dtype))

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        inputs.need_values()

    def emit_prefetch(self, start: Any, *arrays: Any) -> None:
        """Ask for the entries of a block of the usual size."""
        blocks = -(-self.place.outer // BLOCK)
        usual = -(-self.count // max(1, blocks))
        first = T.Bind(T.Cast("int64", start))
        for array in arrays:
            size = 4 if str(array.dtype) in ("int32", "float32") else 2
            for at in range(0, usual + 64 // size, 64 // size):
                prefetch(T.address_of(array[first + at]))

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        vector = float_lanes(self.place.target)
        starts = self.place.buffer(signature, "block_starts")
        places = self.place.buffer(signature, "places")
        dtype = self.place.specs[self.value.array].dtype
        values = StoredArray(self.place.buffer(signature, "block_values"), dtype, (self.count,))
        if not many:
            self.emit_prefetch(starts[block], places, values.buffer)

        def add(row: Any, height: int, sums: Any) -> None:
            copies = TOGETHER if height == 1 else 1
            found = T.alloc_buffer((copies * height * BLOCK,), "float32", layout=None)
            for at in range(0, copies * height * BLOCK, vector):
                T.buffer_store(found, splat(T.float32(0), vector), [span(at, vector)])
            start = T.Bind(T.Cast("int64", starts[block]))
            stop = T.Bind(T.Cast("int64", starts[block + 1]))

            def add_entry(place: Any, value: Any, copy: int) -> None:
                column = T.Bind(T.Cast("int64", T.shift_right(place, T.int32(4))))
                lane = T.Bind(T.Cast("int64", T.bitwise_and(place, T.int32(BLOCK - 1))))
                for r in range(height):
                    at = T.Bind(lane + (copy * height + r) * BLOCK)
                    T.buffer_store(found, found[at] + value * inputs.values[row + r, column], [at])

            whole = T.Bind(T.floordiv(stop - start, T.int64(TOGETHER)))
            with T.serial(T.int64(0), whole) as number:
                at = T.Bind(start + number * TOGETHER)
                several = T.alloc_buffer((TOGETHER,), "int32", layout=None)
                weights = T.alloc_buffer((TOGETHER,), "float32", layout=None)
                here = span(0, TOGETHER)
                T.buffer_store(several, as_int32(places, at, TOGETHER), [here])
                stored = values.buffer[span(at, TOGETHER)]
                T.buffer_store(weights, widened(values, stored, self.place.target), [here])
                for each in range(TOGETHER):
                    add_entry(T.Bind(several[each]), T.Bind(weights[each]), each % copies)
            with T.serial(start + whole * TOGETHER, stop) as entry:
                stored = values.buffer[entry]
                value = T.Bind(widened(values, stored, self.place.target))
                add_entry(T.Bind(as_int32(places, entry, 1)), value, 0)
            for r in range(height):
                for first in range(0, BLOCK, vector):
                    at = span(first, vector)
                    rows = range(r, copies * height, height)
                    parts = [found[span(copy * BLOCK + first, vector)] for copy in rows]
                    T.buffer_store(sums[r], sums[r][at] + added(parts), [at])

        return add


@dataclass(frozen=True, eq=False)
class EntriesKernel(TermKernel):
    """Go over the entries of each row."""

    rule: ClassVar[str] = "entries"
    place: Place
    entries: Entries

    @property
    def work(self) -> float:
        stored = sum(spec.bytes for spec in self.place.specs.values())
        return 4.0 * stored / max(1, self.place.outer * self.place.inner)

    @property
    def expressions(self) -> tuple[Expr, ...]:
        found = self.entries
        return found.start, found.stop, found.column, found.value

    def declare(self, signature: Signature) -> None:
        declare_plain(signature, self.place, *self.expressions)

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        inputs.need_values()

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        arrays = plain_arrays(signature, self.place, *self.expressions)
        vector = float_lanes(self.place.target)
        lanes = vector if self.entries.width % vector == 0 else 1
        outer = self.place.outer

        def add(row: Any, height: int, sums: Any) -> None:
            found = T.alloc_buffer((height * BLOCK,), "float32", layout=None)
            for at in range(0, height * BLOCK, vector):
                T.buffer_store(found, splat(T.float32(0), vector), [span(at, vector)])
            count = T.int64(BLOCK)
            if outer % BLOCK:
                count = T.min(count, T.int64(outer) - block * BLOCK)
            with T.serial(T.int64(0), count) as number:
                place = T.Bind(block * BLOCK + number)
                totals = self.add_entries(arrays, inputs.values, place, row, height, lanes)
                for r in range(height):
                    T.buffer_store(found, totals[r], [r * BLOCK + number])
            for r in range(height):
                for first in range(0, BLOCK, vector):
                    at = span(first, vector)
                    value = sums[r][at] + found[span(r * BLOCK + first, vector)]
                    T.buffer_store(sums[r], value, [at])

        return add

    def add_entries(
        self, arrays: Mapping[str, StoredArray], x: Any, place: Any, row: Any, height: int,
        lanes: int,
    ) -> list[Any]:  # fmt: skip
        """Multiply the entries of one output by `height` rows of x; return the sums."""
        target, width = self.place.target, self.entries.width
        totals = accumulator(lanes, size=lanes * height)
        single = VectorRendering(arrays, {ROW: place}, 1, target)
        start = T.Bind(single.scalar_index(self.entries.start))
        stop = T.Bind(single.scalar_index(self.entries.stop))
        with T.serial(T.int64(0), stop - start) as number:
            entry = T.Bind(start + number)
            at_entry = single.within({ENTRY: entry})
            column = T.Bind(at_entry.scalar_index(self.entries.column))
            vectors = VectorRendering(arrays, {ROW: place, ENTRY: entry}, lanes, target)
            for first in range(0, width, lanes):
                lane: Expr = LANE + first if lanes > 1 else Const(first)
                value = T.Bind(vectors.vector(substitute_indices(self.entries.value, {LANE: lane})))
                for r in range(height):
                    at = span(r * lanes, lanes)
                    product = value * x[row + r, span(column + first, lanes)]
                    T.buffer_store(totals, totals[at] + product, [at])
        if lanes == 1:
            return [totals[r] for r in range(height)]
        return [T.Bind(sum_of_lanes(totals[span(r * lanes, lanes)])) for r in range(height)]


def entries_term(place: Place) -> TermKernel | None:
    """Multiply by entries that are listed row by row."""
    entries = place.format.structure(place.shape)
    if not isinstance(entries, Entries):
        return None
    match entries.value:
        case Load(_, (index,)) if index == ENTRY and entries.width == 1:
            return OutliersKernel(place, entries, entries.value)
    return EntriesKernel(place, entries)
