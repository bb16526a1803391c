"""Give memory to values: aligned arrays, one arena planned by lifetimes, and state."""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qc.errors import ArtifactError
from qc.runtime.dtypes import DType

__all__ = ["Lifetime", "StateMemory", "aligned_bytes", "plan_arena"]

ALIGNMENT = 64
_MOST_BYTES = 2**44


def round_up(size: int, multiple: int = ALIGNMENT) -> int:
    """Return the next multiple that is at least `size`."""
    return -(-size // multiple) * multiple


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """Allocate `size` uninitialised bytes that start on a cache line."""
    if size > _MOST_BYTES:
        raise ArtifactError(f"this call would need {size / 2**30:.0f} GiB of memory")
    try:
        raw = np.empty(size + ALIGNMENT, np.uint8)
    except MemoryError:
        raise ArtifactError(
            f"no memory for {size / 2**30:.1f} GiB of intermediate values"
        ) from None
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Say that a value of `bytes` is alive from step `first` to step `last`, both included."""

    first: int
    last: int
    bytes: int


def plan_arena(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Place values so that no two alive in the same step overlap; return offsets and the total.

    Greedy in time: at each step the largest new value takes the smallest hole that holds it, then
    the values that end with the step are freed. Offsets and the total are multiples of 64 bytes.
    """
    offsets = [0] * len(lifetimes)
    starting: dict[int, list[int]] = {}
    ending: dict[int, list[int]] = {}
    for index, each in enumerate(lifetimes):
        if each.bytes:
            starting.setdefault(each.first, []).append(index)
            ending.setdefault(each.last, []).append(index)
    holes: list[tuple[int, int]] = []  # (start, end), sorted, never touching
    total = 0
    for step in sorted(starting.keys() | ending.keys()):
        for index in sorted(starting.get(step, ()), key=lambda i: -lifetimes[i].bytes):
            size = round_up(lifetimes[index].bytes)
            fitting = [hole for hole in holes if hole[1] - hole[0] >= size]
            if fitting:
                start, end = min(fitting, key=lambda hole: hole[1] - hole[0])
                holes.remove((start, end))
                if start + size < end:
                    holes.insert(bisect_left(holes, (start, end)), (start + size, end))
            else:
                start = holes.pop()[0] if holes and holes[-1][1] == total else total
                total = start + size
            offsets[index] = start
        for index in ending.get(step, ()):
            size = round_up(lifetimes[index].bytes)
            _add_hole(holes, offsets[index], offsets[index] + size)
    return offsets, total


def _add_hole(holes: list[tuple[int, int]], start: int, end: int) -> None:
    """Insert a hole and merge it with its neighbours."""
    at = bisect_left(holes, (start, end))
    if at < len(holes) and holes[at][0] == end:
        end = holes.pop(at)[1]
    if at and holes[at - 1][1] == start:
        start = holes.pop(at - 1)[0]
        at -= 1
    holes.insert(at, (start, end))


class StateMemory:
    """Own the state of one session: zero pages of the system, so that unused room costs nothing."""

    def __init__(self, layout: Sequence[tuple[DType, tuple[int, ...]]]) -> None:
        sizes = [prod(shape) * dtype.bytes for dtype, shape in layout]
        total = sum(round_up(size) for size in sizes)
        if total > _MOST_BYTES:
            raise ArtifactError(f"the state would need {total / 2**30:.0f} GiB of memory")
        try:
            # Private: a forked child has its own copy, and clear() can give pages back.
            self._pages = mmap.mmap(-1, max(total, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, MemoryError):
            raise ArtifactError(f"no memory for {total / 2**30:.1f} GiB of state") from None
        raw = np.frombuffer(self._pages, np.uint8)
        self.arrays: list[NDArray[Any]] = []
        start = 0
        for (dtype, shape), size in zip(layout, sizes, strict=True):
            self.arrays.append(raw[start : start + size].view(dtype.numpy).reshape(shape))
            start += round_up(size)
        self.bytes = total

    def clear(self) -> None:
        """Make every element zero again, and free the pages; addresses stay."""
        self._pages.madvise(mmap.MADV_DONTNEED)

    def copy_from(self, smaller: StateMemory) -> None:
        """Take over the content of a state with room for fewer positions.

        A position must have the same index in both, which holds for any layout whose sizes grow
        with the number of positions.
        """
        for mine, old in zip(self.arrays, smaller.arrays, strict=True):
            mine[tuple(slice(0, size) for size in old.shape)] = old
