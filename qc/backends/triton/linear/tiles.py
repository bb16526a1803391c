"""Which tiles the launches of a linear work in: chosen by measurement."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from qc.backends.triton.device.streams import FOURS


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
FEW, SOME = 4, 16
"""Rows of the tiles for few rows, and for some."""
UNIT, HELD = 64, 4608
"""Channels that are multiplied at once, and the bits of an output's codes that registers hold:
measured for 576 channels of two weights of 4 bits."""
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


@dataclass(frozen=True)
class Codes:
    """What a loop over packed codes multiplies, as far as tiles depend on it."""

    rows: int
    """At most; more than LARGEST: any number."""
    outer: int
    inner: int
    bits: int
    """Of all weights of an element."""
    narrowest: int
    group: int
    """Channels that share a factor, in the term where they are fewest."""
    terms: int = 1
    made: bool = False
    """Weights are made in registers (affine.py), all of them."""
    looked: bool = False
    """Some are looked up in tables."""
    alone: bool = True
    """No programs run beside the loop, so that each may take many registers."""

    @property
    def wide(self) -> bool:
        return self.outer >= MANY_OUTPUTS

    @property
    def large(self) -> bool:
        """Whether factors are shared by as many channels as are multiplied at once."""
        return self.group >= MANY

    @property
    def pair(self) -> bool:
        """Whether there are two weights of 4 bits: a gate and what it gates."""
        return self.terms == 2 and self.bits == 8 and self.narrowest == 4

    @property
    def whole(self) -> bool:
        """Whether all channels are one step, which registers hold."""
        even = self.inner % max(self.group, UNIT) == 0
        return self.alone and even and self.inner < SHORT and self.inner * self.bits <= HELD


def coded_tilings(codes: Codes, architectures: Collection[str]) -> Iterator[Tiling]:
    """Yield tiles of a loop over codes: the best first, and at the end one that fits any shape.
    Measured by benchmarks/gpu_tiles.py, docs/decisions/032."""
    measured = set(architectures) == {MEASURED}
    if codes.narrowest < 4 and not codes.made and codes.rows > 32:
        several = codes.bits > codes.narrowest
        yield from without_spills(codes.outer, codes.narrowest, several, codes.group, measured)
    careful = codes.made and codes.terms > 1 and not measured
    if careful and codes.rows > 32:
        yield Tiling(32, LARGEST, 8, 3, 128)  # others spill, and none was timed
    if MEASURED in architectures and NARROW not in architectures:
        if codes.rows <= FEW:
            yield from of_few_rows(codes)
        if codes.rows <= SOME and codes.whole and not careful:
            yield Tiling(64, SOME, 4, 3, codes.inner, registers=True)
        if codes.rows <= SOME and not careful:
            yield from of_some_rows(codes)
        elif SOME < codes.rows <= LARGEST:
            yield from of_more_rows(codes)
        elif codes.rows > LARGEST:
            yield from of_many_rows(codes)
    rows = min(codes.rows, LARGEST)
    yield Tiling(64, rows, 4, 3, 256 if codes.rows <= SOME else 128)


def of_few_rows(codes: Codes) -> Iterator[Tiling]:
    """Yield tiles for up to 4 rows: most have lanes, which needs no second launch."""
    inner, group, bits = codes.inner, codes.group, codes.bits
    lanes = Tiling(16, 4, 4, 3, 256, 4, True, parts=1)
    if bits in (3, 4) or (codes.terms == 1 and bits > 4) or (bits < 3 and codes.large):
        small = bits == 8 or (bits == 4 and group < 32)
        if codes.made and codes.terms == 1 and codes.wide and codes.alone and small:
            yield Tiling(64, SOME, 4, 3, 512, registers=True)
        if bits == 4 or (codes.rows == 1 and bits < 4 and codes.outer <= inner):
            yield from of_eight_lanes(codes)
        yield lanes
    elif codes.pair and codes.alone and (codes.made or codes.large):
        yield replace(lanes, width=128) if group < 32 else lanes
    elif codes.pair and codes.alone and codes.rows > 1 and group >= 64:
        yield lanes


def of_eight_lanes(codes: Codes) -> Iterator[Tiling]:
    """Yield tiles of more lanes; where groups are not small, registers hold the codes of many
    channels."""
    at_once = codes.bits == 4 and codes.group >= 64
    most = EACH if codes.outer <= 16 * WAVE else None
    if codes.rows == 1:
        if at_once and codes.inner <= 8 * 512:
            yield Tiling(16, 1, 8, 3, 512, 8, True, parts=1, most_programs=most)
        yield Tiling(16, 2, 8, 3, 256, 8, True, parts=1, most_programs=most)
        return
    if at_once and not codes.wide and codes.inner <= 4 * 1024:
        yield Tiling(32, 4, 8, 3, 1024, 4, True, parts=1)
    if codes.inner > codes.outer:
        yield Tiling(16, 4, 8, 3, 256, 8, True, parts=1, most_programs=most)


def of_some_rows(codes: Codes) -> Iterator[Tiling]:
    """Yield tiles for up to 16 rows: 16 columns cost less than 4."""
    outer, inner, bits = codes.outer, codes.inner, codes.bits
    if codes.terms > 1 and bits > 4:
        yield from of_some_rows_of_pairs(codes)
        return
    if codes.rows <= FEW and not (bits < 3 or (codes.alone and inner < SHORT)):
        return
    many = codes.alone and (codes.rows > FEW or bits < 3)
    if many and codes.wide and (codes.terms == 1 or codes.large):
        yield from of_many_outputs(codes)
    plain = bits == 4 and codes.large and not codes.made
    if many and plain and 4096 <= outer < MANY_OUTPUTS and inner <= 4096 and inner % 1024 == 0:
        yield Tiling(32, SOME, 4, 3, 512, 2, True, parts=1)
    if many and 4096 <= outer < inner and (codes.made or bits >= 4):
        yield Tiling(128, SOME, 8, 3, 256, registers=True)
    at_once = many and bits == 4 and codes.large and inner > outer
    yield Tiling(64, SOME, 4, 3, 256, registers=True, unit=MANY if at_once else None)


def of_many_outputs(codes: Codes) -> Iterator[Tiling]:
    """Yield tiles of many channels a step, for programs that are alone."""
    inner, bits, few = codes.inner, codes.bits, codes.group < 32
    longest = (bits == 4 and codes.large and not codes.looked) or (bits == 2 and codes.made)
    if longest and not few and inner % 1024 == 0 and FOURS.value:
        yield Tiling(64, SOME, 4, 3, 1024, registers=True)
    if inner % 512 == 0:
        if (bits == 8 and codes.large) or (codes.made and codes.looked and not few):
            yield Tiling(128, SOME, 8, 3, 512, registers=True)
        yield Tiling(64, SOME, 4, 3, 512, registers=True)


def of_some_rows_of_pairs(codes: Codes) -> Iterator[Tiling]:
    """Yield tiles for up to 16 rows and two weights of 4 bits."""
    if not codes.pair or not codes.alone:
        return
    if codes.inner < SHORT and codes.rows <= FEW:
        yield Tiling(64, SOME, 4, 3, 256, registers=True)
    elif codes.made and codes.rows > FEW and codes.large:
        yield Tiling(64, SOME, 4, 3, 512, registers=True)
    elif codes.made and codes.rows > FEW and codes.group < 32:
        yield Tiling(32, SOME, 4, 3, 256, 2, True, parts=1)


def of_more_rows(codes: Codes) -> Iterator[Tiling]:
    """Yield tiles for 17 to 64 rows."""
    rows = codes.rows
    if codes.terms == 1 or codes.bits == 4:
        if codes.inner > codes.outer and rows > 32 and codes.bits != 3:
            yield Tiling(128, rows, 8, 3, 128, registers=True)
        yield Tiling(64, rows, 4, 3, 256 if codes.wide else 128, registers=True)
    elif codes.pair and rows > 32:
        step = 256 if codes.made and codes.group >= 32 else 128
        yield Tiling(64, rows, 4, 3, step, registers=True)


def of_many_rows(codes: Codes) -> Iterator[Tiling]:
    """Yield tiles for any number of rows."""
    if codes.bits == 4 and codes.wide and codes.large:
        yield Tiling(64, codes.rows, 4, 3, 128, unit=MANY)
    elif codes.bits == 4 or (codes.terms == 1 and codes.bits > 4):
        yield Tiling(64, LARGEST, 4, 3, 256, registers=True)


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
