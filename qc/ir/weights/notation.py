"""Reading formats as reports print them: `int3·g64 + rank16 + sparse0.5%`.

Terms are joined by +, the words of a term by · (or by :, which is easier to type). A word may hold
a whole term in parentheses: `e2m1·g16·scale(e4m3·tensor)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qc.errors import FormatError, nearest
from qc.ir.weights.tiles import Tile, parse_tile
from qc.ir.weights.weight import TermFormat, WeightFormat


def parse_weights(text: str) -> WeightFormat:
    """Read a sum of terms; FormatError says which term is wrong and names the nearest ones."""
    return WeightFormat(tuple(parse_term(term) for term in split_outside(text, "+")))


def parse_term(text: str) -> TermFormat:
    """Read one term; FormatError says what is wrong with it."""
    from qc.ir.weights.catalog import short_names, term_formats  # these import this file

    text = text.strip().replace(":", "·")
    words = split_outside(short_names().get(text, text), "·")
    for cls in term_formats().values():
        try:
            found = cls.parse(words)
        except ValueError as error:
            raise FormatError(f"{text!r} is no weight format: {error}") from None
        if found is not None:
            return found
    known = sorted({*EXAMPLES, *short_names()})
    hint = nearest(text, known) or f"; for example {', '.join(known)}"
    raise FormatError(f"unknown weight format {text!r}{hint}")


EXAMPLES = ("f16", "int4·g128", "int3·g64·zero", "rank16", "sparse0.5%")


def split_outside(text: str, separator: str) -> list[str]:
    """Split at a separator that stands outside all parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == separator and not depth:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise FormatError(f"the parentheses of {text!r} do not match")
    return [part.strip() for part in parts]


def argument(word: str, name: str) -> str | None:
    """Return what stands in `name(...)`; None for another word."""
    found = re.fullmatch(rf"{name}\((.*)\)", word, re.DOTALL)
    return found[1] if found else None


def take_argument(words: list[str], name: str) -> TermFormat | None:
    """Remove the word `name(...)` and return the term inside it; None where it is not there."""
    for word in words:
        inner = argument(word, name)
        if inner is not None:
            words.remove(word)
            return parse_term(inner)
    return None


def take_tile(words: list[str], default: Tile) -> Tile:
    """Remove the word that names a tile and return the tile; the default where none does."""
    for word in words:
        tile = parse_tile(word)
        if tile is not None:
            words.remove(word)
            return tile
    return default


def take_word(words: list[str], known: Iterable[str]) -> str | None:
    """Remove the first of these words that is there and return it."""
    found = next((word for word in words if word in tuple(known)), None)
    if found is not None:
        words.remove(found)
    return found


def refuse_rest(words: Sequence[str], known: str) -> None:
    """Refuse words that nothing has taken; ValueError says what is known."""
    if words:
        raise ValueError(f"{words[0]!r} is unknown here; known are {known}")
