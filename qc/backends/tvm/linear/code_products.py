"""A weight as products of what its code says and of what it shares with its neighbours.

    w[row, col] = sum over parts of  value(code) * group[row, segment] * column[block, col]

`value` reads the code of the element alone, and perhaps what a block of 16 outputs shares, such as
a table; `group` is the same in a segment of consecutive columns, `column` in a block of outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qc.backends.tvm.linear.layout import BLOCK, STEP
from qc.backends.tvm.linear.plan import BLOCK_INDEX
from qc.ir.weights.affine import simplify
from qc.ir.weights.expression import (
    COL,
    LANE,
    ROW,
    Arith,
    Code,
    Const,
    Expr,
    Index,
    ToFloat,
    arith,
    rebuild,
    substitute_indices,
    walk,
)
from qc.ir.weights.factored import is_float

CODE = Index("code")
"""Stands for the code of the element in `CodePart.value`."""

SEGMENTS = (STEP, STEP // 2, STEP // 4)
"""Columns that share a group factor, from the most desirable."""

MOST_PARTS = 4
"""A weight of more products than that is left to other rules: each is one more pass over x."""

TABLE_BITS = 4
"""Codes that one instruction looks up."""

INSIDE, SEGMENT = Index("inside"), Index("segment")


@dataclass(frozen=True)
class CodePart:
    """value * group * column; None is 1. `value` is over CODE and BLOCK_INDEX."""

    value: Expr | None
    group: Expr | None
    column: Expr | None

    @property
    def is_whole(self) -> bool:
        """Say whether the group factor is the same in all columns."""
        return self.group is None or COL not in self.group.indices


@dataclass(frozen=True)
class CodeProducts:
    """The parts of a weight, the one code that they read, and the columns of a segment."""

    parts: tuple[CodePart, ...]
    code: Code
    segment: int

    @property
    def value(self) -> Expr:
        """What the code says: one function in all parts that read it."""
        return next(part.value for part in self.parts if part.value is not None)


def code_products(decode: Expr, shape: tuple[int, int]) -> CodeProducts | None:
    """Take the decode expression of a matrix apart; None where it has another form."""
    decode = simplify(decode, dict(zip((ROW, COL), shape, strict=True)))
    code = own_code(decode)
    if code is None:
        return None
    products = expanded(replaced(decode, code), code.width > TABLE_BITS)
    if products is None or len(products) > MOST_PARTS:
        return None
    for segment in SEGMENTS:
        parts = [part_of(product, segment) for product in products]
        known = tuple(part for part in parts if part is not None)
        if len(known) == len(parts) and len({p.value for p in known} - {None}) == 1:
            return CodeProducts(known, code, segment)
    return None


def own_code(decode: Expr) -> Code | None:
    """Return the code that each element has for itself, side by side in its row."""
    found = [
        each
        for each in walk(decode)
        if isinstance(each, Code)
        and each.width <= 8
        and each.index == (ROW,)
        and simplify(each.position, {}) == simplify(COL * each.width, {})
    ]
    return found[0] if len(found) == 1 else None


def replaced(expr: Expr, code: Code) -> Expr:
    """Put CODE in place of a code."""
    return CODE if expr == code else rebuild(expr, lambda each: replaced(each, code))


def expanded(expr: Expr, wide: bool) -> list[tuple[Expr, ...]] | None:
    """Return an expression as a sum of products of factors, each with CODE or without.

    A difference of integers is taken apart where its right side is not known, and where codes are
    too `wide` for a table that has it.
    """
    if CODE not in expr.indices:
        return [factors_of(expr)]
    match expr:
        case Arith("add" | "sub" as kind, left, right) if is_float(expr):
            a, b = expanded(left, wide), expanded(right, wide)
            if a is None or b is None:
                return None
            return a + ([(*each, Const(-1.0)) for each in b] if kind == "sub" else b)
        case Arith("mul", left, right) if is_float(expr):
            a, b = expanded(left, wide), expanded(right, wide)
            if a is None or b is None:
                return None
            return [(*one, *other) for one in a for other in b]
        case ToFloat(Arith("sub", left, right)) if wide or block_shared(expr) is None:
            return expanded(arith("sub", ToFloat(left), ToFloat(right)), wide)
    return [(expr,)]


def factors_of(expr: Expr) -> tuple[Expr, ...]:
    """Return the factors of a product."""
    match expr:
        case Arith("mul", left, right) if is_float(expr):
            return (*factors_of(left), *factors_of(right))
    return (expr,)


def block_shared(expr: Expr) -> Expr | None:
    """Return what is the same in a block of 16 outputs and in all columns, over BLOCK_INDEX."""
    shared = in_block(expr)
    return None if {LANE, COL} & shared.indices else shared


def in_block(expr: Expr) -> Expr:
    """Return an expression of the outputs of a block."""
    return simplify(substitute_indices(expr, {ROW: BLOCK_INDEX * BLOCK + LANE}), {LANE: BLOCK})


def part_of(factors: Sequence[Expr], segment: int) -> CodePart | None:
    """Sort the factors of a product; None where one varies along both axes."""
    values, groups, columns = [], [], []
    for factor in factors:
        if CODE in factor.indices:
            shared = block_shared(factor)
            if shared is None:
                return None
            values.append(shared)
        elif in_segments(factor, segment):
            groups.append(factor)
        elif LANE not in in_block(factor).indices:
            columns.append(factor)
        else:
            return None
    return CodePart(product(values), product(groups), product(columns))


def in_segments(expr: Expr, segment: int) -> bool:
    """Say whether an expression is the same in `segment` consecutive columns."""
    moved = substitute_indices(expr, {COL: SEGMENT * segment + INSIDE})
    return INSIDE not in simplify(moved, {INSIDE: segment}).indices


def product(factors: Sequence[Expr]) -> Expr | None:
    """Multiply; None is 1."""
    found: Expr | None = None
    for factor in factors:
        found = factor if found is None else arith("mul", found, factor)
    return found
