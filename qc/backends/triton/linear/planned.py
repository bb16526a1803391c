"""A function that is written, with the programs that run it."""

from __future__ import annotations

from dataclasses import dataclass

from qc.backends.triton.emit import Emission, Role
from qc.backends.triton.linear.tiles import Tiling


@dataclass(frozen=True)
class Planned:
    """A function that is written, and the programs that run it."""

    emission: Emission
    rule: str
    tiling: Tiling
    outer: int
    parts: int = 1
    multiple: int = 1

    def holds(self, bucket: int | None) -> bool:
        """Whether one tile holds all rows of a bucket, so that others may share the launch."""
        return self.multiple == 1 and bucket is not None and bucket <= self.tiling.rows

    @property
    def programs(self) -> int:
        """The programs of one tile of rows."""
        return -(-self.outer // self.tiling.outputs) * self.parts

    @property
    def role(self) -> Role:
        return Role(self.emission, -(-self.outer // self.tiling.outputs), self.parts)
