"""Positions are decided by their values, however they are computed."""

import pytest
import torch

from qc.ir import ops
from qc.ir.node import Node, make
from qc.passes.lift.positions import LiftPositions
from tests.passes.lift.drawing import (
    BATCH,
    SEQ,
    add,
    arange,
    becomes,
    binary,
    cut,
    expand,
    mul,
    reshape,
    stays,
    stored,
    table,
    value,
)

TABLE = stored(50, 8)
IDS = value("ids", BATCH, SEQ, dtype=torch.int64)


def embedded(ids: Node) -> Node:
    """Read the positions beside an input, which says what the symbols are."""
    return add(make(ops.Embedding(), IDS, TABLE), make(ops.Embedding(), ids, TABLE))


def running_sum(more: int) -> Node:
    ones = make(ops.Full((BATCH, SEQ), 1.0))
    counted = mul(make(ops.CumSum(1), ones), ones)
    return add(make(ops.Cast(torch.int64), binary("sub", counted, 1.0)), more)


def test_a_running_sum_is_a_count() -> None:
    counted = expand(reshape(arange(SEQ, 2), 1, SEQ), BATCH, SEQ)
    becomes(LiftPositions(), embedded(running_sum(2)), embedded(counted))


def test_a_count_with_a_large_offset() -> None:
    offset = reshape(add(arange(SEQ), 30), 1, SEQ)
    becomes(LiftPositions(), embedded(offset), embedded(reshape(arange(SEQ, 30), 1, SEQ)))


def test_a_stored_count_is_a_count() -> None:
    positions = table(torch.arange(100).unsqueeze(0))
    becomes(
        LiftPositions(), embedded(cut(positions, 0, SEQ)), embedded(reshape(arange(SEQ), 1, SEQ))
    )


def test_equal_integers_are_one_value() -> None:
    zeros = table(torch.zeros(1, 64, dtype=torch.int64))
    expected = make(ops.Full((1, SEQ), 0, torch.int64))
    becomes(LiftPositions(), embedded(cut(zeros, 0, SEQ)), embedded(expected))


broken = torch.arange(100)
broken[90] = 3


@pytest.mark.parametrize(
    "positions",
    [
        reshape(arange(SEQ), 1, SEQ),
        mul(reshape(arange(SEQ), 1, SEQ), 2),
        binary("min", reshape(arange(SEQ), 1, SEQ), 40),  # counts until 40
        binary("floordiv", reshape(arange(SEQ), 1, SEQ), 4096),  # zero for a long time
        cut(table(broken.unsqueeze(0)), 0, SEQ),
        binary("max", IDS, 0),
    ],
)
def test_what_does_not_count_stays(positions: Node) -> None:
    stays(LiftPositions(), embedded(positions))
