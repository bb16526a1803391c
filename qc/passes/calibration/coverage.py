"""What data the stored weights have seen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coverage:
    """What is known of one stored weight: the tokens it saw, and the share of its output that the
    error is (squares, on those tokens; None where it was not computed)."""

    tokens: int
    error: float | None = None
