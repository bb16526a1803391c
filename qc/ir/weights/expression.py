"""The decode language: how one element of a stored matrix is read.

A format writes its decoding once, as an `Expr` over the element's `row` and `col`; every backend
renders it. There is no control flow: about a dozen node kinds, all pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, reduce

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Expr:
    """An expression; operators build larger ones, ints become constants.

    Equal ones are equal by structure. They are keys of many tables, so what is asked of them there
    is worked out once, while what their operands answer is known: so a deep one needs no deep
    stack.
    """

    def __post_init__(self) -> None:
        for name in ("hashed", "indices", "reads", "counts"):
            getattr(self, name)

    @cached_property
    def key(self) -> tuple[object, ...]:
        """What equal expressions, and no others, have in common."""
        return (type(self), *(getattr(self, field.name) for field in fields(self)))

    @cached_property
    def hashed(self) -> int:
        return hash(self.key)

    def __hash__(self) -> int:
        return self.hashed

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Expr) and self.hashed == other.hashed and self.key == other.key

    @cached_property
    def operands(self) -> tuple[Expr, ...]:
        """The expressions that it is made of."""
        found: list[object] = []
        for part in self.key:
            found.extend(part if isinstance(part, tuple) else (part,))
        return tuple(each for each in found if isinstance(each, Expr))

    @cached_property
    def indices(self) -> frozenset[Index]:
        """All indices inside."""
        return frozenset[Index]().union(*(operand.indices for operand in self.operands))

    @cached_property
    def reads(self) -> bool:
        """Say whether it reads a stored array."""
        return any(operand.reads for operand in self.operands)

    @cached_property
    def counts(self) -> bool:
        """Say whether it is made of indices and integer constants alone."""
        return False

    def __add__(self, other: Expr | int) -> Expr:
        return arith("add", self, other)

    def __sub__(self, other: Expr | int) -> Expr:
        return arith("sub", self, other)

    def __mul__(self, other: Expr | int | float) -> Expr:
        return arith("mul", self, other)

    def __floordiv__(self, other: Expr | int) -> Expr:
        return self if other == 1 else arith("floordiv", self, other)

    def __mod__(self, other: Expr | int) -> Expr:
        return arith("mod", self, other)

    def __and__(self, other: Expr | int) -> Expr:
        return arith("and", self, other)

    def __or__(self, other: Expr | int) -> Expr:
        return arith("or", self, other)

    def __rshift__(self, other: Expr | int) -> Expr:
        return arith("shr", self, other)

    def __lshift__(self, other: Expr | int) -> Expr:
        return arith("shl", self, other)


@dataclass(frozen=True, eq=False)
class Index(Expr):
    """An integer that the reader knows (i32): the row or the column of the element, the number
    of a stored entry and the place inside it, or what a `Sum` counts."""

    axis: str

    @cached_property
    def counts(self) -> bool:
        return True

    @cached_property
    def indices(self) -> frozenset[Index]:
        return frozenset({self})

    def __str__(self) -> str:
        return self.axis


@dataclass(frozen=True, eq=False)
class Const(Expr):
    """An integer (i32) or a float (f32); 1 and 1.0 are not equal."""

    value: int | float

    @cached_property
    def key(self) -> tuple[object, ...]:
        return Const, type(self.value), self.value

    @cached_property
    def counts(self) -> bool:
        return isinstance(self.value, int)

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, eq=False)
class Load(Expr):
    """An element of a stored array; integers widen to i32, floats to f32."""

    array: str
    index: tuple[Expr, ...]

    @cached_property
    def reads(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"{self.array}[{', '.join(map(str, self.index))}]"


@dataclass(frozen=True, eq=False)
class Code(Expr):
    """The unsigned integer in `width` bits from bit `position` on of the bytes array[index, :].

    The bytes are a little-endian bit stream; a code may straddle two of them. 1 to 16 bits (i32).
    """

    array: str
    index: tuple[Expr, ...]
    position: Expr
    width: int

    @cached_property
    def reads(self) -> bool:
        return True

    def __str__(self) -> str:
        row = "".join(f"{i}, " for i in self.index)
        return f"{self.array}[{row}bits {self.position} for {self.width}]"


@dataclass(frozen=True, eq=False)
class Arith(Expr):
    """A binary operation on two i32 or two f32 values; comparisons give 0 or 1 (i32)."""

    kind: str
    left: Expr
    right: Expr

    @cached_property
    def counts(self) -> bool:
        return self.left.counts and self.right.counts

    def __str__(self) -> str:
        return f"({self.left} {SIGNS[self.kind]} {self.right})"


@dataclass(frozen=True, eq=False)
class ToFloat(Expr):
    """i32 -> f32, by value."""

    value: Expr

    def __str__(self) -> str:
        return f"float({self.value})"


@dataclass(frozen=True, eq=False)
class AsFloat(Expr):
    """i32 -> f32, the same 32 bits."""

    value: Expr

    def __str__(self) -> str:
        return f"bits_as_float({self.value})"


@dataclass(frozen=True, eq=False)
class AsHalf(Expr):
    """i32 -> f32: the low 16 bits are a float16, widened exactly."""

    value: Expr

    def __str__(self) -> str:
        return f"bits_as_half({self.value})"


@dataclass(frozen=True, eq=False)
class Sum(Expr):
    """The sum of `body` (f32) for `index` from `start` up to, not including, `stop`."""

    index: Index
    start: Expr
    stop: Expr
    body: Expr

    def __str__(self) -> str:
        return f"sum({self.index} in {self.start}..{self.stop}: {self.body})"


SIGNS = {
    "add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%",
    "and": "&", "or": "|", "shr": ">>", "shl": "<<", "min": "min", "eq": "==", "lt": "<",
}  # fmt: skip

ROW, COL = Index("row"), Index("col")
ENTRY, LANE = Index("entry"), Index("lane")


def as_expr(value: Expr | int | float) -> Expr:
    """Wrap a number."""
    return value if isinstance(value, Expr) else Const(value)


def arith(kind: str, left: Expr | int | float, right: Expr | int | float) -> Expr:
    """Build left `kind` right, folding integer constants and neutral ones."""
    left, right = as_expr(left), as_expr(right)
    match left, right:
        case Const(int(a)), Const(int(b)):
            return Const(int(ARITHMETIC[kind](torch.tensor(a), torch.tensor(b))))
        case _, Const(int(b)) if (kind, b) in NEUTRAL:
            return left
        case Const(int(a)), _ if (kind, a) in (("add", 0), ("mul", 1)):
            return right
    return Arith(kind, left, right)


NEUTRAL = {("add", 0), ("sub", 0), ("mul", 1), ("floordiv", 1), ("shr", 0), ("shl", 0)}


def minimum(left: Expr | int, right: Expr | int) -> Expr:
    """Build the smaller of two values."""
    return arith("min", left, right)


def equal(left: Expr | int, right: Expr | int) -> Expr:
    """Build 1 where two integers are equal, else 0."""
    return arith("eq", left, right)


def less(left: Expr | int, right: Expr | int) -> Expr:
    """Build 1 where `left` < `right`, else 0."""
    return arith("lt", left, right)


ARITHMETIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul,
    "floordiv": torch.floor_divide, "mod": torch.remainder,
    "and": torch.bitwise_and, "or": torch.bitwise_or,
    "shr": torch.bitwise_right_shift, "shl": torch.bitwise_left_shift, "min": torch.minimum,
    "eq": lambda a, b: (a == b).int(), "lt": lambda a, b: (a < b).int(),
}  # fmt: skip


@dataclass(frozen=True)
class TorchRendering:
    """Evaluate expressions for whole tensors of indices: the reference rendering.

    `indices` gives i32 tensors by axis; they broadcast against each other.
    """

    arrays: Mapping[str, Tensor]
    indices: Mapping[str, Tensor]

    @cached_property
    def seen(self) -> dict[Expr, Tensor]:
        return {}

    def value(self, expr: Expr) -> Tensor:
        """Return the values of `expr`, shared subexpressions computed once."""
        if expr not in self.seen:
            self.seen[expr] = self.compute(expr)
        return self.seen[expr]

    def compute(self, expr: Expr) -> Tensor:
        """Evaluate one node."""
        match expr:
            case Index(axis):
                return self.indices[axis]
            case Const(value):
                dtype = torch.int32 if isinstance(value, int) else torch.float32
                return torch.tensor(value, dtype=dtype)
            case Load(array, index):
                loaded = self.arrays[array][tuple(self.place(i) for i in index)]
                return loaded.float() if loaded.is_floating_point() else loaded.int()
            case Code():
                return self.code(expr)
            case ToFloat(inner):
                return self.value(inner).float()
            case AsFloat(inner):
                return self.value(inner).int().contiguous().view(torch.float32)
            case AsHalf(inner):
                return self.value(inner).to(torch.int16).view(torch.float16).float()
            case Arith(kind, left, right):
                return ARITHMETIC[kind](self.value(left), self.value(right))
            case Sum():
                return self.sum(expr)
        raise TypeError(f"{expr!r} is no expression of the decode language")

    def place(self, index: Expr) -> Tensor | int:
        """Return a place on an axis; numbers as they are, which arrays without values take, too."""
        match index:
            case Const(int(number)):
                return number
        return self.value(index).long()

    def code(self, expr: Code) -> Tensor:
        """Read packed bits."""
        position = self.value(expr.position)
        row = tuple(self.place(i) for i in expr.index)
        last = self.arrays[expr.array].shape[-1] - 1
        word = torch.zeros((), dtype=torch.int32)
        for byte in range((expr.width + 14) // 8):
            at = ((position >> 3) + byte).clamp_max(last).long()  # what lies behind is masked out
            word = word | (self.arrays[expr.array][(*row, at)].int() << (8 * byte))
        return (word >> (position & 7)) & ((1 << expr.width) - 1)

    def sum(self, expr: Sum) -> Tensor:
        """Add up the body over the widest range, where an element's own range includes it."""
        start, stop = self.value(expr.start), self.value(expr.stop)
        total = torch.zeros((), dtype=torch.float32)
        if not stop.numel() or not start.numel():
            return total
        for number in range(int(start.min()), int(stop.max())):
            at = torch.tensor(number, dtype=torch.int32)
            inner = TorchRendering(self.arrays, {**self.indices, expr.index.axis: at})
            inside = (start <= at) & (at < stop)
            total = total + torch.where(inside, inner.value(expr.body), torch.zeros(()))
        return total


def rebuild(expr: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """Copy an expression with `change` applied to its operands; arithmetic folds again."""
    match expr:
        case Load(array, index):
            return Load(array, tuple(map(change, index)))
        case Code(array, index, position, width):
            return Code(array, tuple(map(change, index)), change(position), width)
        case Arith(kind, left, right):
            return arith(kind, change(left), change(right))
        case ToFloat(inner):
            return ToFloat(change(inner))
        case AsFloat(inner):
            return AsFloat(change(inner))
        case AsHalf(inner):
            return AsHalf(change(inner))
        case Sum(index, start, stop, body):
            return Sum(index, change(start), change(stop), change(body))
    return expr


def rename_arrays(expr: Expr, prefix: str) -> Expr:
    """Put `prefix` before every array name, so that terms of a sum keep apart."""

    @cache
    def renamed(each: Expr) -> Expr:
        inner = rebuild(each, renamed)
        if isinstance(inner, Load | Code):
            return replace(inner, array=prefix + inner.array)
        return inner

    return renamed(expr)


def substitute_indices(expr: Expr, values: Mapping[Index, Expr]) -> Expr:
    """Put expressions in place of indices; an index that a `Sum` counts stays."""

    @cache
    def changed(each: Expr) -> Expr:
        if isinstance(each, Index):
            return values.get(each, each)
        return rebuild(each, changed)

    return changed(expr)


def total(parts: list[Expr]) -> Expr:
    """Add f32 expressions up."""
    return reduce(lambda a, b: a + b, parts)


def walk(expr: Expr) -> list[Expr]:
    """List all nodes of an expression once, operands after users."""
    found: dict[Expr, None] = {}
    stack = [expr]
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            stack.extend(node.operands)
    return list(found)


def is_structural(expr: Expr) -> bool:
    """Say whether reading one element needs a sum over a range."""
    return any(isinstance(each, Sum) for each in walk(expr))
