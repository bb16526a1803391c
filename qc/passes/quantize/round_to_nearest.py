"""Round-to-nearest: every weight by itself, on the grid that its format spans around it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qc.errors import FormatError, ModelError
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.threads import side_by_side
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import Term, TermFormat, Weight, WeightFormat
from qc.passes.pipeline import Context, Pass, Refusal
from qc.passes.quantize.nearby import nearest_accepted
from qc.passes.quantize.remainder import (
    is_unrounded,
    planned_remainder,
    remainder,
    with_remainder,
)
from qc.passes.stage import CANONICAL, QUANTIZED, Stage


def round_to_nearest(values: Tensor, format: WeightFormat) -> tuple[Term, ...]:
    """Store a matrix [out, in] as a sum: each term is nearest to what the terms before it leave.

    Terms that take outliers out come first, the others in the order in which they are written.
    """
    order = sorted(range(len(format.terms)), key=lambda i: not format.terms[i].takes_outliers)
    fitted: dict[int, Term] = {}
    left = values.float() if len(order) > 1 else values
    for number, i in enumerate(order):
        fitted[i] = format.terms[i].nearest(left)
        if number + 1 < len(order):
            left = left - fitted[i].dense().float()
    return tuple(fitted[i] for i in range(len(order)))


@dataclass(frozen=True)
class RoundToNearest(Pass):
    """Store the weight of every linear in a format without looking at data.

        %w = weight dense f32    -->  %w = weight int4·g32·min
        linear(%x, %w)                linear(%x, %w)

    Lossy: minimises the error of each weight by itself, see `nearest` of the format; in a sum, each
    term stores what the others leave. A table that an embedding shares with a linear stays as it is
    for the embedding. Of a weight that has been decomposed, what is left is stored.
    `format` may be given as it is printed: "int3·g64 + rank16".
    """

    name: ClassVar[str] = "round_to_nearest"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = QUANTIZED
    exact: ClassVar[bool] = False
    format: WeightFormat

    def __init__(self, format: WeightFormat | TermFormat | str) -> None:
        if isinstance(format, str):
            format = parse_weights(format)
        elif isinstance(format, TermFormat):
            format = WeightFormat((format,))
        object.__setattr__(self, "format", format)

    def __repr__(self) -> str:
        return f"RoundToNearest({str(self.format)!r})"

    def refusals(self, graph: Graph) -> list[Refusal]:
        found = (refusal_of(parameter, self.format) for parameter in self.parameters(graph))
        return [each for each in found if each is not None]

    def preview(self, graph: Graph) -> Graph:
        """Return the graph with formats in place of stored values; FormatError for a weight that
        cannot be stored so."""
        return self.replaced(graph, {p: self.planned(p) for p in self.parameters(graph)})

    def run(self, graph: Graph, context: Context) -> Graph:
        parameters = self.parameters(graph)
        for parameter in parameters:
            self.planned(parameter)  # what cannot be stored is refused before any work
        quantized: dict[Node, Node] = {}
        for parameter, stored in side_by_side(self.quantize, parameters):
            quantized[parameter] = stored
            name = parameter_name(parameter)
            context.progress(f"quantize {name}", len(quantized) / len(parameters))
        return self.replaced(graph, quantized)

    def parameters(self, graph: Graph) -> list[Node]:
        """List the parameters to store."""
        return list(dict.fromkeys(linear.inputs[1] for linear in quantizable_linears(graph)))

    def replaced(self, graph: Graph, quantized: dict[Node, Node]) -> Graph:
        """Let the linears read other parameters."""
        replacements = {
            linear: make(
                linear.op,
                linear.inputs[0],
                quantized[linear.inputs[1]],
                *linear.inputs[2:],
                origin=linear.origin.touched_by(self.name),
            )
            for linear in quantizable_linears(graph)
        }
        return substitute(graph, replacements)

    def planned(self, parameter: Node) -> Node:
        """Return the parameter without values, in the format."""
        assert isinstance(parameter.op, ops.Parameter)
        weight = parameter.op.weight
        refused = refusal_of(parameter, self.format)
        if refused is not None:
            raise FormatError(str(refused))
        stored = planned_remainder(weight, self.format)
        return make(ops.Parameter(stored), origin=parameter.origin)

    def quantize(self, parameter: Node) -> Node:
        """Return the parameter with its values rounded."""
        assert isinstance(parameter.op, ops.Parameter)
        weight = parameter.op.weight
        values = remainder(weight)
        require_finite(values, weight)
        terms = round_to_nearest(values, self.format)
        require_storable(terms, weight)
        return make(ops.Parameter(with_remainder(weight, terms)), origin=parameter.origin)


def refusal_of(parameter: Node, format: WeightFormat) -> Refusal | None:
    """Say why a parameter cannot be stored in a format, and in which near one it can."""
    assert isinstance(parameter.op, ops.Parameter)
    weight = parameter.op.weight
    reason = format.refusal(weight.shape)
    if reason is None:
        return None
    instead = nearest_accepted(format, weight.shape)
    return Refusal(weight.name, weight.shape, str(format), reason, str(instead))


def require_finite(values: Tensor, weight: Weight) -> None:
    """Refuse NaN and infinities, which no grid holds."""
    wrong = values.numel() - int(torch.isfinite(values).sum())
    if wrong:
        raise ModelError(
            f"weight {weight.name!r} holds {wrong} values that are NaN or infinite, "
            "so it cannot be quantized"
        )


def require_storable(terms: tuple[Term, ...], weight: Weight) -> None:
    """Refuse weights so large that a scale or a minimum overflows where it is stored."""
    for term in terms:
        floats = (array for array in term.arrays().values() if array.is_floating_point())
        if not all(bool(torch.isfinite(array).all()) for array in floats):
            raise ModelError(
                f"weight {weight.name!r} reaches {float(weight.dense().abs().max()):.3g}, which "
                f"the scales of {term.format} cannot hold"
            )


def quantizable_linears(graph: Graph) -> Iterator[Node]:
    """Yield the linears whose weight is plain values of 16 bits or more."""
    for node in graph.nodes:
        if not isinstance(node.op, ops.Linear):
            continue
        parameter = node.inputs[1].op
        if isinstance(parameter, ops.Parameter) and is_unrounded(parameter.weight):
            yield node


def parameter_name(parameter: Node) -> str:
    """Return the name of a stored tensor."""
    assert isinstance(parameter.op, ops.Parameter)
    return parameter.op.weight.name
