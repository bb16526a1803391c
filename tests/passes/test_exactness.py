"""Comparing graphs: distances, random inputs, what can never be equal."""

import math

import pytest
import torch

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import make
from qc.ir.types import symbol
from qc.passes.exactness import PROBE_SIZES, distance, random_inputs, relative_difference
from tests.ir.toys import VOCABULARY, block_graph
from tests.passes.lift.drawing import BATCH, SEQ, graph, mul, unary, value


def test_a_distance_is_relative() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert distance(reference, reference) == 0.0
    assert distance(reference, reference * 1.01) == pytest.approx(0.01, rel=1e-4)
    infinite = torch.tensor([1.0, -math.inf])
    assert distance(infinite, infinite) == 0.0


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([math.nan, 1.0]),
        torch.tensor([1.0]),
        torch.ones(1, 2),
        torch.ones(2) * math.inf,
    ],
)
def test_what_cannot_be_compared_is_infinitely_far(other: torch.Tensor) -> None:
    assert distance(torch.ones(2), other) == math.inf


def test_graphs_of_one_meaning_are_at_distance_zero() -> None:
    assert relative_difference(block_graph(), block_graph()) == 0.0
    assert relative_difference(block_graph(0), block_graph(1)) > 0.1


def test_a_missing_output_is_infinitely_far() -> None:
    x = value("x", 3)
    before = graph(unary("exp", x), unary("sin", x), names=("a", "b"))
    after = graph(unary("exp", x), names=("a",))
    assert relative_difference(before, after) == math.inf
    assert relative_difference(after, before) == 0.0


def test_more_inputs_and_sizes_may_be_asked_for() -> None:
    x, y = value("x", BATCH, SEQ), value("y", BATCH, symbol("past"))
    keep = symbol("keep")
    before = graph(x)
    after = Graph((x, y), (make(ops.Slice(1, SEQ - keep, SEQ), x),), ("out0",))
    assert relative_difference(before, after) == 0.0  # keep is the whole length, past is nothing


def test_random_ids_stay_in_the_table() -> None:
    toy = block_graph()
    found = random_inputs(toy.inputs, [toy], seed=0)["ids"]
    assert found.shape == (PROBE_SIZES["batch"], PROBE_SIZES["seq"])
    assert int(found.max()) < VOCABULARY
    assert torch.equal(found, random_inputs(toy.inputs, [toy], seed=0)["ids"])


def test_the_seed_decides() -> None:
    x = graph(mul(value("x", 3), 2.0))
    one, other = (random_inputs(x.inputs, [x], seed)["x"] for seed in (0, 1))
    assert not torch.equal(one, other)
