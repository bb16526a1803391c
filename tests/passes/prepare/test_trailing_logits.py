"""Logits of the last positions alone, and what is computed for them alone."""

import pytest
import torch

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.node import Node, make
from qc.passes.prepare.explicit_cache import ExplicitCache
from qc.passes.prepare.trailing_logits import KEEP, TrailingLogits
from tests.passes.lift.drawing import (
    BATCH,
    SEQ,
    add,
    apply,
    arange,
    graph,
    mul,
    reshape,
    run,
    stored,
    unary,
    value,
)

X = value("x", BATCH, SEQ, 8)
W, GAIN = stored(30, 8), stored(8)


def last(x: Node, axis: int = 1) -> Node:
    return make(ops.Slice(axis, SEQ - KEEP, SEQ), x)


def logits(x: Node) -> Graph:
    return graph(x, names=("logits",))


def linear(x: Node, w: Node = W) -> Node:
    return make(ops.Linear(), x, w)


def attention(x: Node) -> Node:
    q, k, v = (reshape(linear(x, stored(8, 8)), BATCH, SEQ, 2, 4) for _ in "qkv")
    return make(ops.Attention(0.5, causal=True), q, k, v)


def test_the_slice_moves_to_the_input() -> None:
    before = mul(unary("tanh", linear(make(ops.RMSNorm(1e-6), X, GAIN))), 30.0)
    expected = mul(unary("tanh", linear(make(ops.RMSNorm(1e-6), last(X), GAIN))), 30.0)
    assert run(TrailingLogits(), logits(before)).same_as(logits(expected))


def test_the_slice_stops_behind_attention() -> None:
    attended = attention(X)
    before = linear(add(X, reshape(attended, BATCH, SEQ, 8)))
    expected = linear(add(last(X), reshape(last(attended), BATCH, KEEP, 8)))
    assert run(TrailingLogits(), logits(before)).same_as(logits(expected))


def test_the_slice_follows_the_positions_through_other_axes() -> None:
    before = make(ops.Permute((1, 0, 2)), unary("exp", make(ops.Permute((1, 0, 2)), X)))
    expected = make(ops.Permute((1, 0, 2)), unary("exp", make(ops.Permute((1, 0, 2)), last(X))))
    assert run(TrailingLogits(), logits(linear(before))).same_as(logits(linear(expected)))


def test_positions_are_counted_whole_and_taken_last() -> None:
    table = stored(50, 8)
    embedded = make(ops.Embedding(), reshape(arange(SEQ), 1, SEQ), table)
    expected = make(ops.Embedding(), reshape(last(arange(SEQ), 0), 1, KEEP), table)
    after = run(TrailingLogits(), logits(linear(add(X, embedded))))
    assert after.same_as(logits(linear(add(last(X), expected))))


def test_what_another_output_needs_stays_whole() -> None:
    hidden = unary("exp", X)
    after = run(TrailingLogits(), graph(linear(hidden), hidden, names=("logits", "hidden")))
    expected = graph(linear(last(hidden)), hidden, names=("logits", "hidden"))
    assert after.same_as(expected)


@pytest.mark.parametrize("keep", [1, 3, 9])
def test_as_many_positions_as_are_wanted(keep: int) -> None:
    before = logits(linear(add(X, reshape(attention(X), BATCH, SEQ, 8))))
    x = torch.randn(2, 9, 8)
    whole = evaluate(before, {"x": x})["logits"]
    some = evaluate(apply(TrailingLogits(), before), {"x": x}, {"keep": keep})["logits"]
    torch.testing.assert_close(some, whole[:, -keep:], rtol=1e-5, atol=1e-6)


def test_the_order_with_the_cache_does_not_matter() -> None:
    before = logits(linear(add(X, reshape(attention(X), BATCH, SEQ, 8))))
    first = apply(ExplicitCache(), apply(TrailingLogits(), before))
    assert first.same_as(apply(TrailingLogits(), apply(ExplicitCache(), before)))
    assert "present_key_0" in first.output_names


def test_only_logits_of_positions_are_cut() -> None:
    for before in (
        graph(linear(X), names=("last_hidden_state",)),
        logits(linear(make(ops.Reduce("mean", (1,)), X))),
        logits(linear(value("x", BATCH, 7, 8))),
    ):
        assert apply(TrailingLogits(), before) is before


def test_a_second_run_changes_nothing() -> None:
    once = apply(TrailingLogits(), logits(linear(X)))
    assert apply(TrailingLogits(), once) is once
