"""Rewriting: pure rules from node to node, applied bottom up until nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from qc.errors import VerificationError
from qc.ir.graph import Graph, map_nodes
from qc.ir.node import Node, make

Rule = Callable[[Node], "Node | None"]
"""node -> its replacement of the same type, or None: "not mine"."""


def with_inputs(node: Node, inputs: tuple[Node, ...]) -> Node:
    """Return `node` reading `inputs`; itself where they are the same."""
    if all(old is new for old, new in zip(node.inputs, inputs, strict=True)):
        return node
    return make(node.op, *inputs, origin=node.origin)


def rewrite(graph: Graph, rules: Sequence[Rule], name: str = "", rounds: int = 64) -> Graph:
    """Apply `rules` to every node, first match wins, until a fixed point.

    A replacement must have the type of what it replaces; VerificationError otherwise, and where
    `rounds` rounds reach no fixed point. `name` is noted in the origin of replacements.
    """
    for _ in range(rounds):
        changed = False

        def transform(node: Node, inputs: tuple[Node, ...]) -> Node:
            nonlocal changed
            current = with_inputs(node, inputs)
            for rule in rules:
                replacement = rule(current)
                if replacement is not None and replacement is not current:
                    check_replacement(current, replacement, name)
                    changed = True
                    return mark(replacement, current, name)
            return current

        graph = map_nodes(graph, transform)
        if not changed:
            return graph
    raise VerificationError(f"{name or 'a rewrite'} reached no fixed point in {rounds} rounds")


def check_replacement(before: Node, after: Node, name: str) -> None:
    """Refuse a replacement of another type."""
    if before.type != after.type:
        raise VerificationError(
            f"{name or 'a rule'} replaced {before.op} : {before.type} by {after.op} : "
            f"{after.type}, which is another type (at {before.origin})"
        )


def mark(node: Node, replaced: Node, name: str) -> Node:
    """Give a replacement the origin of what it replaces and note the pass; leaves are shared and
    stay as they are."""
    if not name or not node.inputs:
        return node
    origin = node.origin if node.origin.module else replaced.origin
    return replace(node, origin=origin.touched_by(name))


def substitute(graph: Graph, replacements: Mapping[Node, Node]) -> Graph:
    """Replace nodes by others. A replacement may read the node that it replaces (which stays
    behind it) and anything that the graph computes before that node. New nodes that several
    replacements share stay shared."""
    final: dict[Node, Node] = {}
    shared: dict[Node, Node] = {}
    for node in graph.nodes:
        plain = with_inputs(node, tuple(final[i] for i in node.inputs))
        final[node] = plain
        if node in replacements:
            final[node] = rebuild_over(replacements[node], final, shared)
    inputs = tuple(final[node] for node in graph.inputs)
    return Graph(inputs, tuple(final[n] for n in graph.outputs), graph.output_names)


def rebuild_over(root: Node, known: Mapping[Node, Node], rebuilt: dict[Node, Node]) -> Node:
    """Rebuild the tree under `root` down to the nodes in `known`, which become their images;
    `rebuilt` remembers what has been rebuilt."""
    stack = [root]
    while stack:
        node = stack[-1]
        if node in known or node in rebuilt:
            stack.pop()
            continue
        waiting = [i for i in node.inputs if i not in known and i not in rebuilt]
        if waiting:
            stack.extend(waiting)
            continue
        operands = tuple(known[i] if i in known else rebuilt[i] for i in node.inputs)
        rebuilt[node] = with_inputs(node, operands)
        stack.pop()
    return known[root] if root in known else rebuilt[root]
