"""Which launches must wait for which: those that touch the same memory, unless both only read.

What does not wait runs side by side: the products that share an input, keys beside values. On GPUs
that begin a launch before the one in front has ended, launches stand in line, each waits by itself
for the one in front of it, and the question is which may do so late.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Access", "dependencies", "late_starts"]

Span = tuple[int, int]
"""Addresses [start, end)."""


@dataclass(frozen=True)
class Access:
    """The memory that one launch reads, and that it writes."""

    reads: tuple[Span, ...]
    writes: tuple[Span, ...]
    late_reads: tuple[Span, ...] = ()
    late_writes: tuple[Span, ...] = ()
    """Memory that it touches only once it has waited for the launches in front."""

    @property
    def all_reads(self) -> tuple[Span, ...]:
        return (*self.reads, *self.late_reads)

    @property
    def all_writes(self) -> tuple[Span, ...]:
        return (*self.writes, *self.late_writes)


MOST_BESIDE = 8
"""Launches that begin without waiting for each other: more would not find room on a GPU."""


def late_starts(order: Sequence[Access]) -> list[bool]:
    """Say which launches of a line may wait late: those whose early accesses conflict with no
    launch that may still run when they begin.

    A launch begins once all programs of the one in front have begun, and have waited unless they
    wait late. So what may still run is the one in front, and where that waits late, what may still
    run beside it.
    """
    found: list[bool] = []
    running: list[Access] = []
    for access in order:
        late = 0 < len(running) < MOST_BESIDE and not any(
            conflict(access.writes, (*other.all_reads, *other.all_writes))
            or conflict(access.reads, other.all_writes)
            for other in running
        )
        running = [*running, access] if late else [access]
        found.append(late)
    return found


def conflict(first: Iterable[Span], second: Iterable[Span]) -> bool:
    """Say whether any spans overlap."""
    others = tuple(second)
    return any(a < d and c < b for a, b in first for c, d in others)


def dependencies(order: Sequence[Access]) -> list[set[int]]:
    """Return, for each launch, the earlier ones that it waits for; of those that touched the same
    memory, only the last, which waits for the others itself."""
    spans = {span for each in order for span in (*each.all_reads, *each.all_writes)}
    marks = sorted({mark for span in spans for mark in span})
    writer: list[int | None] = [None] * len(marks)
    readers: list[list[int]] = [[] for _ in marks]

    def pieces(spans: Iterable[Span]) -> Iterable[int]:
        for start, end in spans:
            yield from range(bisect_left(marks, start), bisect_left(marks, end))

    found: list[set[int]] = []
    for number, access in enumerate(order):
        waits: set[int] = set()
        for piece in pieces(access.all_reads):
            last = writer[piece]
            if last is not None:
                waits.add(last)
        for piece in pieces(access.all_writes):
            last = writer[piece]
            waits |= set(readers[piece]) or ({last} if last is not None else set())
        for piece in pieces(access.all_reads):
            readers[piece].append(number)
        for piece in pieces(access.all_writes):
            writer[piece], readers[piece] = number, []
        found.append(waits - {number})
    return found
