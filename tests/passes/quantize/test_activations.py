"""Activations in front of coded linears are quantized once, and only there."""

import torch

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.node import make
from qc.ir.target import Target
from qc.ir.types import ActivationFormat
from qc.ir.weights.grouped import GroupedFormat
from qc.passes.pipeline import Context, Pass, Pipeline
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.round_to_nearest import RoundToNearest
from tests.ir.toys import block_graph, some_ids
from tests.passes.lift.drawing import BATCH, graph, stored, value

INT8 = QuantizeActivations(ActivationFormat(8, 32))


def run(before: Graph, *passes: Pass) -> Graph:
    return Pipeline(passes).run(before, Context(Target("any", "any")))


def rounded() -> Graph:
    return run(block_graph(), RoundToNearest(GroupedFormat(4, 32)))


def count(graph: Graph, op: type) -> int:
    return sum(isinstance(node.op, op) for node in graph.nodes)


def test_linears_that_share_an_input_share_the_codes() -> None:
    after = run(rounded(), INT8)
    assert count(after, ops.Linear) == 8
    assert count(after, ops.Quantize) == 5  # qkv, o, gate and up, down, head
    quantized = [n for n in after.nodes if isinstance(n.op, ops.Quantize)]
    assert sorted(len(after.users[n]) for n in quantized) == [1, 1, 1, 2, 3]


def test_every_coded_linear_reads_codes() -> None:
    after = run(rounded(), INT8)
    for node in after.nodes:
        if isinstance(node.op, ops.Linear):
            assert node.inputs[0].tensor.format == ActivationFormat(8, 32)


def test_dense_linears_keep_their_input() -> None:
    before = block_graph()
    assert run(before, INT8).same_as(before)


def test_a_second_run_changes_nothing() -> None:
    once = run(rounded(), INT8)
    assert run(once, INT8).same_as(once)


def test_origins_name_the_pass() -> None:
    after = run(rounded(), INT8)
    assert all(
        node.origin.passes[-1] == "quantize_activations"
        for node in after.nodes
        if isinstance(node.op, ops.Quantize | ops.Linear)
    )


def test_other_readers_see_the_unrounded_value() -> None:
    x = value("x", BATCH, 32)
    y = make(ops.Unary("exp"), x)
    before = graph(make(ops.Linear(), y, stored(8, 32)), y)
    after = run(before, RoundToNearest(GroupedFormat(4, 32)), INT8)
    assert after.outputs[1].op == ops.Unary("exp")
    assert isinstance(after.outputs[0].inputs[0].op, ops.Quantize)


def test_int8_activations_are_near_float_ones() -> None:
    before, inputs = rounded(), some_ids()
    left, right = (evaluate(g, inputs)["logits"] for g in (before, run(before, INT8)))
    assert 0 < float((left - right).norm() / left.norm()) < 0.03


def test_one_scale_a_token() -> None:
    after = run(rounded(), QuantizeActivations(ActivationFormat(8, None)))
    quantize = next(n for n in after.nodes if isinstance(n.op, ops.Quantize))
    assert str(quantize.op.format) == "int8/token"  # type: ignore[attr-defined]
    assert torch.isfinite(evaluate(after, some_ids())["logits"]).all()
