"""Attention that is written out, with and without scale, cap, mask and repeated heads."""

from qc.ir import ops
from qc.ir.node import Node, make
from qc.passes.lift.attention import LiftAttention
from tests.passes.lift.drawing import (
    BATCH,
    SEQ,
    add,
    becomes,
    binary,
    expand,
    mul,
    number,
    permute,
    reshape,
    stays,
    unary,
    value,
)

Q, K, V = (value(name, BATCH, SEQ, 4, 8) for name in "qkv")
SWAP = (0, 2, 1, 3)


def matmul(a: Node, b: Node) -> Node:
    return make(ops.MatMul(), a, b)


def scores(k: Node = K) -> Node:
    return matmul(permute(Q, *SWAP), permute(k, 0, 2, 3, 1))


def weighted(weights: Node) -> Node:
    return matmul(make(ops.Softmax(3), weights), permute(V, *SWAP))


def attended(*mask: Node, scale: float = 1.0, softcap: float | None = None) -> Node:
    op = ops.Attention(scale, softcap=softcap)
    return permute(make(op, Q, K, V, *mask), *SWAP)


def test_plain_attention() -> None:
    becomes(LiftAttention(), weighted(scores()), attended())


def test_scale_may_multiply_or_divide() -> None:
    becomes(LiftAttention(), weighted(mul(scores(), 0.25)), attended(scale=0.25))
    becomes(LiftAttention(), weighted(binary("div", scores(), 8.0)), attended(scale=0.125))


def test_soft_cap_and_mask() -> None:
    mask = value("mask", BATCH, 1, SEQ, SEQ)
    capped = mul(unary("tanh", binary("div", mul(scores(), 0.25), 64.0)), 64.0)
    expected = attended(mask, scale=0.25, softcap=64.0)
    becomes(LiftAttention(), weighted(add(capped, mask)), expected)
    becomes(LiftAttention(), weighted(add(mask, capped)), expected)


def test_a_choice_is_a_mask() -> None:
    visible = binary("gt", value("mask", 1, 1, SEQ, SEQ), -2.0)
    lowest = number(-3.4e38)
    kept = make(ops.Where(), visible, scores(), lowest)
    becomes(LiftAttention(), weighted(kept), attended(visible))


def test_a_choice_of_what_to_hide_is_a_mask() -> None:
    hidden = binary("gt", value("mask", 1, 1, SEQ, SEQ), 2.0)
    kept = make(ops.Where(), hidden, number(-3.4e38), scores())
    becomes(LiftAttention(), weighted(kept), attended(unary("not", hidden)))


def repeated(x: Node, times: int) -> Node:
    batch, heads, seq, dim = x.tensor.shape
    wide = expand(reshape(x, batch, heads, 1, seq, dim), batch, heads, times, seq, dim)
    return reshape(wide, batch, heads * times, seq, dim)


def test_repeated_heads_are_grouped() -> None:
    k, v = (value(name, BATCH, SEQ, 2, 8) for name in "kv")
    wide = [permute(repeated(permute(x, *SWAP), 2), *SWAP) for x in (k, v)]
    grouped = make(ops.Attention(0.25, causal=True), Q, k, v)
    becomes(LiftAttention(), make(ops.Attention(0.25, causal=True), Q, *wide), grouped)


def test_repeated_heads_of_written_attention_are_grouped() -> None:
    k, v = (value(name, BATCH, SEQ, 2, 8) for name in "kv")
    k_wide, v_wide = (repeated(permute(x, *SWAP), 2) for x in (k, v))
    weights = make(ops.Softmax(3), matmul(permute(Q, *SWAP), permute(k_wide, 0, 1, 3, 2)))
    expected = permute(make(ops.Attention(1.0), Q, k, v), *SWAP)
    becomes(LiftAttention(), matmul(weights, v_wide), expected)


def test_what_only_looks_like_attention_stays() -> None:
    stays(LiftAttention(), matmul(make(ops.Softmax(2), scores()), permute(V, *SWAP)))
    stays(LiftAttention(), matmul(scores(), permute(V, *SWAP)))
    stays(LiftAttention(), weighted(unary("exp", scores())))
    shown = make(ops.Where(), binary("gt", value("m", 1, 1, SEQ, SEQ), 0.0), scores(), number(-9.0))
    stays(LiftAttention(), weighted(shown))


def test_a_cycle_of_heads_is_no_group() -> None:
    k, v = (value(name, BATCH, SEQ, 2, 8) for name in "kv")
    wide = [reshape(expand(reshape(x, BATCH, SEQ, 1, 2, 8), BATCH, SEQ, 2, 2, 8), BATCH, SEQ, 4, 8)
            for x in (k, v)]  # fmt: skip
    stays(LiftAttention(), make(ops.Attention(1.0), Q, *wide))
