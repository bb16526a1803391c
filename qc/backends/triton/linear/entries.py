"""Write the products of terms that list the entries of each row."""

from __future__ import annotations

from qc.backends.triton.emit import Emission
from qc.backends.triton.kernel import Scratch
from qc.backends.triton.linear.loop import declare
from qc.backends.triton.linear.stages import EntriesOf
from qc.backends.triton.linear.tiles import Tiling
from qc.ir.weights.expression import ENTRY, LANE, ROW, Load

MOST_TOGETHER = 64
FEW_ROWS, MANY_ROWS = 4, 32
WIDE, NARROW = 64, 16
"""Outputs of a tile, for fewer than MANY_ROWS rows and from there on: measured on an H200."""


def together(tile: Tiling) -> int:
    """Return how many single entries of a row are added at once."""
    a_thread = 16 if tile.rows <= FEW_ROWS else 64
    held = a_thread * 32 * tile.warps // (tile.outputs * tile.rows)
    return max(1, min(MOST_TOGETHER, held))


def outputs_of(each: EntriesOf) -> int:
    """Return the outputs of a tile."""
    return WIDE if each.entries.width == 1 and each.tile < MANY_ROWS else NARROW


def width_of(each: EntriesOf) -> int:
    """Return the width of an entry, rounded up to a power of two."""
    return 1 << (each.entries.width - 1).bit_length()


def emit_entries(emission: Emission, each: EntriesOf, acc: str, tile: Tiling) -> None:
    """Write a loop over the entries of each output."""
    place, entries = each.place, each.entries
    if isinstance(each.source.values, Scratch):
        emission.join()
    x = declare(emission, each.source)
    channels, apart = each.source.channels, tile.rows if each.across else 1
    if each.across:
        emission.line(f"places = inputs.tile_across(tile, BM, {channels})")
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
                many = together(tile)
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
