"""The reference interpreter: evaluate a graph in torch, one node at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from qc.errors import UnsupportedError
from qc.ir.device import CPU, computing_on, here, moved
from qc.ir.graph import Graph, topological_order
from qc.ir.node import Node
from qc.ir.ops import Input, Parameter
from qc.ir.types import DTYPE_NAMES


def bind_symbols(
    inputs: Iterable[Node], values: Mapping[str, Tensor], sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Read the size of every symbol off the shapes of `values`; ValueError where they clash."""
    bound = dict(sizes or {})
    for node in inputs:
        assert isinstance(node.op, Input)
        value, label = values[node.op.label], node.op.label
        if value.ndim != node.tensor.rank:
            raise ValueError(f"input {label} has shape {tuple(value.shape)}, expected {node.type}")
        for dim, size in zip(node.tensor.shape, value.shape, strict=True):
            expected: object = dim
            if isinstance(dim, sympy.Symbol):
                expected = bound.setdefault(dim.name, size)
            if isinstance(expected, int) and expected != size:
                raise ValueError(
                    f"input {label} has shape {tuple(value.shape)}, expected {node.type}"
                    + (f" with {dim} = {expected}" if expected is not dim else "")
                )
    return bound


@torch.no_grad()
def evaluate(
    graph: Graph,
    values: Mapping[str, Tensor],
    sizes: Mapping[str, int] | None = None,
    watch: Callable[[Node, Any], None] | None = None,
) -> dict[str, Any]:
    """Compute all outputs by name from inputs by label.

    `sizes` adds symbols that no input shape binds; `watch(node, value)` sees every value. Values
    are dropped after their last use. Computed on the device on which the inputs lie.
    """
    missing = [
        n.op.label for n in graph.inputs if isinstance(n.op, Input) and n.op.label not in values
    ]
    if missing:
        raise ValueError(f"missing input {missing[0]}")
    device = next((value.device for value in values.values()), CPU)
    with computing_on(device):
        results = evaluate_nodes(
            graph.outputs, values, bind_symbols(graph.inputs, values, sizes), watch
        )
    return dict(zip(graph.output_names, results, strict=True))


@torch.no_grad()
def evaluate_nodes(
    roots: tuple[Node, ...],
    values: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    watch: Callable[[Node, Any], None] | None = None,
    known: Mapping[Node, Any] | None = None,
) -> list[Any]:
    """Compute the values of `roots`; `known` gives values of nodes that need no computing."""
    computed: dict[Node, Any] = dict(known or {})
    order = topological_order(roots, stop=computed)
    remaining = dict.fromkeys(order, 0)
    for node in order:
        for operand in node.inputs if node not in computed else ():
            remaining[operand] += 1
    for root in roots:
        remaining[root] += 1
    for node in order:
        if node in computed:
            continue
        computed[node] = value_of(node, computed, values, sizes)
        if watch is not None:
            watch(node, computed[node])
        for operand in node.inputs:
            remaining[operand] -= 1
            if not remaining[operand]:
                computed[operand] = None
    return [computed[root] for root in roots]


def value_of(
    node: Node, computed: Mapping[Node, Any], values: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> Any:
    """Compute one node; UnsupportedError with its origin where torch refuses."""
    if isinstance(node.op, Input):
        value = values[node.op.label]
        if value.dtype != node.tensor.dtype:
            raise ValueError(
                f"input {node.op.label} is {DTYPE_NAMES.get(value.dtype, value.dtype)}, "
                f"expected {node.type}"
            )
        return value
    if isinstance(node.op, Parameter) and here() != CPU:
        place = here()
        with computing_on(CPU):  # where weights are stored
            return moved(node.op.meaning(sizes=sizes), place)
    try:
        return node.op.meaning(*(computed[i] for i in node.inputs), sizes=sizes)
    except (RuntimeError, AttributeError, TypeError, LookupError) as error:
        where = f" at {node.origin}" if node.origin.module else ""
        raise UnsupportedError(f"torch could not compute {node.op}{where}: {error}") from error
