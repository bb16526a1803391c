"""Channels move their range from weights to activations, and the product stays."""

import torch

from qc.ir import ops
from qc.ir.meaning import evaluate
from qc.ir.node import Node, make
from qc.passes.exactness import distance
from qc.passes.transform.smooth_inputs import SmoothInputs, scales_of_weights, smoothed
from tests.ir.toys import block_graph
from tests.passes.lift.drawing import BATCH, apply, graph, mul, stored, table, value


def values(parameter: Node) -> torch.Tensor:
    assert isinstance(parameter.op, ops.Parameter)
    return parameter.op.weight.dense()


def test_scales_follow_the_largest_weight_of_a_channel() -> None:
    weight = torch.tensor([[1.0, -4.0, 0.0], [0.5, 2.0, 0.0]])
    found = scales_of_weights([weight], beta=0.5)
    torch.testing.assert_close(found[:2], torch.tensor([2**0.5, 0.5**0.5]))
    assert float(found[2]) == 1.0  # a channel of zeros
    both = scales_of_weights([weight, 8 * weight.flip(1)], beta=1.0)
    torch.testing.assert_close(both.log().sum(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_weights_of_zeros_are_left_alone() -> None:
    assert torch.equal(scales_of_weights([torch.zeros(2, 3)], 0.5), torch.ones(3))


def test_smoothing_by_given_scales() -> None:
    x, weight, scales = value("x", BATCH, 4), stored(3, 4), torch.tensor([1.0, 2.0, 0.5, 4.0])
    linear = make(ops.Linear(), x, weight)
    found = graph(smoothed(linear, scales))
    expected = make(ops.Linear(), mul(x, table(1 / scales)), table(values(weight) * scales))
    assert found.same_as(graph(expected))
    torch.testing.assert_close(values(found.outputs[0].inputs[1]), values(weight) * scales)
    data = {"x": torch.randn(5, 4)}
    assert distance(*(evaluate(g, data)["out0"] for g in (graph(linear), found))) < 1e-6


def test_scales_are_those_of_the_activations_dtype() -> None:
    """1 / s is rounded to float16, and the weight takes what was rounded."""
    x = value("x", BATCH, 8, dtype=torch.float16)
    linear = make(ops.Linear(), x, stored(3, 8))
    scales = torch.rand(8) + 0.5
    after = smoothed(linear, scales)
    inverse = values(after.inputs[0].inputs[1])
    assert inverse.dtype == torch.float16
    again = values(after.inputs[1]) * inverse.float()
    torch.testing.assert_close(again, values(linear.inputs[1]), rtol=1e-6, atol=0)


def test_channels_of_all_readers_get_like_ranges() -> None:
    x = value("x", BATCH, 16)
    weights = [torch.randn(n, 16) * torch.logspace(-2, 2, 16) for n in (8, 5)]
    before = graph(*(make(ops.Linear(), x, table(w)) for w in weights))
    after = apply(SmoothInputs(beta=1.0), before)
    left, right = after.outputs
    assert left.inputs[0] is right.inputs[0]
    largest = torch.cat([values(n.inputs[1]) for n in (left, right)]).abs().amax(0)
    torch.testing.assert_close(largest, largest.mean().expand(16), rtol=1e-5, atol=0)


def test_one_vector_for_each_input() -> None:
    after = apply(SmoothInputs(), block_graph())
    before = block_graph()
    added = [len(g.nodes) for g in (before, after)]
    assert added[1] - added[0] == 5 * 2 + 1  # a vector and a product each; the head is untied
