"""Which linears a pass works on: selectors, each of which must match something.

linears              all of them
head                 those whose result is an output of the graph, such as the logits or an image
model.layers.*.mlp   a path in the user's model, or a part of one with * and ?
re:.*(up|gate).*     a regular expression, found anywhere in the path

Two are about what a linear is in the graph, whatever its name. A model may have no such linears:
exceptions by them do not fail.

cached               those that make keys and values
ends:2               those of the first two and the last two blocks of each stack
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from qc.errors import RecipeError, nearest
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node

CACHED, ENDS = "cached", "ends:"

BLOCK = re.compile(r"(?P<stack>.*?)\.?\b(?P<number>\d+)(\.|$)")


def select_linears(
    graph: Graph, targets: Sequence[str], ignore: Sequence[str], candidates: Iterable[Node]
) -> list[Node]:
    """Return the candidates that a target names and no `ignore` does, in order.

    RecipeError for a selector that names no linear of the graph at all.
    """
    linears = [n for n in graph.nodes if isinstance(n.op, ops.Linear)]
    for selector in (*targets, *ignore):
        require_match(graph, selector, linears)
    chosen, left = (paths_of(graph, each) for each in (targets, ignore))
    return [
        linear
        for linear in candidates
        if any(matches(graph, each, linear) for each in chosen)
        and not any(matches(graph, each, linear) for each in left)
    ]


def is_structural(selector: str) -> bool:
    """Say whether a selector is about the graph, and not about names."""
    return selector == CACHED or selector.startswith(ENDS)


def paths_of(graph: Graph, selectors: Iterable[str]) -> tuple[str, ...]:
    """Return the selectors with those about the graph as regular expressions of its paths."""
    return tuple(named_by_path(graph, each) if is_structural(each) else each for each in selectors)


def named_by_path(graph: Graph, selector: str) -> str:
    """Return a regular expression for what a structural selector names; RecipeError where it cannot
    be read."""
    found = cached_paths(graph) if selector == CACHED else end_paths(graph, selector)
    paths = "|".join(map(re.escape, dict.fromkeys(found))) or "(?!)"
    return (
        rf"re:^({paths})(?!\w)"  # weights that one module holds have names of their own behind it
    )


def cached_paths(graph: Graph) -> list[str]:
    """Return the paths of the linears nearest in front of keys and values."""
    waiting = [
        operand
        for node in graph.nodes
        if isinstance(node.op, ops.Attention)
        for operand in node.inputs[1:3]
    ]
    found: dict[str, None] = {}
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node.op, ops.Linear):
            found[node.origin.module] = None
        else:
            waiting += node.inputs
    return sorted(found)


def end_paths(graph: Graph, selector: str) -> list[str]:
    """Return the paths of the linears of the first and the last blocks; a block is what the first
    number of a path counts."""
    count = selector.removeprefix(ENDS)
    if not count.isdecimal() or not int(count):
        raise RecipeError(f"selector {selector!r} wants a number of blocks, such as {ENDS}2")
    stacks: dict[str, dict[int, list[str]]] = {}
    for node in graph.nodes:
        block = isinstance(node.op, ops.Linear) and BLOCK.match(node.origin.module)
        if block:
            stack = stacks.setdefault(block["stack"], {})
            stack.setdefault(int(block["number"]), []).append(node.origin.module)
    found: list[str] = []
    for stack in stacks.values():
        numbers = sorted(stack)
        ends = {*numbers[: int(count)], *numbers[-int(count) :]}
        found += [path for number in sorted(ends) for path in stack[number]]
    return found


def require_match(graph: Graph, selector: str, linears: Sequence[Node]) -> None:
    """Refuse a selector that names nothing."""
    (path,) = paths_of(graph, (selector,))
    if any(matches(graph, path, linear) for linear in linears):
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
        return is_head(graph, linear)
    return names_path(selector, path)


def names_path(selector: str, path: str) -> bool:
    """Say whether a selector of paths names one: by a regular expression, whole, or in part."""
    if selector.startswith("re:"):
        return re.search(selector.removeprefix("re:"), path) is not None
    return fnmatchcase(path, selector) or f".{selector}." in f".{path}."


def is_head(graph: Graph, linear: Node) -> bool:
    """Say whether the result of a linear is an output of the graph, where its elements may have
    been moved: patches are put together to an image."""
    value = linear
    while value not in graph.outputs:
        users = graph.users[value]
        if len(users) != 1 or not isinstance(users[0].op, ops.Reshape | ops.Permute):
            return False
        value = users[0]
    return True
