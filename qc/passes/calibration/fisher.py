"""The diagonal of the Fisher information: how much the loss feels every single weight.

F = mean over sequences of (d loss / d w)^2, the loss being the mean cross entropy of the next
token of one sequence: gradients are squared one sequence at a time, in float32. SqueezeLLM (Kim et
al. 2023), section 4.1. Values are kept at the inputs of the linears only and each part between is
computed again on the way back, so that no more than one part of a block is in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qc.errors import InputError
from qc.ir import ops
from qc.ir.device import CPU, moved
from qc.ir.graph import Graph
from qc.ir.meaning import value_of
from qc.ir.node import Node
from qc.ir.threads import side_by_side
from qc.passes.calibration.schedule import Step, linear_groups, plan_steps
from qc.passes.calibration.walk import Batch, placed, sizes_of

if TYPE_CHECKING:
    from qc.passes.calibration.calibration import Calibration


TOGETHER = 4
"""Sequences whose values are in memory together, so that several threads have work."""


@dataclass(frozen=True)
class Gradients:
    """What is known of the gradients by one weight: mean square and mean magnitude, [out, in]."""

    square: Tensor
    magnitude: Tensor


def squared_gradients(
    calibration: Calibration, graph: Graph, parameters: Sequence[Node], samples: int
) -> dict[Node, Gradients]:
    """Return the gradients by every weight over the first `samples` sequences."""
    from qc.passes.calibration.calibration import inputs_of

    if not parameters:
        return {}
    if "logits" not in graph.output_names:
        raise InputError("gradients need a model with logits: there is no loss without them")
    chosen = calibration.sequences()[:samples]
    device = calibration.place
    backward = Backward(graph, parameters, device)
    for first in range(0, len(chosen), TOGETHER):
        ids = chosen[first : first + TOGETHER]
        batches = [placed(inputs_of(graph, each.unsqueeze(0)), device) for each in ids]
        backward.run(batches, [each.to(device) for each in ids])
    return {
        node: Gradients(
            moved(each.square.div_(len(chosen)), CPU), moved(each.magnitude.div_(len(chosen)), CPU)
        )
        for node, each in backward.sums.items()
    }


class Backward:
    """The graph cut at the inputs of its linears; sums of gradients of the chosen weights."""

    def __init__(
        self, graph: Graph, parameters: Sequence[Node], device: torch.device = CPU
    ) -> None:  # fmt: skip
        self.graph, self.device = graph, device
        self.logits = graph.output("logits")
        self.parameters = frozenset(parameters)
        linears = [n for n in graph.nodes if isinstance(n.op, ops.Linear)]
        needed = frozenset(Graph(graph.inputs, (self.logits,), ("logits",)).nodes)
        groups = [group for group in linear_groups(graph, linears) if group.x in needed]
        self.steps = plan_steps([*([group.x] for group in groups), [self.logits]])
        self.readers = Counter(p for step in self.steps for p in step.parameters)
        self.sums: dict[Node, Gradients] = {}

    def run(self, batches: Sequence[Batch], ids: Sequence[Tensor]) -> None:
        """Add the gradients of some sequences, in their order."""
        sizes = [sizes_of(self.graph, batch) for batch in batches]
        numbers = range(len(batches))
        entering = [
            found
            for _, found in side_by_side(
                lambda n: self.forward(batches[n], sizes[n]), numbers, self.device
            )
        ]
        flowing: list[dict[Node, Tensor]] = [{} for _ in numbers]
        partial: list[dict[Node, Tensor]] = [{} for _ in numbers]
        remaining = Counter(self.readers)
        for step in reversed(self.steps):

            def back(n: int, step: Step = step) -> tuple[dict[Node, Tensor], dict[Node, Tensor]]:
                with torch.enable_grad():
                    known = entering[n].pop()
                    return self.back(step, known, flowing[n], batches[n], sizes[n], ids[n])

            remaining.subtract(step.parameters)
            for n, (flowed, found) in side_by_side(back, numbers, self.device):
                flowing[n] = flowed
                for parameter, gradient in found.items():
                    known = partial[n].pop(parameter, None)
                    total = gradient if known is None else known + gradient
                    if remaining[parameter]:
                        partial[n][parameter] = total
                    else:
                        self.add(parameter, total)

    def add(self, parameter: Node, gradient: Tensor) -> None:
        """Add the gradient of one sequence."""
        if parameter not in self.sums:
            self.sums[parameter] = Gradients(gradient.square(), gradient.abs())
            return
        self.sums[parameter].square.addcmul_(gradient, gradient)
        self.sums[parameter].magnitude.add_(gradient.abs())

    @torch.no_grad()
    def forward(self, batch: Batch, sizes: Mapping[str, int]) -> list[dict[Node, Any]]:
        """Return the values that enter each step."""
        entering: list[dict[Node, Any]] = [{}]
        for step in self.steps[:-1]:
            values = self.compute(step, dict(entering[-1]), batch, sizes, {})
            entering.append({node: values[node] for node in step.live})
        return entering

    def compute(
        self, step: Step, values: dict[Node, Any], batch: Batch, sizes: Mapping[str, int],
        weights: Mapping[Node, Tensor],
    ) -> dict[Node, Any]:  # fmt: skip
        """Compute the nodes of a step; `weights` replace stored tensors."""
        for parameter in step.parameters:
            given = weights.get(parameter)
            values[parameter] = value_of(parameter, {}, {}, {}) if given is None else given
        for node in step.nodes:
            values[node] = value_of(node, values, batch, sizes)
        return values

    def back(
        self, step: Step, entering: Mapping[Node, Any], flowing: Mapping[Node, Tensor],
        batch: Batch, sizes: Mapping[str, int], ids: Tensor,
    ) -> tuple[dict[Node, Tensor], dict[Node, Tensor]]:  # fmt: skip
        """Compute a step again with gradients; return what flows into the step before it, and the
        gradients of the weights that the step reads."""
        leaves = {
            node: value.detach().requires_grad_() if differentiable(value) else value
            for node, value in entering.items()
        }
        weights = {
            p: value_of(p, {}, {}, {}).detach().float().requires_grad_()
            for p in step.parameters
            if p in self.parameters
        }
        values = self.compute(step, dict(leaves), batch, sizes, weights)
        if self.logits in step.nodes:
            loss = F.cross_entropy(values[self.logits][0, :-1].float(), ids[1:])
            outputs, gradients = [loss], [torch.ones(())]
        else:
            reached = [n for n in flowing if getattr(values[n], "requires_grad", False)]
            outputs = [values[n] for n in reached]
            gradients = [flowing[n] for n in reached]
        wanted = {n: v for n, v in leaves.items() if differentiable(v)} | weights
        if not outputs or not wanted:
            return {}, {}
        results = torch.autograd.grad(outputs, list(wanted.values()), gradients, allow_unused=True)
        found = {n: g for n, g in zip(wanted, results, strict=True) if g is not None}
        flowed = {n: g for n, g in found.items() if n not in weights}
        return flowed, {n: g for n, g in found.items() if n in weights}


def differentiable(value: Any) -> bool:
    """Say whether gradients flow through a value."""
    return isinstance(value, Tensor) and value.is_floating_point()
