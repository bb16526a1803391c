"""How long a product with a stored matrix takes at best: memory against arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from qc.ir.target import Target

ROWS = (1, 16, 128)
"""Rows of x that reports show: a token, a few sequences at once, a prompt."""

TRIED = tuple(1 << power for power in range(11))
"""Rows of x among which "no speed-up from N rows on" is looked for."""

NOTHING_GAINED = 1.05
"""Speed-ups below are called none: two kernels of one roofline differ by more."""

LANE_BYTES = 4

FLOAT_PRODUCT = 2.0
"""Instructions for a vector of decoded weights and a row more: a broadcast and a multiply-add.
Measured for 128 rows on Zen 3, int8 products of AVX2, whose rule says 1, take 0.54 of the time."""


@dataclass(frozen=True)
class Work:
    """What a product with a matrix costs a core: bytes read and instructions on vectors.

    `single` are the instructions for one row of x. From `tile` rows on, what is read is decoded
    once for all of them, and each costs `more`.
    """

    bytes: int
    single: float
    more: float
    tile: int

    def seconds(self, rows: int, target: Target, cores: int) -> float:
        """Return the longer of reading and computing, on all cores."""
        instructions = rows * self.single
        if rows >= self.tile:
            instructions = self.single + rows * self.more
        hertz = target.gigahertz * 1e9 * cores
        reading = self.bytes / (target.bytes_per_cycle * hertz)
        return max(reading, instructions / (target.vector_instructions_per_cycle * hertz))


def work_of(
    size: int,
    elements: int,
    instructions: Iterable[float],
    tile: int,
    target: Target,
    integers: bool,
) -> Work:
    """Return the work of a matrix of `elements` in `size` bytes, times integers or floats.

    `instructions` are those for a vector of weights of each term and one row.
    """
    terms = list(instructions)
    vectors = elements * LANE_BYTES / target.vector_bytes
    factor = 1.0 if integers else FLOAT_PRODUCT
    more = sum(min(FLOAT_PRODUCT, factor * each) for each in terms)
    return Work(size, vectors * sum(terms), vectors * more, tile)


class Cost(Protocol):
    """What says how long a product takes."""

    def seconds(self, rows: int, target: Target, cores: int) -> float: ...


def speedup(work: Cost, baseline: Cost, rows: int, target: Target) -> float:
    """Return how many times faster than the baseline."""
    return baseline.seconds(rows, target, 1) / (work.seconds(rows, target, 1) or 1.0)


def flat_from(work: Cost, baseline: Cost, target: Target) -> int | None:
    """Return the rows from which on nothing is gained; None where something always is."""
    found = None
    for rows in reversed(TRIED):
        if speedup(work, baseline, rows, target) >= NOTHING_GAINED:
            return found
        found = rows
    return found
