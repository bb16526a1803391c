"""What formats that store a part of a matrix share: positions, shares of a whole, inner terms."""

from __future__ import annotations

from decimal import Decimal
from itertools import count as numbers

import torch
from torch import Tensor

from qc.ir.weights.expression import Expr, Index, walk
from qc.ir.weights.weight import Term

MILLION = 1_000_000
"""Shares are whole parts per million: how many entries a share is must not depend on rounding."""


def share_of(per_million: int, size: int) -> int:
    """Return how many of `size` a share is, rounded up."""
    return -(-per_million * size // MILLION)


def check_share(per_million: int) -> None:
    """Refuse a share that is nothing, or more than all; ValueError."""
    if not 0 < per_million <= MILLION:
        raise ValueError(f"a share lies above 0% and up to 100%, not at {percent(per_million)}")


def percent(per_million: int) -> str:
    """Print a share: 0.5%."""
    return f"{Decimal(per_million).scaleb(-4).normalize():f}%"


def parse_percent(digits: str) -> int:
    """Read the number before a % exactly; ValueError where it is finer than shares are."""
    per_million = Decimal(digits).scaleb(4)
    if per_million != int(per_million):
        raise ValueError(f"{digits}% is finer than 0.0001%")
    return int(per_million)


def index_dtype(size: int) -> torch.dtype:
    """Return the integers that hold a position below `size`: 2 bytes up to 32768, else 4."""
    return torch.int16 if size <= 1 << 15 else torch.int32


def largest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` largest scores, bool of the same shape; of equal ones the first."""
    flat = scores.flatten()
    if count >= len(flat):
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(len(flat) - count + 1).values
    chosen = flat > threshold
    equal = (flat == threshold).nonzero().flatten()
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen.view(scores.shape)


def row_starts(chosen: Tensor) -> Tensor:
    """Return where the entries of each row start, and where the last ends: i32[rows + 1]."""
    ends = chosen.sum(1).cumsum(0)
    return torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)


def entry_rows(starts: Tensor) -> Tensor:
    """Invert `row_starts`: the row of every entry, i64."""
    return torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(
        starts.diff().long()
    )


def verify_starts(starts: Tensor, entries: int) -> None:
    """Refuse row starts that do not lead from 0 to `entries`; ValueError."""
    if int(starts[0]) != 0 or int(starts[-1]) != entries:
        raise ValueError(
            f"array 'starts' leads from {int(starts[0])} to {int(starts[-1])}, "
            f"expected from 0 to {entries}, the number of entries"
        )
    # i64: the difference of two hostile i32 need not be one
    if bool((starts.long().diff() < 0).any()):
        raise ValueError("array 'starts' decreases: each row starts where the one before it ends")


def verify_positions(name: str, positions: Tensor, size: int, starts: Tensor | None = None) -> None:
    """Refuse positions outside 0 to `size`, and those that do not increase within a row that
    `starts` names (without: all along); ValueError."""
    wide = positions.long()
    outside = wide[(wide < 0) | (wide >= size)]
    if len(outside):
        raise ValueError(f"array {name!r} holds {int(outside[0])}, expected 0 to {size - 1}")
    increases = wide.diff() > 0
    if starts is not None:
        first = torch.zeros(len(wide) + 1, dtype=torch.bool)
        first[starts.long()] = True
        increases |= first[1 : len(wide)]
    if not bool(increases.all()):
        raise ValueError(f"array {name!r} is not sorted, or names a position twice")


def unused_index(name: str, *within: Expr) -> Index:
    """Return an index for a `Sum` that none of these expressions reads: `name`, or `name2`, ..."""
    used = {each.axis for expr in within for each in walk(expr) if isinstance(each, Index)}
    if name not in used:
        return Index(name)
    return Index(next(f"{name}{n}" for n in numbers(2) if f"{name}{n}" not in used))


def arrays_of(**terms: Term) -> dict[str, Tensor]:
    """Return the arrays of inner terms under the names that `nested` gives them."""
    return {
        f"{prefix}.{name}": array
        for prefix, term in terms.items()
        for name, array in term.arrays().items()
    }
