"""Compare two graphs of the same meaning on random inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.node import Node
from qc.ir.ops import Embedding, Input
from qc.ir.types import bind_dim, dim_symbols

PROBE_SIZES = {"batch": 2, "seq": 7, "past": 0, "keep": 7}
"""A past of zero makes a graph with a cache comparable with one without."""


def relative_difference(before: Graph, after: Graph, seed: int = 0) -> float:
    """Return the largest relative L2 distance of the outputs of `before`; infinity where `after`
    lacks one or gives it another shape.

    Inputs are random; integer inputs stay below the smallest table that they index.
    """
    values = random_inputs((*before.inputs, *after.inputs), (before, after), seed)
    sizes = {"keep": PROBE_SIZES["keep"], "past": PROBE_SIZES["past"]}
    left = evaluate(before, values, sizes)
    right = evaluate(after, values, sizes)
    if not right.keys() >= left.keys():
        return math.inf
    return max(distance(value, right[name]) for name, value in left.items())


def distance(reference: Tensor, other: Tensor) -> float:
    """Return |other - reference| / |reference| in the L2 norm; infinity where there is none."""
    if reference.shape != other.shape:
        return math.inf
    if torch.equal(reference, other):
        return 0.0
    reference, other = reference.double(), other.double()
    relative = float((other - reference).norm() / reference.norm().clamp_min(1e-30))
    return math.inf if math.isnan(relative) else relative


def random_inputs(inputs: Iterable[Node], graphs: Iterable[Graph], seed: int) -> dict[str, Tensor]:
    """Draw a value for every input."""
    generator = torch.Generator().manual_seed(seed)
    limit = smallest_table(graphs)
    values: dict[str, Tensor] = {}
    for node in inputs:
        assert isinstance(node.op, Input)
        if node.op.label in values:
            continue
        type = node.tensor
        sizes = {name: PROBE_SIZES.get(name, 2) for name in dim_symbols(type.shape)}
        shape = tuple(bind_dim(d, sizes) for d in type.shape)
        if type.is_float:
            values[node.op.label] = torch.randn(shape, generator=generator).to(type.dtype)
        else:
            drawn = torch.randint(0, limit, shape, generator=generator)
            values[node.op.label] = drawn.to(type.dtype)
    return values


def smallest_table(graphs: Iterable[Graph]) -> int:
    """Return the number of rows of the smallest embedding table, at least 2."""
    rows = [
        n.inputs[1].tensor.shape[0] for g in graphs for n in g.nodes if isinstance(n.op, Embedding)
    ]
    return max(2, min((r for r in rows if isinstance(r, int)), default=2))
