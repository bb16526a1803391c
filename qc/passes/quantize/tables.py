"""Tables that embeddings read, in fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.threads import one_torch_thread
from qc.ir.weights.notation import parse_term
from qc.ir.weights.weight import Term, TermFormat, Weight, WeightFormat
from qc.passes.pipeline import Context, Pass
from qc.passes.quantize.finite import count_unfinite
from qc.passes.stage import CANONICAL, QUANTIZED, Stage


@dataclass(frozen=True)
class StoreTables(Pass):
    """Store the tables that embeddings read: those that inputs index (vocabularies) in `format`,
    those that computed ids index (positions) in `computed`.

        embedding(%ids, dense f32)  -->  embedding(%ids, int8·row)

    Lossy: rounds each element to the nearest value of its format. A table that does not fit the
    range of its format, or has no more bits already, stays as it is; a head that shares the table
    keeps the original.
    """

    name: ClassVar[str] = "store_tables"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = QUANTIZED
    exact: ClassVar[bool] = False
    format: TermFormat
    computed: TermFormat

    def __init__(self, format: TermFormat | str, computed: TermFormat | str = "f16") -> None:
        for name, given in (("format", format), ("computed", computed)):
            parsed = parse_term(given) if isinstance(given, str) else given
            object.__setattr__(self, name, parsed)

    def __repr__(self) -> str:
        return f"StoreTables({str(self.format)!r}, {str(self.computed)!r})"

    def run(self, graph: Graph, context: Context) -> Graph:
        with one_torch_thread():
            return self.stored(graph, stored_as)

    def preview(self, graph: Graph) -> Graph:
        """Return the graph with formats in place of stored values, as if every table fitted."""
        return self.stored(graph, planned_as)

    def stored(self, graph: Graph, store: Callable[[Weight, TermFormat], Weight]) -> Graph:
        """Let the embeddings read tables that `store` returns, one for all that share it."""
        found: dict[tuple[Node, TermFormat], Node] = {}
        replacements: dict[Node, Node] = {}
        for node in graph.nodes:
            if not isinstance(node.op, ops.Embedding) or not isinstance(
                node.inputs[1].op, ops.Parameter
            ):
                continue
            ids, table = node.inputs
            weight = node.inputs[1].op.weight
            format = self.format if isinstance(ids.op, ops.Input) else self.computed
            if not saves_bits(format, weight):
                continue
            if (table, format) not in found:
                stored = store(weight, format)
                found[table, format] = make(ops.Parameter(stored), origin=table.origin)
            origin = node.origin.touched_by(self.name)
            replacements[node] = make(node.op, ids, found[table, format], origin=origin)
        return substitute(graph, replacements)


def saves_bits(format: TermFormat, weight: Weight) -> bool:
    """Say whether a table can be stored in a format, and is stored in more bits now."""
    return (
        len(weight.shape) == 2
        and format.refusal(weight.shape) is None
        and format.bits(weight.shape) < weight.bits
    )


def planned_as(weight: Weight, format: TermFormat) -> Weight:
    """Return `weight` in `format` without values."""
    return WeightFormat((format,)).planned(weight.name, weight.shape, weight.dtype)


def stored_as(weight: Weight, format: TermFormat) -> Weight:
    """Return `weight` in `format`, or as it is where a value is not finite or would overflow."""
    values = weight.dense()
    if count_unfinite(values):
        return weight
    term = format.nearest(values)
    return Weight(weight.name, weight.shape, (term,), weight.dtype) if is_finite(term) else weight


def is_finite(term: Term) -> bool:
    """Say whether all stored floats are finite."""
    floats = (array for array in term.arrays().values() if array.is_floating_point())
    return not any(count_unfinite(array) for array in floats)
