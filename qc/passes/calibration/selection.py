"""Which linears a pass works on: selectors, each of which must match something.

linears              all of them
head                 those whose result is an output of the graph, such as the logits
model.layers.*.mlp   a path in the user's model, or a part of one with * and ?
re:.*(up|gate).*     a regular expression, found anywhere in the path
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from qc.errors import RecipeError, nearest
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node


def select_linears(
    graph: Graph, targets: Sequence[str], ignore: Sequence[str], candidates: Iterable[Node]
) -> list[Node]:
    """Return the candidates that a target names and no `ignore` does, in order.

    RecipeError for a selector that names no linear of the graph at all.
    """
    linears = [n for n in graph.nodes if isinstance(n.op, ops.Linear)]
    for selector in (*targets, *ignore):
        require_match(graph, selector, linears)
    return [
        linear
        for linear in candidates
        if any(matches(graph, each, linear) for each in targets)
        and not any(matches(graph, each, linear) for each in ignore)
    ]


def require_match(graph: Graph, selector: str, linears: Sequence[Node]) -> None:
    """Refuse a selector that names nothing."""
    if any(matches(graph, selector, linear) for linear in linears):
        return
    paths = [linear.origin.module for linear in linears if linear.origin.module]
    hint = nearest(selector, paths) or f"; the first is {paths[0]!r}" if paths else ""
    raise RecipeError(f"selector {selector!r} matches none of the {len(linears)} linears{hint}")


def matches(graph: Graph, selector: str, linear: Node) -> bool:
    """Say whether a selector names a linear."""
    path = linear.origin.module
    if selector == "linears":
        return True
    if selector == "head":
        return linear in graph.outputs
    return names_path(selector, path)


def names_path(selector: str, path: str) -> bool:
    """Say whether a selector of paths names one: by a regular expression, whole, or in part."""
    if selector.startswith("re:"):
        return re.search(selector.removeprefix("re:"), path) is not None
    return fnmatchcase(path, selector) or f".{selector}." in f".{path}."


def is_head(graph: Graph, linear: Node) -> bool:
    """Say whether the result of a linear is an output of the graph."""
    return linear in graph.outputs
