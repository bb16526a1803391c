"""A tiny decoder with random weights, canonical, and random token sequences to calibrate it on."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.target import Target
from qc.passes.calibration import Calibration
from qc.passes.lift import LIFT
from qc.passes.pipeline import Context, Pipeline
from qc.passes.prepare import PREPARE
from qc.passes.prepare.trailing_logits import TrailingLogits
from tests.families import VOCABULARY, captured

LENGTH, SEQUENCES = 24, 12


@functools.cache
def canonical(family: str = "llama") -> Graph:
    """Return the canonical graph of a tiny family."""
    context = Context(Target("any", "any"))
    return Pipeline((*PREPARE, *LIFT, TrailingLogits())).run(captured(family), context)


def token_sequences(count: int = SEQUENCES, length: int = LENGTH, seed: int = 0) -> list[Tensor]:
    """Draw random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, VOCABULARY, (count, length), generator=generator))


def calibration(**options: object) -> Calibration:
    """Return a calibration on random tokens."""
    return Calibration(token_sequences(), max_seq_length=LENGTH, **options)  # type: ignore[arg-type]


def context(found: Calibration | None = None) -> Context:
    """Return a context with calibration data."""
    return Context(Target("any", "any"), calibration=found or calibration())


def linears(graph: Graph) -> list[Node]:
    """List the linears of the blocks: all but the head."""
    return [n for n in graph.nodes if isinstance(n.op, ops.Linear) and n not in graph.outputs]
