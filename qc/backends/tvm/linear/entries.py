"""Terms that list the entries of each row: single outliers, groups of neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.layout import BLOCK
from qc.backends.tvm.linear.rendering import StoredArray, VectorRendering, widened
from qc.backends.tvm.linear.skeleton import Signature, accumulator
from qc.backends.tvm.linear.stored import declare_plain, plain_arrays
from qc.backends.tvm.linear.term import STORED_NAMES, Place, Products, TermKernel
from qc.backends.tvm.linear.vectors import (
    added,
    float_lanes,
    prefetch,
    span,
    splat,
    sum_of_lanes,
    typed,
)
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


@dataclass(frozen=True, eq=False)
class OutliersKernel(TermKernel):
    """Single entries, sorted by block of 16 outputs, then by their number in the row.

    Neighbours in the list belong to different outputs, so that sums seldom wait for the one before.
    Records of 8 entries hold 8 places, 16 * column + output in the block, in 2 bytes where that is
    enough, then 8 values; a block's last record is filled up with zeros.
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
        return 8.0 * 6 * self.count / max(1, self.place.outer * self.place.inner)

    @property
    def blocks(self) -> int:
        return -(-self.place.outer // BLOCK)

    @property
    def records(self) -> int:
        """How many records the entries take at most."""
        return (self.count + (TOGETHER - 1) * min(self.blocks, self.count)) // TOGETHER

    @property
    def dtype(self) -> torch.dtype:
        """How values are stored."""
        return self.place.specs[self.value.array].dtype

    @property
    def place_bytes(self) -> int:
        """Bytes of a place."""
        return 4 if self.place.inner * BLOCK > 1 << 16 else 2

    @property
    def record_bytes(self) -> int:
        return TOGETHER * (self.place_bytes + self.dtype.itemsize)

    def declare(self, signature: Signature) -> None:
        starts, records = (self.blocks + 1,), (self.records, self.record_bytes)
        self.place.declare(signature, "block_starts", "int32", starts, self.starts)
        self.place.declare(signature, "records", "uint8", records, self.packed)

    def counts(self, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return where each row's entries start, and how many there are."""
        rows = torch.arange(self.place.outer, dtype=torch.int32)
        of_rows = TorchRendering(arrays, {ROW.axis: rows})
        start = of_rows.value(self.entries.start).long()
        return start, of_rows.value(self.entries.stop).long() - start

    def starts(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the number of each block's first record."""
        counts = self.counts(arrays)[1]
        per_block = (
            torch.nn.functional.pad(counts, (0, -len(counts) % BLOCK)).view(-1, BLOCK).sum(1)
        )
        ends = (-(-per_block // TOGETHER)).cumsum(0)
        return torch.nn.functional.pad(ends, (1, 0)).int()

    def packed(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the records."""
        start, counts = self.counts(arrays)
        row = torch.arange(len(counts)).repeat_interleave(counts)
        first = counts.cumsum(0) - counts
        number = torch.arange(len(row)) - first[row]
        order = ((row // BLOCK * self.place.inner + number) * BLOCK + row % BLOCK).argsort()
        block = row[order] // BLOCK
        before = torch.nn.functional.pad(
            torch.bincount(block, minlength=self.blocks).cumsum(0), (1, 0)
        )
        at = torch.arange(len(row)) - before[block] + TOGETHER * self.starts(arrays).long()[block]
        entry = TorchRendering(arrays, {ENTRY.axis: (start[row] + number)[order].int()})
        places = entry.value(self.entries.column).long() * BLOCK + row[order] % BLOCK
        kind = torch.int32 if self.place_bytes == 4 else torch.uint16
        parts = []
        for found, dtype in ((places, kind), (entry.value(self.value), self.dtype)):
            padded = torch.zeros(self.records * TOGETHER, dtype=found.dtype)
            padded[at] = found
            parts.append(padded.to(dtype).view(-1, TOGETHER).view(torch.uint8))
        return torch.cat(parts, 1)

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        inputs.need_values()

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        vector = float_lanes(self.place.target)
        starts = self.place.buffer(signature, "block_starts")
        records = self.place.buffer(signature, "records")
        start = T.Bind(T.Cast("int64", starts[block]))
        stop = T.Bind(T.Cast("int64", starts[block + 1]))
        if not many:
            self.emit_prefetch(records, start)

        def add(row: Any, height: int, sums: Any) -> None:
            copies = TOGETHER if height == 1 else 1
            found = T.alloc_buffer((copies * height * BLOCK,), "float32", layout=None)
            for at in range(0, copies * height * BLOCK, vector):
                T.buffer_store(found, splat(T.float32(0), vector), [span(at, vector)])

            with T.serial(start, stop) as record:
                weights = T.alloc_buffer((TOGETHER,), "float32", layout=None)
                T.buffer_store(weights, self.values(records, record), [span(0, TOGETHER)])
                for each in range(TOGETHER):
                    place = T.Bind(self.place_at(records, record, each))
                    column = T.Bind(T.shift_right(place, T.int64(4)))
                    lane = T.Bind(T.bitwise_and(place, T.int64(BLOCK - 1)))
                    weight = T.Bind(weights[each])
                    for r in range(height):
                        at = T.Bind(lane + (each % copies * height + r) * BLOCK)
                        total = found[at] + weight * inputs.values[row + r, column]
                        T.buffer_store(found, total, [at])
            for r in range(height):
                for first in range(0, BLOCK, vector):
                    at = span(first, vector)
                    rows = range(r, copies * height, height)
                    parts = [found[span(copy * BLOCK + first, vector)] for copy in rows]
                    T.buffer_store(sums[r], sums[r][at] + added(parts), [at])

        return add

    def emit_prefetch(self, records: Any, start: Any) -> None:
        """Ask for the records of a block of the usual size."""
        usual = -(-self.records // max(1, self.blocks)) * self.record_bytes
        for line in range(0, usual, 64):
            at = start + line // self.record_bytes
            prefetch(T.address_of(records[at, T.int64(line % self.record_bytes)]))

    def place_at(self, records: Any, record: Any, each: int) -> Any:
        """Load one place of a record."""
        size = self.place_bytes
        stored = records[record, span(size * each, size)]
        return T.Cast("int64", T.reinterpret(f"uint{8 * size}", stored))

    def values(self, records: Any, record: Any) -> Any:
        """Load the values of a record as float32."""
        bytes = TOGETHER * self.dtype.itemsize
        stored = records[record, span(TOGETHER * self.place_bytes, bytes)]
        array = StoredArray(records, self.dtype, ())
        kind = typed(STORED_NAMES[self.dtype], TOGETHER)
        return widened(array, T.reinterpret(kind, stored), self.place.target)


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
