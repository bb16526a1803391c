"""Write the products of terms that list the entries of each row."""

from __future__ import annotations

from typing import Protocol, TypeVar

from qc.backends.triton.emit import Emission
from qc.backends.triton.linear.loop import declare
from qc.backends.triton.linear.stages import EntriesOf
from qc.ir.weights.expression import ENTRY, LANE, ROW, Load


class Tile(Protocol):
    """What is asked of a tiling."""

    @property
    def outputs(self) -> int: ...
    @property
    def rows(self) -> int: ...


MOST_ELEMENTS = 4096
"""Products [outputs, entries, rows] that a program holds at a time: 32 a thread."""


def together(outputs: int, rows: int) -> int:
    """Return how many single entries of a row are added at once."""
    return max(1, min(32, MOST_ELEMENTS // (outputs * rows)))


def width_of(each: EntriesOf) -> int:
    """Return the width of an entry, rounded up to a power of two."""
    return 1 << (each.entries.width - 1).bit_length()


def emit_entries(emission: Emission, each: EntriesOf, acc: str, tile: Tile) -> None:
    """Write a loop over the entries of each output."""
    place, entries = each.place, each.entries
    x = declare(emission, each.source)
    emission.line(f"places = inputs.places(rows, {each.source.channels}, 1, 1)")
    start, stop = (
        emission.bind("{}(out{})".format(*place.function(emission, place.named(found), (ROW,))))
        for found in (entries.start, entries.stop)
    )
    match entries.value, entries.column:
        case Load(value, (at,)), Load(column, (also,)) if at == also == ENTRY:
            if entries.width == 1:
                columns, values = place.stored(emission, column), place.stored(emission, value)
                many = together(tile.outputs, tile.rows)
                emission.line(
                    f"{acc} = entries.outliers({acc}, {x}, places, {start}, {stop}, {columns}, "
                    f"{values}, {many})"
                )
                return
    lane = emission.bind(f"entries.lanes({width_of(each)})")
    column_at, columns = place.function(emission, place.named(entries.column), (ENTRY,))
    value_at, values = place.function(emission, place.named(entries.value), (ENTRY, LANE))
    inside = emission.bind(f"tl.minimum({lane}, {entries.width - 1})")
    emission.line(f"for number in range(0, entries.longest({start}, {stop})):")
    emission.depth += 1
    entry = emission.bind(f"entries.numbered({start}, {stop}, number)")
    emission.line(
        f"{acc} = entries.group({acc}, {x}, places, {start}, {stop}, number, "
        f"{column_at}({entry}{columns}), {value_at}({entry}, {inside}{values}), {lane}, "
        f"{entries.width}, {each.source.channels})"
    )
    emission.depth -= 1


T = TypeVar("T")


def most_rows(tiling: T, each: EntriesOf) -> T:
    """Return a tiling whose tiles leave room for the products of groups."""
    from dataclasses import replace

    if each.entries.width == 1:
        return tiling
    outputs = 32
    rows = max(1, MOST_ELEMENTS // (outputs * width_of(each)))
    return replace(tiling, outputs=outputs, rows=min(rows, tiling.rows))  # type: ignore[type-var]
