"""Values that depend on sizes only: evaluate them at several sizes to find out what they are.

Masks and positions reach the graph as dozens of small integer nodes that differ from release to
release of a model library. Their meaning does not: it is decided here by computing them. A large
constant (a window of 4096 positions) cannot show at small sizes, so it is replaced by a small
one, which makes its role visible and cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from qc.errors import UnsupportedError
from qc.ir import ops
from qc.ir.graph import topological_order
from qc.ir.meaning import evaluate_nodes
from qc.ir.node import Node, make
from qc.ir.types import Dim

SMALL = 64
"""Constants up to this are tried at sizes beyond them; larger ones are replaced."""
STAND_IN = 5
"""What a large constant is replaced by: smaller than most trial sizes, unlike other constants."""
LARGEST_TABLE = 4096
"""Sizes up to this are evaluated as they are where a shape depends on them."""
UNBOUNDED = 2**31
"""Constants from here on mean "to the end"; no sequence is that long."""
LENGTHS = (2, 3, 4, 7, 12, 23)
"""Trial sizes of the sequence. Captured graphs may rely on sizes of at least 2."""


@dataclass(frozen=True)
class Trial:
    """Sizes to evaluate at, and which constant is replaced by `STAND_IN` there."""

    sizes: Mapping[str, int]
    replaced: int | None = None

    def constant(self, value: int) -> int:
        """Return what `value` is in this trial."""
        return STAND_IN if value == self.replaced else value


@dataclass(frozen=True)
class SizeFunctions:
    """Remembers which nodes depend on sizes only. `sequence` are the symbols that lengths of
    sequences are made of; other symbols get small sizes of their own."""

    sequence: frozenset[str]
    known: dict[Node, bool]

    def contains(self, node: Node) -> bool:
        """Say whether no input of the graph reaches `node`."""
        for each in topological_order((node,), stop=self.known):
            if each not in self.known:
                inner = all(self.known[i] for i in each.inputs)
                self.known[each] = inner and not isinstance(each.op, ops.Input)
        return self.known[node]

    def trials(self, root: Node) -> list[Trial] | None:
        """Return the trials that tell what `root` is; None where that would take large ones."""
        constants = constants_of(root)
        lengths = {*LENGTHS, *(2 * c + 3 for c in constants if STAND_IN < c <= SMALL)}
        tables = {d for d in shape_constants(root) if d > max(LENGTHS)}
        if any(d > LARGEST_TABLE for d in tables):
            return None
        symbols = symbols_of(root)
        trials = [Trial(self.sizes(symbols, n, i)) for i, n in enumerate(sorted(lengths))]
        if symbols & self.sequence:
            trials += [Trial(self.sizes(symbols, d, 0)) for d in sorted(tables)]
            for constant in sorted(c for c in constants if c > SMALL):
                trials += [Trial(self.sizes(symbols, n, 0), constant) for n in (7, 12, 23)]
        return trials

    def sizes(self, symbols: Iterable[str], length: int, number: int) -> dict[str, int]:
        """Choose sizes: `length` for sequences, 2 or 3 for everything else."""
        named = {*symbols, *self.sequence}
        return {s: length if s in self.sequence else 2 + number % 2 for s in named}

    def value(self, root: Node, trial: Trial) -> Tensor | None:
        """Evaluate `root`; None where torch refuses these sizes."""
        if trial.replaced is not None:
            root = with_constant(root, trial.replaced, STAND_IN)
        try:
            value = evaluate_nodes((root,), {}, trial.sizes)[0]
        except (UnsupportedError, IndexError, ValueError):
            return None  # such as a replaced constant that was a shape after all
        return value if isinstance(value, Tensor) else None


def sequence_symbols(dims: Iterable[Dim]) -> frozenset[str]:
    """Return the names of the symbols in `dims`."""
    return frozenset(s.name for d in dims if not isinstance(d, int) for s in d.free_symbols)


def attributes_of(node: Node) -> list[Any]:
    """List all attributes of a node's op, lists and templates flattened."""
    return [leaf for f in fields(node.op) for leaf in leaves(getattr(node.op, f.name))]


def leaves(value: Any) -> list[Any]:
    """Flatten nested tuples and lists."""
    if isinstance(value, tuple | list):
        return [leaf for each in value for leaf in leaves(each)]
    return [value]


def symbols_of(root: Node) -> set[str]:
    """Return the names of all size symbols that the subgraph mentions."""
    found: set[str] = set()
    for node in topological_order((root,)):
        shapes = leaves(getattr(node.type, "shape", ()))
        for value in (*attributes_of(node), *shapes):
            if isinstance(value, sympy.Expr):
                found |= {s.name for s in value.free_symbols if isinstance(s, sympy.Symbol)}
    return found


def constants_of(root: Node) -> set[int]:
    """Return the absolute integer constants that the subgraph computes with."""
    values = (v for n in topological_order((root,)) for v in computed_constants(n))
    return {abs(int(v)) for v in values if 1 < abs(v) < UNBOUNDED and v == int(v)}


def computed_constants(node: Node) -> list[float]:
    """List the numbers among a node's attributes that are operands."""
    if isinstance(node.op, ops.Scalar | ops.Full):
        found: list[Any] = [node.op.value]
    elif isinstance(node.op, ops.Torch):
        found = leaves((node.op.args, [value for _, value in node.op.kwargs]))
    else:
        return []
    return [v for v in found if isinstance(v, int | float) and not isinstance(v, bool)]


def shape_constants(root: Node) -> set[int]:
    """Return the integers in the shapes of the subgraph, also inside of expressions."""
    found: set[int] = set()
    for node in topological_order((root,)):
        for dim in leaves(getattr(node.type, "shape", ())):
            atoms = [dim] if isinstance(dim, int) else dim.atoms(sympy.Integer)
            found |= {abs(int(a)) for a in atoms}
    return found


def with_constant(root: Node, old: int, new: int) -> Node:
    """Rebuild a subgraph with another value for one of its constants, whatever its sign."""
    rebuilt: dict[Node, Node] = {}
    for node in topological_order((root,)):
        inputs = tuple(rebuilt[i] for i in node.inputs)
        op = op_with_constant(node.op, lambda v: replaced_number(v, old, new))
        rebuilt[node] = make(op, *inputs, origin=node.origin)
    return rebuilt[root]


def op_with_constant(op: Any, change: Callable[[Any], Any]) -> Any:
    """Return an op with its computed constants changed."""
    if isinstance(op, ops.Scalar | ops.Full):
        return replace(op, value=change(op.value))
    if isinstance(op, ops.Torch):
        kwargs = tuple((name, mapped(value, change)) for name, value in op.kwargs)
        return replace(op, args=mapped(op.args, change), kwargs=kwargs)
    return op


def mapped(template: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every leaf of nested tuples and lists."""
    if isinstance(template, tuple | list):
        return tuple(mapped(each, change) for each in template)
    return change(template)


def replaced_number(value: Any, old: int, new: int) -> Any:
    """Return +-new for +-old in the type of the number, and everything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) != old:
        return value
    return type(value)(new if value > 0 else -new)


def is_integer(node: Node) -> bool:
    """Say whether a node has one result of an integer type."""
    dtype = getattr(node.type, "dtype", None)
    return isinstance(dtype, torch.dtype) and dtype in (torch.int64, torch.int32)
