"""The weights of a step as sums of shared factors: what a product need not do for every weight.

    w_u = sum over parts of  factor * value_u        u: the columns of a step

A scale that all columns of a step share multiplies the sum of their products once; a minimum
multiplies the sum of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qc.ir.weights.affine import Sizes, simplify
from qc.ir.weights.expression import (
    COL,
    Arith,
    AsFloat,
    AsHalf,
    Const,
    Expr,
    Index,
    Load,
    ToFloat,
    arith,
    substitute_indices,
)

STEP = Index("step")


@dataclass(frozen=True)
class FormPart:
    """factor * values: `factor` None is 1, `values` None is 1 in every column."""

    factor: Expr | None
    values: tuple[Expr, ...] | None


def columns_of_step(decode: Expr, first: Expr, width: int, sizes: Sizes) -> list[Expr]:
    """Return the decode expressions of `width` columns from `first` on, simplified."""
    return [
        simplify(substitute_indices(decode, {COL: first + column}), sizes)
        for column in range(width)
    ]


def factored(columns: Sequence[Expr]) -> list[FormPart]:
    """Take apart what the columns of a step share; parts of one factor are joined."""
    parts: dict[Expr | None, list[tuple[Expr, ...] | None]] = {}
    for part in split(tuple(columns)):
        parts.setdefault(part.factor, []).append(part.values)
    found = []
    for factor, values in parts.items():
        several = [v for v in values if v is not None]
        found += [FormPart(factor, None)] * (len(values) - len(several))
        if several:
            joined = tuple(added(each) for each in zip(*several, strict=True))
            found.append(FormPart(factor, joined))
    return found


def added(values: Sequence[Expr]) -> Expr:
    """Add up several values of a column."""
    whole = values[0]
    for value in values[1:]:
        whole = whole + value
    return whole


def split(columns: tuple[Expr, ...]) -> list[FormPart]:
    """Split expressions that have one shape into parts."""
    first = columns[0]
    if all(each == first for each in columns) and is_float(first):
        return [FormPart(first, None)]
    if all(isinstance(each, Arith) for each in columns) and is_float(first):
        kinds = {each.kind for each in columns if isinstance(each, Arith)}
        lefts = tuple(each.left for each in columns if isinstance(each, Arith))
        rights = tuple(each.right for each in columns if isinstance(each, Arith))
        if kinds == {"mul"} and len(set(rights)) == 1:
            return [times(part, rights[0]) for part in split(lefts)]
        if kinds == {"mul"} and len(set(lefts)) == 1:
            return [times(part, lefts[0]) for part in split(rights)]
        if kinds == {"add"}:
            return split(lefts) + split(rights)
        if kinds == {"sub"}:
            return split(lefts) + [times(part, Const(-1.0)) for part in split(rights)]
    inner = tuple(difference(each) for each in columns)
    if all(each is not None for each in inner):
        lefts = tuple(ToFloat(each[0]) for each in inner if each is not None)
        rights = tuple(ToFloat(each[1]) for each in inner if each is not None)
        if len(set(rights)) == 1:
            right = folded(rights[0])
            return [FormPart(None, lefts), times(FormPart(right, None), Const(-1.0))]
    return [FormPart(None, columns)]


def difference(expr: Expr) -> tuple[Expr, Expr] | None:
    """View float(a - b) as (a, b)."""
    match expr:
        case ToFloat(Arith("sub", left, right)):
            return left, right
    return None


def folded(expr: Expr) -> Expr:
    """Turn float(constant) into a constant."""
    match expr:
        case ToFloat(Const(int(value))):
            return Const(float(value))
    return expr


def times(part: FormPart, factor: Expr) -> FormPart:
    """Multiply a part by something that all columns share."""
    if part.factor is None:
        return FormPart(factor, part.values)
    match part.factor, factor:
        case Const(float(a)), Const(float(b)):
            return FormPart(Const(a * b), part.values)
    return FormPart(arith("mul", part.factor, factor), part.values)


def is_float(expr: Expr) -> bool:
    """Say whether arithmetic on an expression is in float32, as far as its form tells."""
    match expr:
        case Arith(_, left, right):
            return is_float(left) or is_float(right)
        case Load() | ToFloat() | AsFloat() | AsHalf() | Const(float()):
            return True
    return not isinstance(expr, Index | Const)
