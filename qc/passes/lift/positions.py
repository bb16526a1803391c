"""Turn positions that are computed in a roundabout way into Arange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.types import Dim
from qc.passes.lift.size_functions import SizeFunctions, is_integer, sequence_symbols
from qc.passes.pipeline import Context, Pass


@dataclass(frozen=True)
class LiftPositions(Pass):
    """Replace integers that count along one axis by an Arange.

        cumsum(full[batch, seq](1)) - 1 + 2   -->  expand[batch, seq](arange(seq, start=2))
        expand(table of zeros)[:seq]          -->  full[1, seq](0)

    Whether integers count, or are all the same, is decided by evaluating them at several sizes.
    Only the last integers before something else reads them are looked at. Exact.
    Positions: Vaswani et al. 2017, section 3.5.
    """

    name: ClassVar[str] = "lift_positions"

    def run(self, graph: Graph, context: Context) -> Graph:
        lengths = [d for n in graph.inputs for d in n.tensor.shape[1:]]
        functions = SizeFunctions(sequence_symbols(lengths), {})
        replacements: dict[Node, Node] = {}
        for node in graph.nodes:
            if is_last_integer(node, graph, functions):
                counted = explain_positions(node, functions)
                if counted is not None:
                    replacements[node] = counted
        return substitute(graph, replacements) if replacements else graph


def is_last_integer(node: Node, graph: Graph, functions: SizeFunctions) -> bool:
    """Say whether a node is the end of integer arithmetic on sizes."""
    if not is_integer(node) or not node.inputs or not functions.contains(node):
        return False
    readers = graph.users[node]
    return node in graph.outputs or any(not is_inner_reader(r, functions) for r in readers)


def is_inner_reader(reader: Node, functions: SizeFunctions) -> bool:
    """Say whether a reader goes on with integers that depend on sizes only."""
    discrete = is_integer(reader) or getattr(reader.type, "dtype", None) == torch.bool
    return discrete and functions.contains(reader)


def explain_positions(node: Node, functions: SizeFunctions) -> Node | None:
    """Return what a node counts, as Arange or Full in its type; None if it does neither."""
    axes = [i for i, d in enumerate(node.tensor.shape) if isinstance(d, sympy.Symbol)
            and d.name in functions.sequence]  # fmt: skip
    trials = functions.trials(node)
    if len(axes) != 1 or trials is None or node.tensor.dtype != torch.int64:
        return None
    values = [functions.value(node, trial) for trial in trials]
    known = [value for value in values if value is not None]
    true = [v for v, trial in zip(values, trials, strict=True) if trial.replaced is None]
    if len(known) < len(values) or len({int(v.flatten()[0]) for v in true if v is not None}) != 1:
        return None
    first = int(known[0].flatten()[0])
    if all(counts(value, axes[0]) for value in known):
        built = broadcast_arange(node, axes[0], first)
        return None if is_same_tree(built, node) else built
    if all(bool((value == value.flatten()[0]).all()) for value in known):
        return make(ops.Full(node.tensor.shape, first, torch.int64), origin=node.origin)
    return None


def counts(value: torch.Tensor, axis: int) -> bool:
    """Say whether a value is its first element plus the index along `axis`, everywhere."""
    shape = [1] * value.ndim
    shape[axis] = value.shape[axis]
    steps = torch.arange(value.shape[axis]).reshape(shape)
    return bool((value == value.flatten()[0] + steps).all())


def broadcast_arange(node: Node, axis: int, start: int) -> Node:
    """Return an Arange as [1, .., length, .., 1], expanded to the shape of `node`."""
    shape = node.tensor.shape
    single: tuple[Dim, ...] = tuple(d if i == axis else 1 for i, d in enumerate(shape))
    counted = make(ops.Arange(shape[axis], start), origin=node.origin)
    if len(shape) > 1:
        counted = make(ops.Reshape(single), counted)
    return counted if single == shape else make(ops.Expand(shape), counted)


def is_same_tree(built: Node, node: Node) -> bool:
    """Say whether two chains of single-operand nodes are the same."""
    if built.op != node.op or len(built.inputs) != len(node.inputs):
        return False
    return all(is_same_tree(a, b) for a, b in zip(built.inputs, node.inputs, strict=True))
