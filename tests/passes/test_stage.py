"""Stages say which node breaks which law, where, with graph around it."""

from dataclasses import replace

import pytest
import torch

from qc.errors import StageError
from qc.ir import ops
from qc.ir.node import Node, Origin, make
from qc.ir.types import ActivationFormat, TensorType
from qc.passes.plan.fuse import PLANNED
from qc.passes.stage import CANONICAL, CAPTURED, QUANTIZED
from tests.ir.toys import block_graph
from tests.passes.lift.drawing import graph, unary, value


def test_a_sound_graph_passes_every_stage_it_has_reached() -> None:
    toy = block_graph()
    for stage in (CAPTURED, CANONICAL, QUANTIZED):
        stage.check(toy)


def test_a_wrong_type_is_found_with_its_origin_and_a_caret() -> None:
    x = value("x", 3)
    wrong = Node(ops.Unary("exp"), (x,), TensorType((4,)), Origin("model.act"))
    with pytest.raises(StageError) as caught:
        CAPTURED.check(graph(unary("sin", wrong)))
    message = str(caught.value)
    assert "not a captured graph: exp gives f32[3], not f32[4] at model.act" in message
    lines = message.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("%1 = exp(%0)"))
    assert set(lines[at + 1]) == {"^"}


def test_an_op_that_refuses_its_inputs_is_found() -> None:
    x = value("x", 3)
    wrong = replace(unary("exp", x), op=ops.Softmax(0), inputs=(value("i", 3, dtype=torch.int64),))
    with pytest.raises(StageError, match="does not accept its inputs: expected floating-point"):
        CAPTURED.check(graph(wrong))


def test_the_weights_of_linears_are_stored() -> None:
    linear = make(ops.Linear(), value("x", 2, 3), value("w", 4, 3), origin=Origin("model.head"))
    CAPTURED.check(graph(linear))
    with pytest.raises(StageError, match=r"weight of a linear is computed.* at model\.head"):
        CANONICAL.check(graph(linear))


def test_only_linears_read_quantized_values() -> None:
    quantized = make(ops.Quantize(ActivationFormat()), value("x", 2, 3))
    reshaped = make(ops.Reshape((6,)), quantized)
    with pytest.raises(StageError, match="reshape reads a quantized activation"):
        QUANTIZED.check(graph(reshaped))


def test_planned_graphs_hold_kernels_views_and_calls() -> None:
    x = value("x", 2, 3)
    PLANNED.check(graph(make(ops.Reshape((6,)), x)))
    with pytest.raises(StageError, match="not a planned graph: unary belongs to no kernel"):
        PLANNED.check(graph(unary("exp", x)))
