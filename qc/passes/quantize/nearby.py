"""Formats near one that a weight cannot be stored in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from qc.errors import FormatError
from qc.ir.weights.notation import parse_term
from qc.ir.weights.weight import TermFormat, WeightFormat

SIZES = re.compile(r"(?<![a-z\d])(?:g|o|d|rank|bond|columns|kept)(\d+)")
"""Numbers of a printed format that say how much, not how: groups, ranks, bonds, columns."""

LAST = "int8·row"
"""What stores any matrix: what is suggested where nothing nearer is found."""


@cache
def nearest_accepted(format: WeightFormat, shape: tuple[int, ...]) -> WeightFormat:
    """Return a format like `format` that stores a matrix of `shape`: smaller sizes first, then
    rows for groups, then without the term that does not fit."""
    found = [nearest_term(term, shape) for term in format.terms]
    kept = tuple(term for term in found if term is not None)
    return WeightFormat(kept or (parse_term(LAST),))


def nearest_term(term: TermFormat, shape: tuple[int, ...]) -> TermFormat | None:
    """Return the first of the near formats that fits; None where none does."""
    if term.refusal(shape) is None:
        return term
    known = (parsed(text) for text in nearby(str(term)))
    fitting = (near for near in known if near is not None and near.refusal(shape) is None)
    return next(fitting, None)


def nearby(text: str) -> Iterator[str]:
    """Yield printed forms with one size made smaller step by step, then with rows as groups."""
    for size in SIZES.finditer(text):
        start, end = size.span(1)
        for smaller in range(int(size[1]) - 1, 0, -1):
            yield f"{text[:start]}{smaller}{text[end:]}"
    yield re.sub(r"·[go]\d+", "·row", text)


def parsed(text: str) -> TermFormat | None:
    """Read a printed form; None where it is none."""
    try:
        return parse_term(text)
    except FormatError:
        return None
