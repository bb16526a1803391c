"""Index arithmetic: simplify // and % of sums of indices, knowing how far some indices go.

A kernel puts `step * 32 + 5` or `block * 16 + lane` in place of a column or a row; what then stays
of a format's shifts and remainders decides which loads are constant, vectors, or gathers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import gcd

from qc.ir.weights.expression import (
    Arith,
    Const,
    Expr,
    Index,
    arith,
    rebuild,
)

Sizes = Mapping[Index, int]
"""Index -> its values are 0 to size - 1; an index that is not there has no bound."""


@dataclass(frozen=True)
class Affine:
    """sum of factor * atom, plus a constant. An atom is an index, or a // or % of indices."""

    factors: tuple[tuple[Expr, int], ...] = ()
    constant: int = 0

    def plus(self, other: Affine, sign: int = 1) -> Affine:
        """Return self + sign * other."""
        found = dict(self.factors)
        for atom, factor in other.factors:
            found[atom] = found.get(atom, 0) + sign * factor
        kept = tuple((atom, factor) for atom, factor in found.items() if factor)
        return Affine(kept, self.constant + sign * other.constant)

    def times(self, factor: int) -> Affine:
        """Return self * factor."""
        if not factor:
            return Affine()
        return Affine(tuple((a, f * factor) for a, f in self.factors), self.constant * factor)

    def expression(self) -> Expr:
        """Return it as an expression, in one order whatever the order of the terms was."""
        total: Expr | None = None
        for atom, factor in sorted(self.factors, key=lambda each: str(each[0])):
            part = atom * factor
            total = part if total is None else total + part
        if total is None:
            return Const(self.constant)
        return total + self.constant if self.constant >= 0 else total - -self.constant


def simplify(expr: Expr, sizes: Sizes) -> Expr:
    """Simplify the index arithmetic in an expression; equal indices become equal expressions."""

    @cache
    def simplified(each: Expr) -> Expr:
        affine = affine_of(each, sizes)
        return rebuild(each, simplified) if affine is None else affine.expression()

    return simplified(expr)


def affine_of(expr: Expr, sizes: Sizes) -> Affine | None:
    """View an expression of indices alone as affine; None for anything else."""
    if not expr.counts:
        return None
    match expr:
        case Const(int(value)):
            return Affine((), value)
        case Index():
            return Affine(((expr, 1),))
        case Arith(kind, left, right):
            a, b = affine_of(left, sizes), affine_of(right, sizes)
            if a is not None and b is not None:
                return combined(kind, a, b, sizes)
    return None


def combined(kind: str, a: Affine, b: Affine, sizes: Sizes) -> Affine:
    """Apply one operation to affine values, which are never negative."""
    number = None if b.factors else b.constant
    match kind:
        case "add":
            return a.plus(b)
        case "sub":
            return a.plus(b, -1)
        case "mul" if number is not None:
            return a.times(number)
        case "mul" if not a.factors:
            return b.times(a.constant)
        case "shl" if number is not None:
            return a.times(1 << number)
        case "floordiv" if number is not None:
            return divided(a, number, sizes)[0]
        case "mod" if number is not None:
            return divided(a, number, sizes)[1]
        case "shr" if number is not None:
            return divided(a, 1 << number, sizes)[0]
        case "and" if number is not None and number & (number + 1) == 0:
            return divided(a, number + 1, sizes)[1]
    return Affine(((arith(kind, a.expression(), b.expression()), 1),))


def divided(value: Affine, by: int, sizes: Sizes) -> tuple[Affine, Affine]:
    """Return the quotient and the remainder of a value that is not negative."""
    whole = tuple((atom, f // by) for atom, f in value.factors if f % by == 0)
    rest = [(atom, f) for atom, f in value.factors if f % by]
    quotient = Affine(whole, value.constant // by)
    constant = value.constant % by
    bounded = [(atom, f) for atom, f in rest if isinstance(atom, Index) and atom in sizes and f > 0]
    free = [each for each in rest if each not in bounded]
    reach = sum(f * (sizes[atom] - 1) for atom, f in bounded if isinstance(atom, Index))
    step = gcd(by, *(f for _, f in free)) if free else by
    if constant % step + reach >= step:  # the bounded part may carry: keep everything together
        together = Affine(tuple(rest), constant).expression()
        return (
            quotient.plus(Affine(((together // by, 1),))),
            Affine(((together % by, 1),)),
        )
    low = Affine(tuple(bounded), constant % step)
    if not free:
        return quotient, low
    high = Affine(tuple((atom, f // step) for atom, f in free), constant // step).expression()
    return (
        quotient.plus(Affine(((high // (by // step), 1),))),
        Affine(((high % (by // step), step),)).plus(low),
    )


def depends_on(expr: Expr, index: Index) -> bool:
    """Say whether an expression reads an index."""
    return index in expr.indices
