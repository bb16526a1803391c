"""How far the logits move when one layer alone is quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qc.explaining.layers import Layer
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate, evaluate_nodes
from qc.ir.node import Node
from qc.ir.threads import side_by_side
from qc.passes.calibration.calibration import inputs_of
from qc.passes.calibration.walk import sizes_of


def divergence_of(reference: Tensor, logits: Tensor) -> float:
    """KL(reference || model) in nats a token, of logits [..., tokens, vocabulary]."""
    return distance_from(*probabilities_of(reference), logits)


def probabilities_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p and p."""
    log_p = F.log_softmax(logits.float(), -1)
    return log_p, log_p.exp()


def distance_from(log_p: Tensor, p: Tensor, logits: Tensor) -> float:
    """Return the divergence of logits from what `probabilities_of` made of others."""
    change = log_p - F.log_softmax(logits.float(), -1)
    return float(change.mul_(p).sum(-1).mean().clamp_min(0))


class SingleChanges:
    """One batch through a graph, with every value kept: a changed layer computes what follows it,
    and nothing else, again."""

    def __init__(self, graph: Graph, ids: Tensor) -> None:
        self.graph = graph
        self.inputs = inputs_of(graph, ids.unsqueeze(0))
        self.sizes = sizes_of(graph, self.inputs)
        self.values: dict[Node, Any] = {}
        self.logits = graph.output("logits")
        self.log_p, self.p = probabilities_of(self.compute({}))

    def compute(self, changed: Mapping[Node, Any]) -> Tensor:
        """Return the logits with other values of some nodes; the first call keeps all values."""
        known = {**self.values, **changed}
        for node in followers(self.graph, changed):
            known.pop(node, None)
        watch = None if self.values else self.values.__setitem__
        (logits,) = evaluate_nodes((self.logits,), self.inputs, self.sizes, watch, known)
        found: Tensor = logits
        return found

    @torch.no_grad()
    def divergence(self, layer: Layer, values: Tensor) -> float:
        """Return what the logits lose when a layer multiplies by `values` [out, in] instead."""
        changed = {}
        for number, linear in enumerate(layer.linears):
            weight = values if number == 0 else torch.zeros_like(values)
            operands = [self.values[linear.inputs[0]], weight]
            operands += [self.values[bias] for bias in linear.inputs[2:]]
            changed[linear] = linear.op.meaning(*operands, sizes=self.sizes)
        return distance_from(self.log_p, self.p, self.compute(changed))


def followers(graph: Graph, changed: Mapping[Node, Any]) -> Iterator[Node]:
    """Yield the nodes that read changed ones, directly or not."""
    waiting = list(changed)
    seen = set(changed)
    while waiting:
        for user in graph.users[waiting.pop()]:
            if user not in seen:
                seen.add(user)
                waiting.append(user)
                yield user


def divergences(
    graph: Graph, ids: Tensor, layers: Sequence[tuple[Layer, Layer]]
) -> Iterator[tuple[Layer, float]]:
    """Yield, for every layer of a graph and what was stored of it, the loss of that layer alone."""
    changes = SingleChanges(graph, ids)

    def measure(pair: tuple[Layer, Layer]) -> float:
        return changes.divergence(pair[0], pair[1].values())

    for (layer, _), found in side_by_side(measure, layers):
        yield layer, found


def whole_divergence(reference: Graph, graph: Graph, ids: Tensor) -> float:
    """Return what the logits lose with everything in `graph` quantized."""
    logits = []
    for each in (reference, graph):
        inputs = inputs_of(each, ids.unsqueeze(0))
        logits.append(evaluate(each, inputs, sizes_of(each, inputs))["logits"])
    return divergence_of(*logits)
