"""Which tiles the launches of a linear work in: chosen by measurement."""

from __future__ import annotations

from collections.abc import Collection, Iterator
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
    most_registers: int | None = None
    """Registers of a thread: so few that programs of several outputs run side by side."""
    most_programs: int | None = None
    """Programs of a multiprocessor: so few that those of one wave are spread over all."""
    parts: int | None = None
    """Among how many programs the channels are split, where that is no question of the shape."""
    unit: int | None = None
    """Channels that are multiplied at once where groups have so many; None: what terms like."""


MANY_OUTPUTS = 8192
"""Outputs from which on tiles of 64 are as many programs as multiprocessors."""
SHORT = 1024
"""Channels below which the tile for 16 rows serves fewer where lanes do not divide them."""
FEW = 4
"""Rows of the tile for few rows."""
LARGEST, MANY = 64, 128
"""Rows of a tile where nothing else was measured, and where there is any number of them."""
WAVE, EACH = 264, 2
"""Programs of the tile for few rows that are one wave on an H200, and those of a multiprocessor.
With room for three, programs that begin while the launch in front ends crowd where it ended first:
a step of Llama-3.1-8B's shape took 1.90 ms instead of 1.77."""
AT_ONCE = 3
"""Programs of the tile for one row that a multiprocessor runs at once."""
MEASURED, NARROW = "sm_90", "sm_100"
"""The architecture that these were measured on, and one that sends products of 8 columns or more
through tensor memory: what is for it, too, keeps the tiles that it was written for."""


def coded_tilings(
    rows: int, outer: int, inner: int, bits: int, group: int, architectures: Collection[str],
    alone: bool = True, narrowest: int = 4,
) -> Iterator[Tiling]:  # fmt: skip
    """Yield tiles of a loop over codes, `bits` a weight with factors for `group` channels, for up
    to `rows` rows: the best first, and at the end one that fits any shape. `alone`: no programs run
    beside it, so that each may take many registers; `narrowest`: the fewest bits of a code.
    Measured by benchmarks/gpu_tiles.py."""
    if narrowest < 4 and rows > 32:
        measured = set(architectures) == {MEASURED}
        yield from without_spills(outer, narrowest, bits > narrowest, group, measured)
    if MEASURED in architectures and NARROW not in architectures:
        if rows <= 4 and (3 <= bits <= 4 or (bits < 3 and group >= MANY)):
            if bits == 4 or (rows == 1 and outer <= inner):
                yield from few_rows(rows, outer, inner, bits == 4 and group >= 64)
            yield Tiling(16, 4, 4, 3, 256, 4, True, parts=1)
            if bits == 4 and alone and inner < SHORT:
                yield Tiling(64, 16, 4, 3, 256, registers=True)
        if rows <= 4 and bits == 8 and narrowest == 4 and alone:
            if group >= MANY or (rows > 1 and group >= 64):
                yield Tiling(16, 4, 4, 3, 256, 4, True, parts=1)
            if inner < SHORT:
                yield Tiling(64, 16, 4, 3, 256, registers=True)
        if rows > LARGEST and bits == 4:
            wide = outer >= MANY_OUTPUTS and group >= MANY
            yield (
                Tiling(64, rows, 4, 3, 128, unit=MANY)
                if wide
                else Tiling(64, LARGEST, 4, 3, 256, registers=True)
            )
        elif rows <= 16 and bits == 4:  # 16 columns cost less than 4
            at_once = alone and rows > 4 and group >= MANY
            if at_once and outer >= MANY_OUTPUTS and inner % 1024 == 0:
                yield Tiling(64, 16, 4, 3, 1024, registers=True)
            if at_once and 4096 <= outer < MANY_OUTPUTS and inner <= 4096 and inner % 1024 == 0:
                yield Tiling(32, 16, 4, 3, 512, 2, True, parts=1)
            unit = MANY if at_once and inner > outer else None
            yield Tiling(64, 16, 4, 3, 256, registers=True, unit=unit)
        elif bits == 4 and inner > outer and rows > 32:
            yield Tiling(128, rows, 8, 3, 128, registers=True)
        elif bits == 4:
            yield Tiling(64, rows, 4, 3, 256 if outer >= MANY_OUTPUTS else 128, registers=True)
    yield Tiling(64, min(rows, LARGEST), 4, 3, 256 if rows <= 16 else 128)


def without_spills(
    outer: int, bits: int, several: bool, group: int, measured: bool
) -> Iterator[Tiling]:  # fmt: skip
    """Yield tiles for many rows and few `bits` where 64 outputs x 64 rows do not stay in registers:
    `several` weights in one loop, or many factors. They are slower where those do; and where only
    some 50 bytes of a thread do not, they are slower, too."""
    if several and measured:
        yield Tiling(64, 32, 4, 3, 128) if group < 64 else Tiling(64, LARGEST, 4, 2, 128)
    elif several or (group < 64 and not measured):
        yield Tiling(32, LARGEST, 8, 3, 128)
    elif group < 64 and (bits > 2 or outer < MANY_OUTPUTS):
        yield Tiling(64, 32, 4, 3, 128)


def streamed(
    outer: int, inner: int, group: int, weights: int, alone: bool, multiprocessors: int,
    architectures: Collection[str],
) -> Tiling | None:  # fmt: skip
    """Return the tile of programs that take tiles of outputs of `weights` one after another, for
    one row and codes of 4 bits; None where all tiles run at once and are `alone`, or where x or the
    factors of many groups do not stay in registers: groups of 64 took 13.0 us instead of 12.7."""
    if MEASURED not in architectures or NARROW in architectures:
        return None
    found = Tiling(16, 1, 8, 1, lanes=8, most_registers=128)
    fits = group >= MANY and inner % (found.lanes * group) == 0 and inner <= found.lanes * 512
    if outer % found.outputs or not fits:
        return None
    many = outer // found.outputs * weights > AT_ONCE * multiprocessors
    return found if many or not alone else None


def few_rows(rows: int, outer: int, inner: int, at_once: bool) -> Iterator[Tiling]:
    """Yield tiles of several lanes; `at_once`: registers hold the codes of many channels."""
    most = EACH if outer <= 16 * WAVE else None
    if rows == 1:
        if at_once and inner <= 8 * 512:
            yield Tiling(16, 1, 8, 3, 512, 8, True, parts=1, most_programs=most)
        yield Tiling(16, 2, 8, 3, 256, 8, True, parts=1, most_programs=most)
        return
    if at_once and outer < MANY_OUTPUTS and inner <= 4 * 1024:
        yield Tiling(32, 4, 8, 3, 1024, 4, True, parts=1)
    if inner > outer:
        yield Tiling(16, 4, 8, 3, 256, 8, True, parts=1, most_programs=most)
