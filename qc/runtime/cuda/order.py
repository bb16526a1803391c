"""Which launches must wait for which: those that touch the same memory, unless both only read.

What does not wait runs side by side: the products that share an input, keys beside values.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Access", "dependencies"]

Span = tuple[int, int]
"""Addresses [start, end)."""


@dataclass(frozen=True)
class Access:
    """The memory that one launch reads, and that it writes."""

    reads: tuple[Span, ...]
    writes: tuple[Span, ...]


def dependencies(order: Sequence[Access]) -> list[set[int]]:
    """Return, for each launch, the earlier ones that it waits for; of those that touched the same
    memory, only the last, which waits for the others itself."""
    spans = {span for each in order for span in (*each.reads, *each.writes)}
    marks = sorted({mark for span in spans for mark in span})
    writer: list[int | None] = [None] * len(marks)
    readers: list[list[int]] = [[] for _ in marks]

    def pieces(spans: Iterable[Span]) -> Iterable[int]:
        for start, end in spans:
            yield from range(bisect_left(marks, start), bisect_left(marks, end))

    found: list[set[int]] = []
    for number, access in enumerate(order):
        waits: set[int] = set()
        for piece in pieces(access.reads):
            last = writer[piece]
            if last is not None:
                waits.add(last)
        for piece in pieces(access.writes):
            last = writer[piece]
            waits |= set(readers[piece]) or ({last} if last is not None else set())
        for piece in pieces(access.reads):
            readers[piece].append(number)
        for piece in pieces(access.writes):
            writer[piece], readers[piece] = number, []
        found.append(waits - {number})
    return found
