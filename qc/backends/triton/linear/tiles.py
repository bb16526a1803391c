"""Which tiles the launches of a linear work in: chosen by measurement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """The tile of a launch: outputs x rows, and how it is run."""

    outputs: int
    rows: int
    warps: int
    stages: int
    width: int = 32
    """Channels of a step of the loop, at least."""
    lanes: int = 1
    """Stretches of channels that a tile holds side by side: see device/lanes.py."""
    registers: bool = False
    """Codes are loaded into registers a step ahead, not through shared memory."""
    parts: int | None = None
    """Among how many programs the channels are split, where that is no question of the shape."""


def coded_tiling(rows: int, outer: int, inner: int) -> Tiling:
    """Choose the tile of a loop over packed codes for up to `rows` rows."""
    if rows == 1:
        return Tiling(16, rows, 4, 3, 256, lanes=4, registers=True, parts=1)
    return Tiling(64, rows, 4, 3, 256 if rows <= 16 else 128)
