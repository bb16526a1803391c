"""Read symbolic dimensions from text, such as "past + seq", evaluating nothing.

What `str` prints for a dimension is accepted, and little else: integers, names, + - * //, and
small powers of names. Sums are never multiplied, so that a short text cannot mean a long sum.
"""

from __future__ import annotations

import ast
import re

import sympy
from torch.utils._sympy.functions import FloorDiv

from qc.ir.types import Dim, as_dim, symbol

MOST_CHARACTERS = 400
MOST_NODES = 100
MOST_VALUE = 2**62
MOST_EXPONENT = 8


def parse_dim(text: str) -> Dim:
    """Return the dimension that `text` spells; ValueError quotes what is none."""
    refusal = ValueError(f"{text[:80]!r} is not a size (names, integers, + - * //)")
    if len(text) > MOST_CHARACTERS or not text.isascii():
        raise refusal
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise refusal from None
    if sum(1 for _ in ast.walk(tree)) > MOST_NODES:
        raise refusal
    return as_dim(read_tree(tree, refusal))


def read_tree(tree: ast.expr, refusal: ValueError) -> sympy.Expr:
    """Turn a syntax tree into an expression."""
    match tree:
        case ast.Constant(value=value) if type(value) is int and value < MOST_VALUE:
            return sympy.Integer(value)
        case ast.Name(id=name) if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -read_tree(operand, refusal)
        case ast.BinOp(left=ast.Name() as base, op=ast.Pow(), right=ast.Constant(value=power)) if (
            type(power) is int and 0 < power <= MOST_EXPONENT
        ):
            return read_tree(base, refusal) ** power
        case ast.BinOp(left=left, op=op, right=right):
            return combine(op, read_tree(left, refusal), read_tree(right, refusal), refusal)
    raise refusal


def combine(
    op: ast.operator, left: sympy.Expr, right: sympy.Expr, refusal: ValueError
) -> sympy.Expr:
    """Apply one operator to two expressions."""
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult() if not (left.is_Add or right.is_Add):
            return left * right
        case ast.FloorDiv() if right != 0:
            return FloorDiv(left, right)
    raise refusal
