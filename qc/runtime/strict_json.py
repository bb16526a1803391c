"""Parse JSON from files that may be corrupt or hostile, within bounds."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

from qc.errors import ArtifactError

__all__ = ["parse_object"]

_MOST_ELEMENTS = 4_000_000
"""Of all lists and objects together; a large model has some ten thousand."""


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """Parse `raw` as a JSON object; `what` names it in errors.

    Refuses duplicate names, NaN and infinities, text that is not UTF-8, and more elements than any
    real file has (counted before parsing, so that memory stays bounded). Raises ArtifactError.
    """
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > _MOST_ELEMENTS:
        raise ArtifactError(f"{what} holds more than {_MOST_ELEMENTS} elements")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = counts.most_common(1)[0][0]
            raise ArtifactError(f"{what} has the name {twice[:100]!r} twice")
        return result

    def refuse(constant: str) -> NoReturn:
        raise ArtifactError(f"{what} holds {constant}, which is not JSON")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{what} is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ArtifactError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise ArtifactError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{what} is not a JSON object")
    return value
