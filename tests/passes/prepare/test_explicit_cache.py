"""The cache as inputs and outputs: step by step the same, and only where that is possible."""

import pytest
import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.node import Node, make
from qc.ir.types import TensorType
from qc.passes.prepare.explicit_cache import PAST, ExplicitCache, empty_cache
from tests.passes.lift.drawing import (
    BATCH,
    SEQ,
    add,
    apply,
    arange,
    binary,
    concat,
    cut,
    graph,
    mean,
    mul,
    reshape,
    run,
    stored,
    table,
    value,
)

IDS = value("ids", BATCH, SEQ, dtype=torch.int64)
CAUSAL = ops.Attention(0.25, causal=True)
WINDOWED = ops.Attention(0.25, causal=True, window=4)
EVERYTHING = ops.Attention(0.25)


def layer(x: Node, op: ops.Attention = CAUSAL) -> Node:
    """Build attention with a residual over x [batch, seq, 8]."""
    q, k, v = (reshape(make(ops.Linear(), x, stored(8, 8)), BATCH, SEQ, 2, 4) for _ in "qkv")
    return add(x, reshape(make(op, q, k, v), BATCH, SEQ, 8))


def model(*operators: ops.Attention) -> Node:
    """Build embeddings of ids and positions, and layers behind them."""
    positions = make(ops.Embedding(), reshape(arange(SEQ, 1), 1, SEQ), stored(50, 8))
    x = add(make(ops.Embedding(), IDS, stored(40, 8)), positions)
    for op in operators:
        x = layer(x, op)
    return x


def logits(x: Node) -> Graph:
    return graph(x, names=("logits",))


def in_steps(with_cache: Graph, ids: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Evaluate a graph with a cache over parts of `ids`."""
    past, parts, done = empty_cache(with_cache, len(ids)), [], 0
    for length in steps:
        results = evaluate(with_cache, {"ids": ids[:, done : done + length], **past})
        parts.append(results.pop("logits"))
        past = {name.replace("present", "past"): cache for name, cache in results.items()}
        done += length
    return torch.cat(parts, 1)


def test_one_attention() -> None:
    q, k, v = (value(name, BATCH, SEQ, 2, 4) for name in "qkv")
    after = apply(ExplicitCache(torch.float16), logits(make(CAUSAL, q, k, v)))
    past = [make(ops.Input(name, TensorType((BATCH, PAST, 2, 4), torch.float16)))
            for name in ("past_key_0", "past_value_0")]  # fmt: skip
    present = (make(ops.Append(), past[0], k), make(ops.Append(), past[1], v))
    names = ("logits", "present_key_0", "present_value_0")
    expected = Graph((k, q, v, *past), (make(CAUSAL, q, *present), *present), names)
    assert after.same_as(expected), str(after)


@pytest.mark.parametrize("op", [CAUSAL, WINDOWED])
def test_steps_give_what_the_whole_gives(op: ops.Attention) -> None:
    before = logits(model(op, CAUSAL))
    after = run(ExplicitCache(), before)
    ids = torch.randint(0, 40, (2, 14))
    expected = evaluate(before, {"ids": ids})["logits"]
    for steps in ((14,), (13, 1), (1,) * 14, (5, 1, 1, 7)):
        torch.testing.assert_close(in_steps(after, ids, steps), expected, rtol=1e-5, atol=1e-5)


def test_a_table_is_read_from_the_past_on() -> None:
    positions = cut(table(torch.randn(1, 50, 8)), 0, SEQ, axis=1)
    before = logits(layer(add(make(ops.Embedding(), IDS, stored(40, 8)), positions)))
    after = run(ExplicitCache(), before)
    ids = torch.randint(0, 40, (2, 9))
    expected = evaluate(before, {"ids": ids})["logits"]
    torch.testing.assert_close(in_steps(after, ids, (4, 1, 4)), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_said_to_be_lossy() -> None:
    assert ExplicitCache(torch.float32).exact
    assert not ExplicitCache(torch.float16).exact
    before = logits(model(CAUSAL))
    ids = torch.randint(0, 40, (2, 9))
    expected = evaluate(before, {"ids": ids})["logits"]
    halved = apply(ExplicitCache(torch.float16), before)
    torch.testing.assert_close(in_steps(halved, ids, (4, 5)), expected, rtol=1e-2, atol=1e-2)


X = model(CAUSAL)
FLIPPED = concat(cut(X, 4, 8), cut(X, 0, 4))


@pytest.mark.parametrize(
    "mixing",
    [
        model(EVERYTHING),
        model(CAUSAL, EVERYTHING),
        add(X, make(ops.Reduce("mean", (1,), keepdim=True), X)),
        make(ops.CumSum(1), X),
        make(ops.Softmax(1), X),
        concat(X, X, axis=1),
        cut(X, 0, 1, axis=1),
        reshape(X, SEQ, BATCH, 8),
        mul(X, make(ops.Cast(torch.float32), make(ops.Size(SEQ)))),
        make(ops.MatMul(), X, make(ops.Permute((0, 2, 1)), X)),
        make(ops.Torch("aten.flip.default", (ops.Operand(0), (1,)), (), X.tensor), X),
        add(X, make(ops.Cast(torch.float32), reshape(arange(SEQ, SEQ), SEQ, 1))),
    ],
)
def test_what_mixes_positions_has_no_cache(mixing: Node) -> None:
    before = logits(mixing)
    assert apply(ExplicitCache(), before) is before


@pytest.mark.parametrize(
    "local",
    [
        mean(X),
        FLIPPED,
        make(ops.Softmax(2), X),
        make(ops.Reduce("max", (2,)), X),
        make(ops.MatMul(), X, stored(8, 3)),
        make(ops.Permute((1, 2, 0)), X),
        make(ops.Expand((3, BATCH, SEQ, 8)), X),
        add(X, make(ops.Cast(torch.float32), reshape(arange(SEQ), SEQ, 1))),
        add(X, make(ops.Full((SEQ, 8), 2.0))),
        make(ops.Where(), binary("gt", X, 0.0), X, mul(X, 0.5)),
    ],
)
def test_what_treats_positions_alone_has_a_cache(local: Node) -> None:
    after = run(ExplicitCache(), logits(local))
    assert after.output_names == ("logits", "present_key_0", "present_value_0")


def test_a_mask_that_stayed_an_operand_forbids_a_cache() -> None:
    q, k, v = (value(name, BATCH, SEQ, 2, 4) for name in "qkv")
    before = logits(make(CAUSAL, q, k, v, value("mask", 1, 1, SEQ, SEQ)))
    assert apply(ExplicitCache(), before) is before


def test_a_graph_without_attention_stays() -> None:
    before = logits(make(ops.Linear(), value("x", BATCH, SEQ, 8), stored(8, 8)))
    assert apply(ExplicitCache(), before) is before
