"""Write the products of terms that list the entries of each row."""

from __future__ import annotations

from dataclasses import dataclass

from qc.backends.triton.emit import Emission
from qc.backends.triton.linear.loop import declare
from qc.backends.triton.linear.stages import EntriesOf
from qc.ir.weights.expression import ENTRY, LANE, ROW, Load


@dataclass(frozen=True)
class Tiling:
    """The tile of a launch: outputs x rows, and how it is run."""

    outputs: int
    rows: int
    warps: int
    stages: int
    width: int = 32
    """Channels of a step of the loop, at least."""


MOST_ELEMENTS = 8192
"""Products [outputs, entries, rows] that a program holds at a time: 64 a thread."""
NARROW = 16
"""Outputs of a tile of a launch for entries alone: the rows of a matrix have different numbers of
entries, and a tile takes as long as its longest."""


def together(outputs: int, rows: int) -> int:
    """Return how many single entries of a row are added at once."""
    return max(1, min(128, MOST_ELEMENTS // (outputs * rows)))


def width_of(each: EntriesOf) -> int:
    """Return the width of an entry, rounded up to a power of two."""
    return 1 << (each.entries.width - 1).bit_length()


def emit_entries(emission: Emission, each: EntriesOf, acc: str, tile: Tiling) -> None:
    """Write a loop over the entries of each output."""
    place, entries = each.place, each.entries
    x = declare(emission, each.source)
    channels, apart = each.source.channels, tile.rows if each.across else 1
    if each.across:
        emission.line(f"places = inputs.tile_across(0, BM, {channels})")
    else:
        emission.line(f"places = inputs.places(rows, {channels}, 1, 1)")
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
                    f"{values}, {apart}, {many})"
                )
                return
    lane = emission.bind(f"entries.lanes({width_of(each)})")
    column_at, columns = place.function(emission, place.named(entries.column), (ENTRY,))
    value_at, values = place.function(emission, place.named(entries.value), (ENTRY, LANE))
    inside = emission.bind(f"tl.minimum({lane}, {entries.width - 1})")
    total = emission.bind(f"entries.zeros(out, {lane}, places)")
    emission.line(f"for number in range(0, entries.longest({start}, {stop})):")
    emission.depth += 1
    entry = emission.bind(f"entries.numbered({start}, {stop}, number)")
    emission.line(
        f"{total} = entries.group({total}, {x}, places, {start}, {stop}, number, "
        f"{column_at}({entry}{columns}), {value_at}({entry}, {inside}{values}), {lane}, "
        f"{entries.width}, {channels}, {apart})"
    )
    emission.depth -= 1
    emission.line(f"{acc} = entries.reduced({acc}, {total})")


def tiling_of(each: EntriesOf, rows: int) -> Tiling:
    """Return the tile of a launch for entries alone."""
    return Tiling(NARROW, rows, 4, 2)


def rows_of_tile(bucket: int | None) -> int:
    """Return how many rows a launch for entries takes at once; groups of up to 64 channels then
    have 16 x 64 x 16 products a tile."""
    return 16 if bucket is None else min(16, bucket)
