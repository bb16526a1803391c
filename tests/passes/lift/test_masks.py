"""Masks are decided by what they hide, however they are computed."""

import pytest
import torch

from qc.ir import ops
from qc.ir.node import Node, make
from qc.ir.types import TensorType
from qc.passes.lift.masks import LiftMasks
from tests.passes.lift.drawing import (
    BATCH,
    SEQ,
    add,
    apply,
    arange,
    becomes,
    binary,
    cut,
    expand,
    graph,
    number,
    reshape,
    stays,
    table,
    unary,
    value,
)

Q, K, V = (value(name, BATCH, SEQ, 4, 8) for name in "qkv")
QUERY, KEY = reshape(arange(SEQ), 1, 1, SEQ, 1), reshape(arange(SEQ), 1, 1, 1, SEQ)
CAUSAL = binary("le", KEY, QUERY)
LOWEST = number(-3.4028234663852886e38)


def masked(mask: Node) -> Node:
    return make(ops.Attention(0.25), Q, K, V, mask)


def lifted(causal: bool = True, window: int | None = None) -> Node:
    return make(ops.Attention(0.25, causal, window), Q, K, V)


def within(window: int) -> Node:
    return binary("and", CAUSAL, binary("gt", KEY, binary("sub", QUERY, window)))


def test_everything_is_visible() -> None:
    shown = expand(binary("ge", QUERY, 0), BATCH, 1, SEQ, SEQ)
    becomes(LiftMasks(), masked(shown), lifted(causal=False))


@pytest.mark.parametrize(
    "mask",
    [
        CAUSAL,
        expand(CAUSAL, BATCH, 1, SEQ, SEQ),
        unary("not", binary("gt", KEY, QUERY)),
        make(ops.Where(), CAUSAL, number(0.0), LOWEST),
        make(ops.Where(), CAUSAL, number(0.0), number(float("-inf"))),
    ],
)
def test_causal_masks(mask: Node) -> None:
    becomes(LiftMasks(), masked(mask), lifted())


@pytest.mark.parametrize("window", [3, 8, 64, 4096, 32768])
def test_windows_small_and_large(window: int) -> None:
    becomes(LiftMasks(), masked(within(window)), lifted(window=window))


def test_windows_that_count_their_own_position() -> None:
    distance = binary("sub", QUERY, KEY)
    for window in (8, 1024):
        mask = binary("and", CAUSAL, binary("le", distance, window))
        becomes(LiftMasks(), masked(mask), lifted(window=window + 1))


def test_a_constant_without_a_role_is_no_window() -> None:
    mask = binary("and", CAUSAL, binary("ge", add(QUERY, 4096), 0))
    becomes(LiftMasks(), masked(mask), lifted())


def test_a_stored_triangle_is_a_causal_mask() -> None:
    triangle = table(torch.ones(100, 100, dtype=torch.bool).tril())
    becomes(LiftMasks(), masked(cut(cut(triangle, 0, SEQ), 0, SEQ, axis=0)), lifted())


def test_a_call_that_is_not_understood_is_computed() -> None:
    ones = make(ops.Full((SEQ, SEQ), 1.0))
    type = TensorType((SEQ, SEQ))
    call = make(ops.Torch("aten.tril.default", (ops.Operand(0),), (), type), ones)
    becomes(LiftMasks(), masked(make(ops.Cast(torch.bool), call)), lifted())


def test_a_mask_joins_what_is_hidden_already() -> None:
    before = make(ops.Attention(0.25, causal=True), Q, K, V, within(8))
    becomes(LiftMasks(), before, lifted(window=8))


def chunked(size: int) -> Node:
    same = binary("eq", binary("floordiv", QUERY, size), binary("floordiv", KEY, size))
    return binary("and", CAUSAL, same)


@pytest.mark.parametrize(
    "mask",
    [
        chunked(4),
        chunked(8192),  # looks causal wherever a sequence is shorter
        binary("and", CAUSAL, binary("gt", value("valid", BATCH, 1, 1, SEQ), -9.0)),
        binary("ge", KEY, QUERY),
        make(ops.Where(), CAUSAL, number(0.0), number(-9.0)),  # hides a little
        make(ops.Cast(torch.float32), binary("sub", KEY, QUERY)),  # a bias of positions
        binary("and", within(8), binary("le", binary("sub", QUERY, KEY), 4096)),  # two windows
    ],
)
def test_masks_that_are_something_else(mask: Node) -> None:
    stays(LiftMasks(), masked(mask))


def test_a_mask_that_hides_a_whole_row_stays() -> None:
    before = graph(masked(binary("lt", KEY, QUERY)))  # the first row would be NaN
    assert apply(LiftMasks(), before).same_as(before)


def test_a_broken_triangle_is_seen_far_out() -> None:
    broken = torch.ones(100, 100, dtype=torch.bool).tril()
    broken[97, 3] = False
    stays(LiftMasks(), masked(cut(cut(table(broken), 0, SEQ), 0, SEQ, axis=0)))


def test_sizes_known_when_compiling_need_no_symbols() -> None:
    q, k, v = (value(name, BATCH, 17, 4, 8) for name in "qkv")
    mask = binary("le", reshape(arange(17), 1, 17), reshape(arange(17), 17, 1))
    before = make(ops.Attention(0.25), q, k, v, mask)
    becomes(LiftMasks(), before, make(ops.Attention(0.25, causal=True), q, k, v))
