"""Which axes of two shapes of equal size hold the same elements."""

from __future__ import annotations

from qc.ir.types import Dim, element_count


def matching_axes(
    old: tuple[Dim, ...], new: tuple[Dim, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Group the axes of two shapes of equal size, from the left, into the smallest groups with
    equal products; axes of size 1 at the end join the last group."""
    groups: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        cuts = [
            (a, b)
            for a in range(i, len(old) + 1)
            for b in range(j, len(new) + 1)
            if element_count(old[start[0] : a]) == element_count(new[start[1] : b])
            and element_count(old[a:]) == element_count(new[b:])
        ]
        i, j = min(cuts, key=sum) if cuts else (len(old), len(new))
        groups.append((tuple(range(start[0], i)), tuple(range(start[1], j))))
    return groups
