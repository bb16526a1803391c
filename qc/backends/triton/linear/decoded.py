"""Any term at all: every weight is decoded by itself, as its format says."""

from __future__ import annotations

from dataclasses import dataclass

from qc.backends.triton.emit import Emission
from qc.backends.triton.linear.loop import Loop, Term
from qc.backends.triton.linear.place import Place
from qc.ir.weights.expression import COL, ROW

WIDTH = 32


@dataclass(frozen=True)
class Decoded(Term):
    """A term that is decoded element by element into tiles of 32 channels."""

    place: Place
    size: int = WIDTH
    """Channels of a tile: more wait for memory at once, and take more registers."""
    rule = "decoded"

    @property
    def width(self) -> int:
        return self.size

    @property
    def unit(self) -> int:
        return self.size

    def load(self, emission: Emission, loop: Loop) -> None:
        for start in range(0, loop.width, loop.unit):
            self.tile(emission, loop, start)

    def tile(self, emission: Emission, loop: Loop, start: int) -> str:
        """Write the decoding of a tile, once; return its name."""
        name, arrays = self.place.function(emission, self.place.decode, (ROW, COL))
        key = f"{name}{arrays} from {start}"
        if key not in loop.known:
            size = f"{loop.unit}, {self.place.inner}, {loop.even}"
            column = f"products.columns({loop.at(start)}, {size})"
            at = f"{loop.out}[:, None], {column}[None, :]"
            loop.known[key] = emission.bind(f"{name}({at}{arrays})")
        return loop.known[key]

    def emit(self, emission: Emission, loop: Loop, acc: str) -> None:
        for start in range(0, loop.width, loop.unit):
            tile = self.tile(emission, loop, start)
            emission.line(f"{acc} = products.decoded({acc}, {tile}, {loop.x(start)})")
