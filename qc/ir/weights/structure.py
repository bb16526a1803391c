"""How a product with a stored matrix is built of smaller products.

A format that is not read element by element says so with one of these, and every backend runs it
without knowing the format:

    Selected    y = W' x[index]              a term on some input channels
    Chain       y = W_n (... (W_1 x))        low rank, tensor trains
    Entries     y[row] += value x[column]    entries of each row one after the other: sparse
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qc.ir.weights.expression import Expr

if TYPE_CHECKING:
    from qc.ir.weights.weight import TermFormat


@dataclass(frozen=True)
class Part:
    """A matrix stored inside a term: its format, its shape [out, in], and the prefix of its
    arrays, which the term calls "prefix.array"."""

    prefix: str
    format: TermFormat
    shape: tuple[int, int]


@dataclass(frozen=True)
class Selected:
    """`part` multiplies the input channels index[0], index[1], ... (an array of the term)."""

    index: str
    part: Part


@dataclass(frozen=True)
class Step:
    """View a vector as [before, in, after] and turn it into [before, out, after] by `part`."""

    before: int
    part: Part
    after: int


@dataclass(frozen=True)
class Chain:
    """Steps in the order in which x goes through them."""

    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Entries:
    """Row `row` has the entries `start` to `stop` (over ROW). Entry ENTRY covers the input
    channels `column` to `column + width`, none beyond the last, with `value` (over ENTRY, and
    LANE below width)."""

    start: Expr
    stop: Expr
    column: Expr
    value: Expr
    width: int = 1


Structure = Selected | Chain | Entries
