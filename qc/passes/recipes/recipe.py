"""What a recipe is: a named list of passes, data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qc.passes.pipeline import Pass, Pipeline


@dataclass(frozen=True)
class Recipe:
    """Passes that turn a canonical graph into a quantized one.

    `paper` says where the method is from; `claims` are ordinal sentences that tests run.
    `calibrated` are the passes where the user gives data to calibrate on; () for the same.
    """

    name: str
    passes: tuple[Pass, ...]
    paper: str = ""
    claims: tuple[str, ...] = ()
    calibrated: tuple[Pass, ...] = ()

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline(self.passes)

    def with_data(self, passes: tuple[Pass, ...]) -> Recipe:
        """Return the recipe with other passes where there is data to calibrate on."""
        return replace(self, calibrated=passes)

    def __add__(self, more: Sequence[Pass]) -> Recipe:
        return replace(self, passes=(*self.passes, *more))

    def replace(self, old: type[Pass], new: Pass) -> Recipe:
        """Return the recipe with `new` in place of every pass of type `old`."""
        passes = tuple(new if isinstance(one, old) else one for one in self.passes)
        return replace(self, passes=passes)
