"""Round-to-nearest: every weight by itself, on the grid that its format spans around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from qc.errors import FormatError, ModelError
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.threads import side_by_side
from qc.ir.weights.mapped import Aside
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.rounding import Ranges
from qc.ir.weights.weight import Term, TermFormat, Weight, WeightFormat
from qc.passes.calibration.selection import is_head
from qc.passes.pipeline import Context, Pass, Refusal
from qc.passes.quantize.finite import count_unfinite
from qc.passes.quantize.nearby import nearest_accepted
from qc.passes.quantize.remainder import (
    is_unrounded,
    planned_remainder,
    remainder,
    with_remainder,
)
from qc.passes.stage import CANONICAL, QUANTIZED, Stage


def round_to_nearest(
    values: Tensor, format: WeightFormat, ranges: Ranges = "extremes"
) -> tuple[Term, ...]:
    """Store a matrix [out, in] as a sum: each term is nearest to what the terms before it leave.

    Terms that take outliers out come first, the others in the order in which they are written.
    """
    return fitted_in_turn(values, format, lambda term, left: nearest_term_of(term, left, ranges))


def fitted_in_turn(
    values: Tensor, format: WeightFormat, fit: Callable[[TermFormat, Tensor], Term]
) -> tuple[Term, ...]:
    """Store a matrix as a sum: `fit(term, what the terms before it leave)` stores each term."""
    order = sorted(range(len(format.terms)), key=lambda i: not format.terms[i].takes_outliers)
    fitted: dict[int, Term] = {}
    left = values.float() if len(order) > 1 else values
    for number, i in enumerate(order):
        fitted[i] = fit(format.terms[i], left)
        if number + 1 < len(order):
            left = left - fitted[i].dense().float()
    return tuple(fitted[i] for i in range(len(order)))


IN_MEMORY = 1 << 26
"""Bytes of quantized weights that stay in memory; what comes after them waits in a file."""


def nearest_term_of(format: TermFormat, values: Tensor, ranges: Ranges) -> Term:
    """Store a matrix in one term, on grids over the extremes or of the least squared error."""
    shape = (values.shape[0], values.shape[1])
    rounding = format.rounding(shape, ranges) if ranges != "extremes" else None
    return format.nearest(values) if rounding is None else rounding.nearest(values)


def resized(format: WeightFormat, bits: int | None, group: int | None) -> WeightFormat:
    """Return a sum with its first term of codes in other sizes; FormatError where none has any."""
    if bits is None and group is None:
        return format
    for number, term in enumerate(format.terms):
        changed = term.resized(bits, group)
        if changed is not None:
            return WeightFormat((*format.terms[:number], changed, *format.terms[number + 1 :]))
    asked = [f"{bits} bits"] * (bits is not None) + [f"groups of {group}"] * (group is not None)
    raise FormatError(f"{format} cannot have {' and '.join(asked)}: give the weights as a format")


def as_weight_format(format: WeightFormat | TermFormat | str) -> WeightFormat:
    """Return a format given as one term, or as it is printed."""
    if isinstance(format, str):
        return parse_weights(format)
    return WeightFormat((format,)) if isinstance(format, TermFormat) else format


@dataclass(frozen=True)
class RoundToNearest(Pass):
    """Store the weight of every linear in a format without looking at data.

        %w = weight dense f32    -->  %w = weight int4·g32·min
        linear(%x, %w)                linear(%x, %w)

    Lossy: minimises the error of each weight by itself, see `nearest` of the format; in a sum, each
    term stores what the others leave. A table that an embedding shares with a linear stays as it is
    for the embedding. Of a weight that has been decomposed, what is left is stored. `format` may be
    given as it is printed: "int3·g64 + rank16". `ranges` lays the grid of a group over its
    extremes, or where its squared error is least ("mse"). Without `heads`, linears whose result is
    an output of the graph stay as they are.
    """

    name: ClassVar[str] = "round_to_nearest"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = QUANTIZED
    exact: ClassVar[bool] = False
    format: WeightFormat
    ranges: Ranges = "extremes"
    heads: bool = True

    def __init__(
        self,
        format: WeightFormat | TermFormat | str,
        ranges: Ranges = "extremes",
        heads: bool = True,
    ) -> None:
        object.__setattr__(self, "format", as_weight_format(format))
        object.__setattr__(self, "ranges", ranges)
        object.__setattr__(self, "heads", heads)

    def __repr__(self) -> str:
        ranges = "" if self.ranges == "extremes" else f", {self.ranges!r}"
        heads = "" if self.heads else ", heads=False"
        return f"RoundToNearest({str(self.format)!r}{ranges}{heads})"

    def storing(self, format: WeightFormat) -> RoundToNearest:
        """Return the pass for another format."""
        return RoundToNearest(format, self.ranges, self.heads)

    def resized(self, bits: int | None, group: int | None) -> RoundToNearest:
        return self.storing(resized(self.format, bits, group))

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
        aside = Aside(IN_MEMORY)
        quantized: dict[Node, Node] = {}
        for parameter, stored in side_by_side(partial(self.quantize, aside=aside), parameters):
            quantized[parameter] = stored
            name = parameter_name(parameter)
            context.progress(f"quantize {name}", len(quantized) / len(parameters))
        return self.replaced(graph, quantized)

    def parameters(self, graph: Graph) -> list[Node]:
        """List the parameters to store."""
        return list(dict.fromkeys(linear.inputs[1] for linear in self.linears(graph)))

    def linears(self, graph: Graph) -> list[Node]:
        """List the linears that read them."""
        found = quantizable_linears(graph)
        return [each for each in found if self.heads or not is_head(graph, each)]

    def replaced(self, graph: Graph, quantized: dict[Node, Node]) -> Graph:
        """Let the linears read other parameters."""
        return read_by_linears(graph, self.linears(graph), quantized, self.name)

    def planned(self, parameter: Node) -> Node:
        """Return the parameter without values, in the format."""
        return planned_in(parameter, self.format)

    def quantize(self, parameter: Node, aside: Aside) -> Node:
        """Return the parameter with its values rounded, kept in memory or put aside."""
        assert isinstance(parameter.op, ops.Parameter)
        weight = parameter.op.weight
        values = remainder(weight)
        require_finite(values, weight)
        terms = round_to_nearest(values, self.format, self.ranges)
        require_storable(terms, weight)
        return make(
            ops.Parameter(aside.place(with_remainder(weight, terms))), origin=parameter.origin
        )


def planned_in(parameter: Node, format: WeightFormat) -> Node:
    """Return a parameter without values in a format; FormatError where it cannot be stored so."""
    assert isinstance(parameter.op, ops.Parameter)
    weight = parameter.op.weight
    refused = refusal_of(parameter, format)
    if refused is not None:
        raise FormatError(str(refused))
    stored = planned_remainder(weight, format)
    return make(ops.Parameter(stored), origin=parameter.origin)


def read_by_linears(
    graph: Graph, linears: Iterable[Node], stored: Mapping[Node, Node], name: str
) -> Graph:
    """Let linears read other parameters; `name` is noted in their origins."""
    replacements = {
        linear: make(
            linear.op,
            linear.inputs[0],
            stored[linear.inputs[1]],
            *linear.inputs[2:],
            origin=linear.origin.touched_by(name),
        )
        for linear in linears
    }
    return substitute(graph, replacements)


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
    wrong = count_unfinite(values)
    if wrong:
        raise ModelError(
            f"weight {weight.name!r} holds {wrong} values that are NaN or infinite, "
            "so it cannot be quantized"
        )


def require_storable(terms: tuple[Term, ...], weight: Weight) -> None:
    """Refuse weights so large that a scale or a minimum overflows where it is stored."""
    for term in terms:
        floats = (array for array in term.arrays().values() if array.is_floating_point())
        if any(count_unfinite(array) for array in floats):
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
