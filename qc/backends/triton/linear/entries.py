"""Write the products of terms that list the entries of each row."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass
class EntryLoop:
    """The loop over the entries of each output of a tile, while it is written."""

    emission: Emission
    each: EntriesOf
    tile: Tiling
    rows: str = "rows"
    """The name of the rows of x that are multiplied."""
    start: str = ""
    stop: str = ""
    first: str = ""

    @property
    def stored(self) -> tuple[str, str] | None:
        """The arrays of columns and values of entries that are single and stored as they are."""
        place, entries = self.each.place, self.each.entries
        match entries.value, entries.column:
            case Load(value, (at,)), Load(column, (also,)) if at == also == ENTRY:
                if entries.width == 1:
                    emission = self.emission
                    return place.stored(emission, column), place.stored(emission, value)
        return None

    def emit_bounds(self) -> None:
        """Write where the entries of each output start and stop."""
        place, entries = self.each.place, self.each.entries
        self.start, self.stop = (
            self.emission.bind(
                "{}(out{})".format(*place.function(self.emission, place.named(found), (ROW,)))
            )
            for found in (entries.start, entries.stop)
        )

    def emit_first(self) -> None:
        """Write the load of the first entries, which needs nothing of other launches."""
        if self.stored is not None:
            columns, values = self.stored
            self.first = self.emission.bind(
                f"entries.first({self.start}, {self.stop}, {columns}, {values}, "
                f"{together(self.tile)})"
            )

    def emit_products(self, acc: str) -> None:
        """Write what adds all products to an accumulator."""
        emission, each = self.emission, self.each
        x = declare(emission, each.source)
        channels, apart = each.source.channels, self.tile.rows if each.across else 1
        places = f"inputs.places({self.rows}, {channels}, 1, 1)"
        if each.across:
            places = f"inputs.tile_across(tile, BM, {channels})"
        emission.line(f"entry_places = {places}")
        if self.stored is not None:
            columns, values = self.stored
            emission.line(
                f"{acc} = entries.outliers({acc}, {x}, entry_places, {self.start}, {self.stop}, "
                f"{columns}, {values}, {self.first}[0], {self.first}[1], {apart}, "
                f"{together(self.tile)})"
            )
            return
        self.emit_groups(acc, x, apart)

    def emit_groups(self, acc: str, x: str, apart: int) -> None:
        """Write a loop over entries of several channels, or such that are decoded."""
        emission, place, entries = self.emission, self.each.place, self.each.entries
        start, stop, channels = self.start, self.stop, self.each.source.channels
        lane = emission.bind(f"entries.lanes({width_of(self.each)})")
        column_at, columns = place.function(emission, place.named(entries.column), (ENTRY,))
        value_at, values = place.function(emission, place.named(entries.value), (ENTRY, LANE))
        inside = emission.bind(f"tl.minimum({lane}, {entries.width - 1})")
        total = emission.bind(f"entries.zeros(out, {lane}, entry_places)")
        emission.line(f"for number in range(0, entries.longest({start}, {stop})):")
        emission.depth += 1
        entry = emission.bind(f"entries.numbered({start}, {stop}, number)")
        emission.line(
            f"{total} = entries.group({total}, {x}, entry_places, {start}, {stop}, number, "
            f"{column_at}({entry}{columns}), {value_at}({entry}, {inside}{values}), {lane}, "
            f"{entries.width}, {channels}, {apart})"
        )
        emission.depth -= 1
        emission.line(f"{acc} = entries.reduced({acc}, {total})")


def emit_entries(emission: Emission, each: EntriesOf, acc: str, tile: Tiling) -> None:
    """Write a loop over the entries of each output."""
    loop = EntryLoop(emission, each, tile)
    loop.emit_bounds()
    loop.emit_first()
    if isinstance(each.source.values, Scratch):
        emission.begin()
        emission.join()
    loop.emit_products(acc)
