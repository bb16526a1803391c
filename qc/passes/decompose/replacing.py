"""Other weights in the places of linears' weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.threads import side_by_side
from qc.ir.weights.weight import Term, Weight
from qc.passes.transform.calibrated import changeable_groups, linears_of


def weight_of(linear: Node) -> Weight:
    """Return the stored weight of a linear."""
    parameter = linear.inputs[1].op
    assert isinstance(parameter, ops.Parameter)
    return parameter.weight


def chosen_linears(graph: Graph, targets: Sequence[str]) -> list[Node]:
    """List the linears that targets name, but heads."""
    return [linear for group in changeable_groups(graph, targets) for linear in group.linears]


def replaced_weights(
    graph: Graph, linears: Sequence[Node], store: Callable[[Node], Weight], name: str
) -> Graph:
    """Return the graph with `store(linear)` as the weights of linears; weights that several share
    are stored once."""
    first = {linear.inputs[1]: linear for linear in reversed(linears)}
    stored: dict[Node, Node] = {}
    for linear, weight in side_by_side(store, first.values()):
        parameter = linear.inputs[1]
        stored[parameter] = make(ops.Parameter(weight), origin=parameter.origin)
    return substitute(graph, {n: reading_weight(n, stored[n.inputs[1]], name) for n in linears})


def reading_weight(linear: Node, parameter: Node, name: str) -> Node:
    """Return a linear that reads another weight."""
    x, _, *rest = linear.inputs
    return make(linear.op, x, parameter, *rest, origin=linear.origin.touched_by(name))


def changed_pairs(before: Graph, after: Graph, linears: Sequence[Node]) -> list[tuple[Node, Node]]:
    """Pair the linears of a graph with what a pass made of them, where it stored another weight."""
    chosen = set(linears)
    pairs = zip(linears_of(before), linears_of(after), strict=True)
    return [
        (old, new) for old, new in pairs if old in chosen and weight_of(old) is not weight_of(new)
    ]


def with_terms(graph: Graph, added: Mapping[Node, Term], name: str) -> Graph:
    """Return the graph with one more term in the weights of linears."""
    linears = list(added)

    def store(linear: Node) -> Weight:
        weight = weight_of(linear)
        terms = (*weight.terms, added[linear])
        return Weight(weight.name, weight.shape, terms, weight.dtype)

    return replaced_weights(graph, linears, store, name)
