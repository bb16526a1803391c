"""Text that the model writes itself: no data, and yet the distribution that it works on.

Every sequence starts with the token that texts of the model start with and is drawn token by token
at temperature 1. Liu et al. 2023 (LLM-QAT), section 3.1, for the idea.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qc.errors import InputError
from qc.ir import ops
from qc.ir.device import CPU
from qc.ir.graph import Graph
from qc.ir.meaning import value_of
from qc.ir.node import Node
from qc.ir.target import Target
from qc.ir.threads import side_by_side
from qc.passes.calibration.walk import placed
from qc.passes.prepare.explicit_cache import ExplicitCache, empty_cache

ROWS = 32
"""Sequences that are written together: enough that a step is not bound by reading the weights."""


def write_sequences(
    graph: Graph, start: int | None, count: int, length: int, seed: int,
    device: torch.device = CPU,
) -> list[Tensor]:  # fmt: skip
    """Return `count` sequences i64[length] that the model of a canonical graph writes."""
    from qc.passes.pipeline import Context  # which names the calibration of a context

    with_cache = ExplicitCache(torch.float32).run(graph, Context(Target("any", "any")))
    if with_cache is graph or "logits" not in graph.output_names:
        raise InputError("this model writes no text, so it needs calibration data of its own")
    sizes = [min(ROWS, count - first) for first in range(0, count, ROWS)]

    def write(number: int) -> list[Tensor]:
        writer = Writer(with_cache, sizes[number], length, seed * len(sizes) + number, device)
        return list(writer.write(0 if start is None else start))

    found: list[Tensor] = []
    for _, rows in side_by_side(write, range(len(sizes)), device):
        found += rows
    return found


class Writer:
    """Some rows of text on their way; keys and values lie in buffers that are never copied."""

    def __init__(
        self, graph: Graph, rows: int, length: int, seed: int, device: torch.device = CPU
    ) -> None:
        self.graph, self.rows, self.length = graph, rows, length
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.fixed = {n: value_of(n, {}, {}, {}) for n in graph.parameters}
        logits = graph.output("logits")
        needed = Graph(graph.inputs, (logits,), ("logits",)).nodes
        self.order = [n for n in needed if n not in self.fixed]
        self.past = placed(empty_cache(graph, rows), device)
        self.buffers = {
            label: torch.empty(rows, length, *empty.shape[2:], dtype=empty.dtype)
            for label, empty in self.past.items()
        }
        self.ids = next(
            n.op.label for n in graph.inputs
            if isinstance(n.op, ops.Input) and n.op.label not in self.past
        )  # fmt: skip

    @torch.no_grad()
    def write(self, start: int) -> Tensor:
        """Draw all tokens: i64[rows, length]."""
        text = torch.full((self.rows, self.length), start, device=CPU)
        for place in range(self.length - 1):
            logits = self.step(text[:, place : place + 1].to(self.device), place)
            shares = torch.softmax(logits[:, -1].float(), -1).cpu()
            drawn = torch.multinomial(shares, 1, generator=self.generator)
            text[:, place + 1] = drawn[:, 0]
        return text

    def step(self, ids: Tensor, place: int) -> Tensor:
        """Return the logits behind one more token of every row."""
        values: dict[Node, Any] = dict(self.fixed)
        inputs = {label: buffer[:, :place] for label, buffer in self.buffers.items()}
        inputs[self.ids] = ids
        sizes = {"batch": self.rows, "seq": 1, "past": place, "keep": 1}
        for node in self.order:
            if isinstance(node.op, ops.Append):
                source = node.inputs[0].op
                assert isinstance(source, ops.Input)
                buffer = self.buffers[source.label]
                buffer[:, place : place + 1] = values[node.inputs[1]]
                values[node] = buffer[:, : place + 1]
            else:
                values[node] = value_of(node, values, inputs, sizes)
        logits: Tensor = values[self.graph.output("logits")]
        return logits
