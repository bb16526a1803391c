"""A graph: inputs and outputs. Everything between them hangs on the outputs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import networkx as nx
from torch import fx

from qc.ir.node import Node
from qc.ir.ops import Input, Parameter


@dataclass(frozen=True, eq=False)
class Graph:
    """An immutable dataflow graph. `inputs` are Input nodes in call order; `output_names` name
    the outputs ("logits", "present_key_0", ...)."""

    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    output_names: tuple[str, ...]

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes that the outputs need, operands before users, inputs first."""
        return topological_order((*self.inputs, *self.outputs))

    @cached_property
    def users(self) -> Mapping[Node, tuple[Node, ...]]:
        """The nodes that read each node, once each, in topological order."""
        users: dict[Node, dict[Node, None]] = {node: {} for node in self.nodes}
        for node in self.nodes:
            for operand in node.inputs:
                users[operand][node] = None
        return {node: tuple(reading) for node, reading in users.items()}

    @cached_property
    def positions(self) -> Mapping[Node, int]:
        """The number of each node in topological order; names like %12 come from it."""
        return {node: position for position, node in enumerate(self.nodes)}

    @property
    def parameters(self) -> tuple[Node, ...]:
        """The stored tensors."""
        return tuple(node for node in self.nodes if isinstance(node.op, Parameter))

    def input(self, label: str) -> Node:
        """Return the input called `label`; KeyError otherwise."""
        found = {n.op.label: n for n in self.inputs if isinstance(n.op, Input)}
        return found[label]

    def output(self, name: str) -> Node:
        """Return the output called `name`; KeyError otherwise."""
        return dict(zip(self.output_names, self.outputs, strict=True))[name]

    def with_outputs(self, outputs: Iterable[Node]) -> Graph:
        """Return a graph with the same signature and other values behind it."""
        return replace(self, outputs=tuple(outputs))

    def same_as(self, other: Graph) -> bool:
        """Say whether both graphs compute the same thing by the same ops (origins aside)."""
        if len(self.inputs) != len(other.inputs) or self.output_names != other.output_names:
            return False
        own, others = ((*graph.inputs, *graph.outputs) for graph in (self, other))
        return structure_of(own) == structure_of(others)

    def to_networkx(self) -> nx.MultiDiGraph[Node]:
        """Return the graph for matching, partitioning and cuts; nodes are `Node` objects, edges
        carry the operand `index`."""
        view: nx.MultiDiGraph[Node] = nx.MultiDiGraph()
        view.add_nodes_from(self.nodes)
        for node in self.nodes:
            for index, operand in enumerate(node.inputs):
                view.add_edge(operand, node, index=index)
        return view

    def to_fx(self) -> fx.GraphModule:
        """Return the graph as a module of torch.fx, through which gradients flow."""
        from qc.ir.to_fx import to_fx  # to_fx.py translates graphs, so it imports this file

        return to_fx(self)

    def __str__(self) -> str:
        from qc.ir.text import graph_text  # text.py prints graphs, so it imports this file

        return graph_text(self)


def topological_order(roots: Iterable[Node], stop: Container[Node] = ()) -> tuple[Node, ...]:
    """Order everything that `roots` need, operands first, without recursion and without what
    lies behind the nodes in `stop`."""
    order: dict[Node, None] = {}
    stack: list[tuple[Node, bool]] = [(root, False) for root in reversed(tuple(roots))]
    while stack:
        node, operands_done = stack.pop()
        if node in order:
            continue
        if operands_done:
            order[node] = None
            continue
        stack.append((node, True))
        if node not in stop:
            stack.extend((operand, False) for operand in reversed(node.inputs))
    return tuple(order)


def structure_of(roots: tuple[Node, ...]) -> list[object]:
    """Describe nodes by ops, types and operand numbers, for comparison; weights by formats."""
    order = topological_order(roots)
    number = {node: i for i, node in enumerate(order)}
    described: list[object] = [
        (str(node.op), node.op.structure, node.type, tuple(number[i] for i in node.inputs))
        for node in order
    ]
    return [*described, tuple(number[root] for root in roots)]


def map_nodes(graph: Graph, transform: Callable[[Node, tuple[Node, ...]], Node]) -> Graph:
    """Rebuild `graph` bottom up: `transform(node, rebuilt inputs)` gives each node's successor."""
    rebuilt: dict[Node, Node] = {}
    for node in graph.nodes:
        rebuilt[node] = transform(node, tuple(rebuilt[i] for i in node.inputs))
    inputs = tuple(rebuilt[node] for node in graph.inputs)
    return Graph(inputs, tuple(rebuilt[node] for node in graph.outputs), graph.output_names)
