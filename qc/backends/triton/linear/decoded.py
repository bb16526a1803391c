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
    rule = "decoded"

    @property
    def width(self) -> int:
        return WIDTH

    @property
    def unit(self) -> int:
        return WIDTH

    def emit(self, emission: Emission, loop: Loop, acc: str) -> None:
        name, arrays = self.place.function(emission, self.place.decode, (ROW, COL))
        for start in range(0, loop.width, loop.unit):
            column = (
                f"products.columns({loop.at(start)}, {loop.unit}, {self.place.inner}, {loop.even})"
            )
            at = f"{loop.out}[:, None], {column}[None, :]"
            emission.line(f"{acc} = products.decoded({acc}, {name}({at}{arrays}), {loop.x(start)})")
