"""In which order a graph is evaluated over many batches, and what must be kept between two steps.

Every step ends at values that somebody wants to see: the inputs of the linears of a group, say.
Between two steps only live values are kept, which in a stack of blocks is the residual stream and
a little beside it; so every node is computed once for all batches, and no more than a part of one
block is in memory. Nothing here knows what a block is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qc.ir import ops
from qc.ir.graph import Graph, topological_order
from qc.ir.node import Node


@dataclass(frozen=True, eq=False)
class Step:
    """Nodes to compute, in order; `wanted` are the values this step is for; `live` are those that
    later steps need; `parameters` are the stored tensors it reads."""

    nodes: tuple[Node, ...]
    wanted: tuple[Node, ...]
    parameters: tuple[Node, ...]
    live: tuple[Node, ...]


def plan_steps(wanted: Iterable[Sequence[Node]]) -> tuple[Step, ...]:
    """Return one step for each entry of `wanted`, which come in topological order."""
    done: set[Node] = set()
    parts: list[tuple[tuple[Node, ...], tuple[Node, ...]]] = []
    last_use: dict[Node, int] = {}
    for number, targets in enumerate(wanted):
        order = topological_order(targets, stop=done)
        fresh = tuple(n for n in order if n not in done and not is_parameter(n))
        for node in fresh:
            for operand in node.inputs:
                last_use[operand] = number
        done.update(fresh)
        parts.append((fresh, tuple(targets)))
    steps: list[Step] = []
    alive: dict[Node, None] = {}
    for number, (fresh, targets) in enumerate(parts):
        alive |= dict.fromkeys(fresh)
        alive = {node: None for node in alive if last_use.get(node, -1) > number}
        read = dict.fromkeys(i for node in fresh for i in node.inputs if is_parameter(i))
        steps.append(Step(fresh, targets, tuple(read), tuple(alive)))
    return tuple(steps)


def is_parameter(node: Node) -> bool:
    """Say whether a node is a stored tensor, which is decoded once for all batches."""
    return isinstance(node.op, ops.Parameter)


@dataclass(frozen=True, eq=False)
class LinearGroup:
    """Linears that read the same value `x` and are quantized from the same statistics."""

    x: Node
    linears: tuple[Node, ...]

    @property
    def parameters(self) -> tuple[Node, ...]:
        """The stored weights, once each."""
        return tuple(dict.fromkeys(linear.inputs[1] for linear in self.linears))


def linear_groups(graph: Graph, linears: Iterable[Node]) -> tuple[LinearGroup, ...]:
    """Group linears by what they read, in the order in which the graph computes it.

    A weight that several linears share is in the group of the first.
    """
    chosen = sorted(linears, key=graph.positions.__getitem__)
    readers: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    for linear in chosen:
        if linear.inputs[1] not in seen:
            readers.setdefault(linear.inputs[0], []).append(linear)
        seen.add(linear.inputs[1])
    ordered = sorted(readers, key=graph.positions.__getitem__)
    return tuple(LinearGroup(x, tuple(readers[x])) for x in ordered)
