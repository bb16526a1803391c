"""Fused projections are taken apart where that is all that is read of them."""

import torch

from qc.ir import ops
from qc.ir.node import Node, make
from qc.passes.lift.fused_linears import SplitLinears
from tests.passes.lift.drawing import (
    BATCH,
    SEQ,
    add,
    concat,
    cut,
    graph,
    mul,
    reshape,
    run,
    stays,
    stored,
    unary,
    value,
)

X = value("x", BATCH, SEQ, 6)
W, B = stored(24, 6), stored(24)
FUSED = make(ops.Linear(), X, W, B)


def values(node: Node) -> torch.Tensor:
    assert isinstance(node.op, ops.Parameter)
    return node.op.weight.dense()


def test_parts_of_the_channels_get_linears_of_their_own() -> None:
    a, b, c = cut(FUSED, 0, 12), cut(FUSED, 12, 18), cut(FUSED, 18, 24)
    after = run(SplitLinears(), graph(mul(a, concat(b, c))))
    part = [make(ops.Linear(), X, stored(n, 6), stored(n)) for n in (12, 6, 6)]
    assert after.same_as(graph(mul(part[0], concat(part[1], part[2]))))
    first = next(n for n in after.parameters if n.tensor.shape == (12, 6))
    assert "w[0:12]" in str(after)
    assert values(first).data_ptr() == values(W).data_ptr()


def test_parts_of_every_head_get_their_rows() -> None:
    heads = reshape(FUSED, BATCH, SEQ, 4, 6)
    written = mul(cut(heads, 0, 3), cut(heads, 3, 6))
    after = run(SplitLinears(), graph(written))
    part = [reshape(make(ops.Linear(), X, stored(12, 6), stored(12)), BATCH, SEQ, 4, 3)
            for _ in range(2)]  # fmt: skip
    assert after.same_as(graph(mul(part[0], part[1])))
    expected = values(W).reshape(4, 6, 6)[:, 3:].reshape(12, 6)
    assert torch.equal(values(after.parameters[2]), expected)


def test_a_linear_that_is_also_read_whole_stays() -> None:
    stays(SplitLinears(), add(cut(FUSED, 0, 1), FUSED))
    stays(SplitLinears(), concat(cut(FUSED, 0, 12), unary("exp", FUSED)))


def test_parts_that_overlap_stay() -> None:
    stays(SplitLinears(), mul(cut(FUSED, 0, 20), cut(FUSED, 4, 24)))


def test_a_slice_of_positions_is_no_part() -> None:
    stays(SplitLinears(), cut(FUSED, 0, 2, axis=1))


def test_a_computed_weight_stays() -> None:
    linear = make(ops.Linear(), X, value("w", 24, 6))
    stays(SplitLinears(), mul(cut(linear, 0, 12), cut(linear, 12, 24)))
