"""The residual stream changes its basis, and nobody notices."""

import pytest
import torch

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.passes.transform.fold_gains import FoldGains, is_plain
from qc.passes.transform.rotate_stream import RotateStream, random_hadamard
from tests.ir.toys import CHANNELS, VOCABULARY, block_graph
from tests.passes.lift.drawing import BATCH, add, apply, graph, mul, run, stays, stored, value


@pytest.mark.parametrize("channels", [8, 12, 9, 576])
def test_a_random_hadamard_is_orthogonal(channels: int) -> None:
    turn = random_hadamard(channels, 0)
    matrix = turn(torch.eye(channels))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(channels).double(), atol=1e-6, rtol=0)
    assert not torch.equal(matrix, random_hadamard(channels, 1)(torch.eye(channels)))


def embedded() -> Node:
    ids = make(ops.Input("ids", value("x", BATCH).tensor.cast(torch.int64)))
    return make(ops.Embedding(), ids, stored(VOCABULARY, 8))


def normed(x: Node, gain: Node | None = None) -> Node:
    return make(ops.RMSNorm(1e-6), x, gain or stored(8))


def linear(x: Node, out: int) -> Node:
    return make(ops.Linear(), x, stored(out, 8))


def weights(found: Graph) -> list[torch.Tensor]:
    return [n.op.weight.dense() for n in found.parameters if isinstance(n.op, ops.Parameter)]


def test_writers_and_readers_turn_together() -> None:
    x = embedded()
    x = add(x, linear(normed(x), 8))
    after = run(RotateStream(), graph(linear(normed(mul(x, 2.0)), 5)))
    table, gain, inner, *_ = weights(after)
    turn = random_hadamard(8, 0)
    torch.testing.assert_close(table, turn(weights(graph(x))[0]).float())
    assert bool((gain == 1).all())
    assert inner.shape == (8, 8)


@pytest.mark.parametrize(
    "touch",
    [
        lambda x: linear(make(ops.Unary("tanh"), x), 5),
        lambda x: mul(x, stored(8)),
        lambda x: add(x, 1.0),
        lambda x: make(ops.Reduce("max", (1,)), x),
        lambda x: x,
        lambda x: linear(make(ops.Softmax(1), x), 5),
    ],
    ids=["tanh", "vector", "constant", "maximum", "output", "softmax"],
)
def test_a_stream_that_something_else_touches_stays(touch: object) -> None:
    x = embedded()
    assert callable(touch)
    before = graph(linear(normed(x), 5), touch(x))
    assert apply(RotateStream(), before) is before


def test_a_gain_inside_the_stream_stays() -> None:
    x = embedded()
    stays(RotateStream(), linear(normed(add(x, normed(linear(x, 8)))), 5))


def test_layer_norms_become_rms_norms() -> None:
    x = embedded()
    norm = make(ops.LayerNorm(1e-5), add(x, stored(8)), stored(8), stored(8))
    after = run(RotateStream(), graph(linear(norm, 5)))
    kinds = [type(n.op) for n in after.nodes]
    assert ops.RMSNorm in kinds
    assert ops.LayerNorm not in kinds


def test_a_linear_that_reads_the_mean_keeps_layer_norms() -> None:
    x = embedded()
    norm = make(ops.LayerNorm(1e-5), x, stored(8), stored(8))
    before = graph(linear(norm, 5), linear(x, 5))
    assert apply(RotateStream(), before) is before


def test_a_channel_that_stands_out_is_spread() -> None:
    """What rotation is for: the table's largest value comes nearer to its typical one."""
    x = embedded()
    assert isinstance(x.inputs[1].op, ops.Parameter)
    x.inputs[1].op.weight.dense()[:, 3] *= 50
    table = weights(apply(RotateStream(), graph(linear(normed(x), 5))))[0]
    before = x.inputs[1].op.weight.dense()
    peak = [float(w.abs().max() / w.square().mean().sqrt()) for w in (before, table)]
    assert peak[1] < 0.75 * peak[0]


def test_gains_fold_into_all_readers_or_none() -> None:
    x = embedded()
    norm = normed(x)
    folded = run(FoldGains(), graph(linear(norm, 5), linear(norm, 6)))
    assert all(is_plain(n) for n in folded.nodes if isinstance(n.op, ops.RMSNorm))
    stays(FoldGains(), add(linear(norm, 8), norm))


def test_the_toy_is_rotated() -> None:
    before = block_graph()
    after = run(RotateStream(), before)
    gains = [n.inputs[1] for n in after.nodes if isinstance(n.op, ops.RMSNorm)]
    assert all(bool((w.op.weight.dense() == 1).all()) for w in gains
               if isinstance(w.op, ops.Parameter))  # fmt: skip
    tied = [n.inputs[1] for n in before.nodes if isinstance(n.op, ops.Embedding)]
    assert len({n.inputs[1] for n in before.nodes if isinstance(n.op, ops.Linear)} & set(tied)) == 1
    assert CHANNELS == 48
