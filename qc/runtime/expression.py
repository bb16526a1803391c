"""Read the small integer expressions of a manifest: "batch * seq", "(context + 15) // 16".

Integers, names, + - * //, unary minus, parentheses and small constant powers; nothing else is
accepted, and nothing is ever evaluated as Python.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from qc.errors import ArtifactError

__all__ = ["Expression", "is_symbol_name", "parse_expression"]

_MOST_CHARACTERS = 400
_MOST_NODES = 100
_MOST_VALUE = 2**62
_MOST_EXPONENT = 4

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}

Evaluate = Callable[[Mapping[str, int]], int]


@dataclass(frozen=True, slots=True)
class Expression:
    """Hold an expression, ready to be evaluated."""

    text: str
    symbols: frozenset[str]
    evaluate: Evaluate

    def __call__(self, values: Mapping[str, int]) -> int:
        """Return the value for these symbols. Raises ArtifactError if there is none."""
        try:
            result = self.evaluate(values)
        except ZeroDivisionError:
            raise ArtifactError(f'"{self.text}" divides by zero') from None
        except KeyError as error:
            raise ArtifactError(f'"{self.text}": this call gives no size {error}') from None
        if not -_MOST_VALUE < result < _MOST_VALUE:
            raise ArtifactError(f'"{self.text}" is out of range')
        return result

    @property
    def is_symbol(self) -> bool:
        """Whether this is one bare symbol."""
        return self.text in self.symbols


def is_symbol_name(text: object) -> bool:
    """Whether `text` may name a symbol."""
    return isinstance(text, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", text) is not None


@lru_cache(maxsize=4096)
def parse_expression(text: str | int) -> Expression:
    """Parse an integer or an expression string. Raises ArtifactError that quotes it."""
    if isinstance(text, int):
        value = int(text)
        if not -_MOST_VALUE < value < _MOST_VALUE:
            raise ArtifactError(f"the integer {value:.3e} is out of range")
        return Expression(str(value), frozenset(), lambda _: value)
    refusal = ArtifactError(
        f"{text[:80]!r} is not an integer expression (names, integers, + - * //)"
    )
    if len(text) > _MOST_CHARACTERS or not text.isascii():
        raise refusal
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise refusal from None
    nodes = list(ast.walk(tree))
    if len(nodes) > _MOST_NODES:
        raise refusal
    evaluate = _compile(tree, refusal)
    symbols = frozenset(node.id for node in nodes if isinstance(node, ast.Name))
    return Expression(text.strip(), symbols, evaluate)


def _compile(node: ast.expr, refusal: ArtifactError) -> Evaluate:
    """Turn a checked syntax tree into nested closures."""
    match node:
        case ast.Constant(value=value) if type(value) is int and value < _MOST_VALUE:
            return lambda _: value
        case ast.Name(id=name) if is_symbol_name(name):
            return lambda values: values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _compile(operand, refusal)
            return lambda values: -inner(values)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=exponent)) if (
            type(exponent) is int and 0 <= exponent <= _MOST_EXPONENT
        ):
            base = _compile(left, refusal)
            return lambda values: int(base(values) ** exponent)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            apply = _OPERATORS[type(op)]
            first, second = _compile(left, refusal), _compile(right, refusal)
            return lambda values: apply(first(values), second(values))
    raise refusal
