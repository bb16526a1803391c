"""Channels change places inside blocks, and nobody outside notices."""

import pytest
import torch

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.passes.exactness import relative_difference
from qc.passes.transform.calibrated import changeable_groups, linears_of
from qc.passes.transform.linears import values_of
from qc.passes.transform.permute_channels import (
    PermuteChannels,
    Writers,
    largest_weights,
    writers_of,
)
from tests.families import FAMILIES
from tests.passes.calibration.tiny import canonical, context
from tests.passes.lift.drawing import BATCH, add, apply, graph, mul, stored, unary, value


def linear(x: Node, out: int) -> Node:
    channels = x.tensor.shape[-1]
    assert isinstance(channels, int)
    return make(ops.Linear(), x, stored(out, channels), stored(out))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_meaning(family: str) -> None:
    before = canonical(family)
    after = apply(PermuteChannels(), before)
    assert relative_difference(before, after) < 2e-6  # measured: 5e-7
    found = [len(w.linears) for g in changeable_groups(before, ("linears",))
             if (w := writers_of(before, g)) is not None]  # fmt: skip
    assert len(found) == 4  # merged heads and hidden channels, in each of two layers


def sorted_scores(graph: Graph) -> list[bool]:
    """Say of every group that can be sorted whether it is, within heads."""
    said = []
    for group in changeable_groups(graph, ("linears",)):
        writers = writers_of(graph, group)
        if writers is not None:
            rows, columns = writers.order(largest_weights(group))
            said.append(bool((rows.diff() > 0).all()) and bool((columns.diff() > 0).all()))
    return said


def test_channels_come_by_falling_weight() -> None:
    before = canonical()
    assert not any(sorted_scores(before))
    after = apply(PermuteChannels(), before)
    assert all(sorted_scores(after))
    down = [n for n in linears_of(after) if "down_proj" in n.origin.module]
    for each in down:
        assert bool((values_of(each).abs().amax(0).diff() <= 0).all())


def test_or_by_what_they_carry() -> None:
    data = context()
    after = PermuteChannels("hessian").run(canonical(), data)
    assert relative_difference(canonical(), after) < 2e-6
    from qc.passes.calibration import Hessian

    assert data.calibration is not None
    for node in linears_of(after):
        if "down_proj" in node.origin.module:
            diagonal = data.calibration.measured(after, node.inputs[0], Hessian()).diagonal()
            assert bool((diagonal.diff() <= 1e-6 * diagonal.max()).all())


def test_query_heads_that_share_values_are_sorted_together() -> None:
    index = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])  # four heads of 3, two of values
    scores = torch.tensor([0.0, 1, 0, 0, 0, 5, 7, 0, 0, 0, 0, 8])
    rows, columns = Writers((), index, 3).order(scores)
    assert rows.tolist() == [2, 1, 0, 5, 3, 4]
    assert columns.tolist() == [2, 1, 0, 5, 4, 3, 8, 6, 7, 11, 9, 10]


@pytest.mark.parametrize("between", [
    lambda x: make(ops.Softmax(1), x),
    lambda x: mul(x, stored(6)),
    lambda x: add(x, value("y", BATCH, 6)),
    lambda x: make(ops.RMSNorm(1e-6), x, stored(6)),
], ids=["softmax", "vector", "input", "norm"])  # fmt: skip
def test_where_the_order_matters_it_stays(between: object) -> None:
    assert callable(between)
    before = graph(linear(between(linear(value("x", BATCH, 8), 6)), 4))
    assert set(apply(PermuteChannels(), before).nodes) == set(before.nodes)


def test_a_value_that_others_read_stays() -> None:
    x = unary("silu", linear(value("x", BATCH, 8), 6))
    head = unary("exp", linear(x, 4))
    for before in (graph(head, x), graph(head, unary("exp", x))):
        assert set(apply(PermuteChannels(), before).nodes) == set(before.nodes)
    assert set(apply(PermuteChannels(), graph(head)).nodes) != set(graph(head).nodes)
