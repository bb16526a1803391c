"""A program that works on one tile of outputs after another: the codes of the next one come while
those of this one are multiplied, and x is loaded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qc.backends.triton.emit import Emission
from qc.backends.triton.linear.loop import (
    Loop,
    Source,
    Term,
    declare,
    places_of,
    step_width,
    tile_call,
)
from qc.backends.triton.linear.tiles import Tiling


@dataclass(frozen=True)
class Cells:
    """Tiles of `tiling.outputs` among `outer` outputs, for a fixed number of programs."""

    tiling: Tiling
    outer: int

    @property
    def count(self) -> int:
        return -(-self.outer // self.tiling.outputs)

    def suit(self, source: Source, terms: Sequence[Term]) -> bool:
        """Say whether programs get more tiles than one, and all channels in one step."""
        lanes, programs = self.tiling.lanes, self.tiling.programs
        if programs is None or self.count <= programs or not self.tiling.registers:
            return False
        channels = source.channels // lanes
        return step_width(channels, terms, self.tiling.width) >= channels

    def emit(
        self,
        emission: Emission,
        source: Source,
        terms: Sequence[tuple[str, Term]],
        begin: Sequence[str],
        end: Callable[[], None],
    ) -> None:
        """Write the loop. `begin` clears accumulators, `end` writes what follows the products."""
        tiling, lanes = self.tiling, self.tiling.lanes
        width = step_width(source.channels // lanes, [term for _, term in terms], tiling.width)
        unit = tiling.unit or min(term.unit for _, term in terms)
        loop = Loop(source, width, unit, lanes, True, tiling.weighted, cells=True)
        x = declare(emission, source)
        outside, emission.lines = emission.lines, []
        for start in range(0, width, unit):
            tile = tile_call(emission, source, x, str(start), unit, loop.even)
            loop.tiles.append(emission.bind(tile))
        tiles, emission.lines = emission.lines, []
        emission.depth += 1
        for acc, term in terms:
            term.emit(emission, loop, acc)
        body, emission.lines = emission.lines, outside
        emission.depth -= 1
        for line in self.places_of(loop, "", "cell"):
            emission.line(line)
        for line in loop.ahead:
            emission.line(line)
        emission.begin()
        emission.line(places_of(source, lanes))
        emission.lines += tiles
        emission.join()
        emission.line(f"for cell in tl.range(cell, {self.count}, {tiling.programs}):")
        emission.depth += 1
        emission.line(f"out = products.outputs(cell, BN, {self.outer})")
        emission.line(f"next_cell, more = products.after(cell, {tiling.programs}, {self.count})")
        for line in self.places_of(loop, "next_", "next_cell"):
            emission.line(line)
        for line in (*loop.loads, *begin):
            emission.line(line)
        emission.lines += body
        end()
        for line in loop.moves:
            emission.line(line)
        emission.depth -= 1

    def places_of(self, loop: Loop, prefix: str, cell: str) -> list[str]:
        """Return the statements that say which outputs a tile has."""
        size = f"BN, {self.outer}"
        found = [f"{prefix}block = products.first_block({cell}, BN)"]
        if loop.lanes == 1:
            found.append(f"{prefix}out = products.outputs({cell}, {size})")
        else:
            found.append(f"{prefix}lane_out = lanes.outputs({cell}, {size}, {loop.lanes})")
        return found
