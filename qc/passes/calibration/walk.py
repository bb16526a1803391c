"""Evaluate a graph over all batches, step by step, each node once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qc.errors import QcError
from qc.ir.device import CPU, moved
from qc.ir.graph import Graph
from qc.ir.meaning import bind_symbols, value_of
from qc.ir.node import Node
from qc.ir.ops import Parameter
from qc.ir.threads import return_free_memory, side_by_side
from qc.ir.weights.weight import Weight
from qc.passes.calibration.schedule import Step
from qc.passes.calibration.statistics import Statistic, as_float

Batch = Mapping[str, Tensor]
"""Input label -> value."""


class Walk:
    """A graph on its way through the calibration data.

    `advance(step)` computes a step for all batches and measures; `store(parameter, weight)` lets
    all later steps read another weight, which is how an error reaches what comes after it. Each
    batch is computed on one thread and measurements are added in the order of the batches: the
    bits do not depend on how many threads there are. Values lie on `device`, results on the CPU.
    """

    def __init__(
        self, graph: Graph, batches: Sequence[Batch], device: torch.device = CPU
    ) -> None:  # fmt: skip
        if not batches:
            raise QcError("there are no calibration batches to evaluate the graph on")
        self.graph = graph
        self.device = device
        self.batches = [placed(batch, device) for batch in batches]
        self.sizes = [sizes_of(graph, batch) for batch in batches]
        self.known: list[dict[Node, Any]] = [{} for _ in batches]
        self.stored: dict[Node, Weight] = {}

    def store(self, parameter: Node, weight: Weight) -> None:
        """Read `weight` in place of `parameter` from now on."""
        self.stored[parameter] = weight

    def weight(self, parameter: Node) -> Weight:
        """Return what a parameter holds by now."""
        assert isinstance(parameter.op, Parameter)
        return self.stored.get(parameter, parameter.op.weight)

    @torch.no_grad()
    def advance(
        self, step: Step, requests: Mapping[Node, Sequence[Statistic]] | None = None
    ) -> dict[tuple[Node, Statistic], Any]:
        """Compute one step for all batches; return what was asked to be measured."""
        wanted = requests or {}
        sums: dict[tuple[Node, Statistic], Any] = {}
        for partial in self.each_batch(step, lambda _, node, value: measured(wanted, node, value)):
            for key, found in partial:
                sums[key] = key[1].merged(sums.get(key), found)
        return finished(sums)

    def each_batch(
        self, step: Step, watch: Callable[[int, Node, Any], list[Any]]
    ) -> Iterator[list[Any]]:
        """Compute a step batch by batch; yield what `watch(batch, node, value)` made of the wanted
        values, in order."""
        shared = self.decoded(step)
        for _, found in side_by_side(
            lambda number: self.compute(step, number, shared, watch),
            range(len(self.batches)), self.device,
        ):  # fmt: skip
            yield found
        return_free_memory()

    def decoded(self, step: Step) -> dict[Node, Any]:
        """Return the values of the stored tensors that a step reads."""
        return {p: moved(self.weight(p).dense(), self.device) for p in step.parameters}

    @torch.no_grad()
    def compute(
        self, step: Step, number: int, shared: Mapping[Node, Any],
        watch: Callable[[int, Node, Any], list[Any]],
    ) -> list[Any]:  # fmt: skip
        """Compute a step for one batch; return what `watch` made of the wanted values."""
        values = {**shared, **self.known[number]}
        batch, sizes = self.batches[number], self.sizes[number]
        remaining = uses(step)
        found: list[Any] = []
        for node in step.wanted:  # what an earlier step has computed already
            if node in values:
                found += watch(number, node, values[node])
        for node in step.nodes:
            values[node] = value_of(node, values, batch, sizes)
            if node in step.wanted:
                found += watch(number, node, values[node])
            for operand in node.inputs:
                remaining[operand] -= 1
                if not remaining[operand]:
                    values.pop(operand, None)
        self.known[number] = {node: values[node] for node in step.live}
        return found


def advance_both(
    walk: Walk, original: Walk, step: Step, requests: Mapping[Node, Sequence[Statistic]]
) -> dict[tuple[Node, Statistic], Any]:
    """Compute a step in two walks over the same batches; measure the first, and what compares it
    with the second."""
    sums: dict[tuple[Node, Statistic], Any] = {}
    shared = walk.decoded(step), original.decoded(step)

    def compute(number: int) -> list[tuple[tuple[Node, Statistic], Any]]:
        plain: dict[Node, Any] = {}

        def keep(_: int, node: Node, value: Any) -> list[Any]:
            plain[node] = value
            return []

        original.compute(step, number, shared[1], keep)
        return walk.compute(
            step, number, shared[0],
            lambda _, node, value: measured(requests, node, value, plain.get(node)),
        )  # fmt: skip

    for _, partial in side_by_side(compute, range(len(walk.batches)), walk.device):
        for key, found in partial:
            sums[key] = key[1].merged(sums.get(key), found)
    return_free_memory()
    return finished(sums)


def finished(sums: Mapping[tuple[Node, Statistic], Any]) -> dict[tuple[Node, Statistic], Any]:
    """Return the results of all batches."""
    return {key: key[1].collected(key[1].finished(total)) for key, total in sums.items()}


def placed(batch: Batch, device: torch.device) -> Batch:
    """Return the inputs of a graph on a device."""
    return {label: value.to(device) for label, value in batch.items()}


def uses(step: Step) -> dict[Node, int]:
    """Count how often each value is read in a step, and once more where it is needed after it."""
    counts: dict[Node, int] = dict.fromkeys(step.live, 1)
    for node in step.nodes:
        for operand in node.inputs:
            counts[operand] = counts.get(operand, 0) + 1
    return counts


def measured(
    requests: Mapping[Node, Sequence[Statistic]], node: Node, value: Any, original: Any = None
) -> list[tuple[tuple[Node, Statistic], Any]]:
    """Measure one value of one batch, and what it is in the original where that is known."""
    if not requests.get(node):
        return []
    seen = as_float(value)
    plain = None if original is None else as_float(original)
    return [((node, each), each.compared(seen, plain)) for each in requests[node]]


def sizes_of(graph: Graph, batch: Batch) -> dict[str, int]:
    """Bind the symbols of a graph to a batch; logits are wanted at all positions."""
    sizes = bind_symbols(graph.inputs, batch)
    if "keep" not in sizes:
        first = next(iter(batch.values()))
        sizes["keep"] = first.shape[1] if first.ndim > 1 else 1
    return sizes
