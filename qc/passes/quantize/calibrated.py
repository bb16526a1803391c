"""What quantizers that look at data share: which linears, which format, in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.device import CPU, moved
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.threads import side_by_side
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import Term, TermFormat, Weight, WeightFormat
from qc.passes.calibration import (
    Calibration,
    Coverage,
    Drift,
    Hessian,
    LinearGroup,
    Sequencing,
    Statistic,
    select_linears,
)
from qc.passes.calibration.checkpoint import digest_graph, digest_tensors
from qc.passes.calibration.selection import (
    is_head,
    is_structural,
    names_path,
    paths_of,
    require_match,
)
from qc.passes.pipeline import Context, Pass, Refusal
from qc.passes.quantize.error_feedback import output_error
from qc.passes.quantize.remainder import remainder, with_remainder
from qc.passes.quantize.round_to_nearest import (
    fitted_in_turn,
    planned_in,
    quantizable_linears,
    read_by_linears,
    refusal_of,
    require_finite,
    require_storable,
    resized,
)
from qc.passes.stage import CANONICAL, QUANTIZED, Stage

LARGE = 1 << 22
"""Weights of a matrix from which on it is rounded where the model runs. A GPU starts about twenty
operations a column, whatever their length: a smaller matrix is done sooner on a CPU."""


@dataclass(frozen=True)
class StoreByData(Pass):
    """Store the weights of linears group by group, from statistics of what the linears read.

    `format` is as it is printed. `targets` and `ignore` are selectors; without `ignore` the head
    stays as it is. "sequential" lets each group see the errors of all groups before it.
    `exceptions` are selectors and other formats: (("re:v_proj$", "int4·g64·zero"),); the first that
    names a linear counts.
    """

    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = QUANTIZED
    exact: ClassVar[bool] = False
    format: str
    targets: tuple[str, ...] = ("linears",)
    ignore: tuple[str, ...] | None = None
    sequencing: Sequencing = "sequential"
    exceptions: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", str(parse_weights(self.format)))

    @cached_property
    def weights(self) -> WeightFormat:
        """The format."""
        return parse_weights(self.format)

    def storing(self, format: WeightFormat) -> Self:
        return replace(self, format=str(format))

    def resized(self, bits: int | None, group: int | None) -> Self:
        return replace(self, format=str(resized(self.weights, bits, group)))

    # ------------------------------------------------------------ what it will do

    def linears(self, graph: Graph) -> list[Node]:
        """List the linears to store."""
        candidates = list(quantizable_linears(graph))
        for selector, _ in self.exceptions:
            if not is_structural(selector):
                require_match(graph, selector, candidates)
        if self.ignore is None:
            candidates = [each for each in candidates if not is_head(graph, each)]
        return select_linears(graph, self.targets, self.ignore or (), candidates)

    def parameters(self, graph: Graph) -> list[Node]:
        """List the parameters to store."""
        return list(dict.fromkeys(linear.inputs[1] for linear in self.linears(graph)))

    def planned_format(self, parameter: Node) -> WeightFormat:
        """Return the format that a parameter will have, as far as shapes tell."""
        path = weight_of(parameter).name.removesuffix(".weight")
        named = (format for selector, format in self.exceptions if names_path(selector, path))
        return parse_weights(next(named, self.format))

    def in_graph(self, graph: Graph) -> Self:
        """Return the pass with its exceptions by paths of a graph."""
        if not any(is_structural(selector) for selector, _ in self.exceptions):
            return self
        paths = paths_of(graph, (selector for selector, _ in self.exceptions))
        formats = (format for _, format in self.exceptions)
        return replace(self, exceptions=tuple(zip(paths, formats, strict=True)))

    def refusals(self, graph: Graph) -> list[Refusal]:
        here = self.in_graph(graph)
        found = (refusal_of(p, here.planned_format(p)) for p in self.parameters(graph))
        return [each for each in found if each is not None]

    def preview(self, graph: Graph) -> Graph | None:
        here = self.in_graph(graph)
        linears = self.linears(graph)
        planned = {p: planned_in(p, here.planned_format(p)) for p in self.parameters(graph)}
        return read_by_linears(graph, linears, planned, self.name)

    # ------------------------------------------------------------ doing it

    def run(self, graph: Graph, context: Context) -> Graph:
        here = self.in_graph(graph)
        linears = self.linears(graph)
        for parameter in self.parameters(graph):
            planned_in(parameter, here.planned_format(parameter))  # refused before any work
            require_finite(weight_of(parameter).dense(), weight_of(parameter))
        calibration = here.prepared(graph, context.data(self))
        stored = here.stored(graph, linears, calibration, context)
        nodes = {p: make(ops.Parameter(w), origin=p.origin) for p, w in stored.items()}
        return read_by_linears(graph, linears, nodes, self.name)

    def stored(
        self, graph: Graph, linears: list[Node], calibration: Calibration, context: Context
    ) -> dict[Node, Weight]:
        """Store all weights, in the order of the graph."""
        return calibration.visit(
            graph,
            linears,
            self.statistics(),
            lambda group, known: self.store_group(group, known, calibration),
            self.sequencing,
            context.progress,
        )

    def prepared(self, graph: Graph, calibration: Calibration) -> Calibration:
        """Open the checkpoint of this pass, if finished weights are to be kept."""
        if calibration.checkpoint is None:
            return calibration
        configuration = repr(self)
        digest = hashlib.blake2b(configuration.encode(), digest_size=4).hexdigest()
        facts = {
            "pass": configuration,
            "calibration data": digest_tensors(calibration.tensors()),
            "model": digest_graph(graph),
            "device": calibration.place.type,
        }
        opened = calibration.checkpoint.opened(f"{self.name}-{digest}", facts)
        return replace(calibration, checkpoint=opened)

    def statistics(self) -> tuple[Statistic, ...]:
        """Return what `store` needs to know of the inputs of a linear."""
        return (Hessian(),)

    def store_group(
        self, group: LinearGroup, known: Mapping[tuple[Node, Statistic], Any],
        calibration: Calibration,
    ) -> dict[Node, Weight]:  # fmt: skip
        """Store the weights of linears that read one value; all arithmetic on single threads."""
        largest = max(weight_of(parameter).elements for parameter in group.parameters)
        place = calibration.place if largest >= LARGE else CPU
        hessian: Tensor = moved(known[group.x, Hessian()], place)
        name = weight_of(group.parameters[0]).name
        prepared = on_one_thread(place, self.prepare, hessian, name)
        change: Tensor | None = None
        if (group.x, Drift()) in known:
            drift = moved(known[group.x, Drift()], place)
            change = on_one_thread(place, self.correction, hessian, drift)
        wide = hessian.float()
        weights = {p: moved_values(weight_of(p), place) for p in group.parameters}

        def store(parameter: Node) -> tuple[tuple[Term, ...], float]:
            wanted, values = weights[parameter]
            changed = wanted if change is None else wanted + wanted @ change
            terms = self.store(changed, prepared, parameter)
            require_storable(terms, weight_of(parameter))
            left = wanted - sum(term.dense().float() for term in terms)
            lost = output_error(left.T, wide)
            return terms, lost / max(output_error(values.T, wide), 1e-30)

        found: dict[Node, Weight] = {}
        for parameter, (terms, error) in side_by_side(store, group.parameters, place):
            stored = tuple(moved(term, CPU) for term in terms)
            found[parameter] = with_remainder(weight_of(parameter), stored)
            name = found[parameter].name
            calibration.coverage[name] = Coverage(calibration.tokens(), error)
        return found

    def prepare(self, hessian: Tensor, name: str) -> Any:
        """Turn H into what all weights of a group need of it."""
        return hessian

    def correction(self, hessian: Tensor, drift: Tensor) -> Tensor:
        """Turn what the inputs have drifted into a change D of the weights: W becomes W + W D."""
        raise NotImplementedError

    def store(self, values: Tensor, prepared: Any, parameter: Node) -> tuple[Term, ...]:
        """Store float32 values [out, in]."""
        return fitted_in_turn(
            values,
            self.planned_format(parameter),
            lambda term, left: self.store_term(term, left, prepared),
        )

    def store_term(self, format: TermFormat, values: Tensor, prepared: Any) -> Term:
        """Store one term of a sum."""
        raise NotImplementedError


def moved_values(weight: Weight, place: torch.device) -> tuple[Tensor, Tensor]:
    """Return on a device what of a weight is to be stored, and all of it, in float32."""
    return moved(remainder(weight).float(), place), moved(weight.dense().float(), place)


def weight_of(parameter: Node) -> Weight:
    """Return the weight of a parameter."""
    assert isinstance(parameter.op, ops.Parameter)
    return parameter.op.weight


def on_one_thread(place: torch.device, function: Any, *arguments: Any) -> Any:
    """Call a function with one torch thread, so that its bits are the same on every machine."""
    return next(iter(side_by_side(lambda given: function(*given), [arguments], place)))[1]
