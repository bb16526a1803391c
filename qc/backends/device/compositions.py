"""What canonical composition (NFC, Unicode Standard Annex 15) needs to know of characters, as
tables for qc/runtime/device/composing.c. Hangul is arithmetic there."""

from __future__ import annotations

import sys
import unicodedata
from functools import cache

HANGUL = range(0xAC00, 0xD7A4)
SURROGATES = range(0xD800, 0xE000)
PARTS = 4  # of a character, at most


@cache
def composition_tables() -> tuple[
    list[tuple[int, ...]], list[tuple[int, int, int]], list[tuple[int, int, int]]
]:
    """Return {character, parts, part x 4}, {first, second, character} and {low, high, class}."""
    apart: list[tuple[int, ...]] = []
    together: list[tuple[int, int, int]] = []
    classes: list[tuple[int, int, int]] = []
    for code in range(sys.maxunicode + 1):
        if code in HANGUL or code in SURROGATES:
            continue
        character = chr(code)
        kind = unicodedata.combining(character)
        if kind:
            if classes and classes[-1][1] == code - 1 and classes[-1][2] == kind:
                classes[-1] = (classes[-1][0], code, kind)
            else:
                classes.append((code, code, kind))
        written = unicodedata.decomposition(character)
        if not written or written.startswith("<"):
            continue
        parts = [ord(part) for part in unicodedata.normalize("NFD", character)]
        apart.append((code, len(parts), *parts, *[0] * (PARTS - len(parts))))
        pair = [int(part, 16) for part in written.split()]
        if len(pair) == 2 and unicodedata.normalize("NFC", character) == character:
            together.append((pair[0], pair[1], code))
    return apart, sorted(together), classes
