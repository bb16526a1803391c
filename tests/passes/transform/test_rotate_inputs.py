"""Linears and their weights are rotated together, and nothing else is."""

import torch

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.hadamard import factor_for, rotate
from qc.ir.node import Node, Origin, make
from qc.passes.transform.rotate_inputs import RotateInputs
from tests.ir.toys import block_graph
from tests.passes.lift.drawing import BATCH, apply, becomes, graph, stays, stored, table, value


def linear(x: Node, weight: Node, module: str = "") -> Node:
    return make(ops.Linear(), x, weight, origin=Origin(module))


def count(graph: Graph) -> int:
    return sum(isinstance(node.op, ops.Hadamard) for node in graph.nodes)


def values(parameter: Node) -> torch.Tensor:
    assert isinstance(parameter.op, ops.Parameter)
    return parameter.op.weight.dense()


def test_a_linear_is_rotated() -> None:
    x, weight = value("x", BATCH, 24), stored(5, 24)
    turned = rotate(values(weight), factor_for(24), 24)
    rotated = make(ops.Hadamard(24), x, table(factor_for(24)))
    becomes(RotateInputs(), linear(x, weight), linear(rotated, table(turned)))
    after = apply(RotateInputs(), graph(linear(x, weight))).outputs[0]
    torch.testing.assert_close(values(after.inputs[1]), turned)


def test_a_bias_stays() -> None:
    x, weight, bias = value("x", BATCH, 6), stored(5, 6), stored(5)
    after = apply(RotateInputs(), graph(make(ops.Linear(), x, weight, bias)))
    assert after.outputs[0].inputs[2] is bias


def test_linears_that_share_an_input_share_its_rotation() -> None:
    after = apply(RotateInputs(), block_graph())
    assert count(after) == 5  # qkv, o, gate and up, down, head
    rotations = [n for n in after.nodes if isinstance(n.op, ops.Hadamard)]
    assert sorted(len(after.users[n]) for n in rotations) == [1, 1, 1, 2, 3]
    assert len({n.inputs[1] for n in rotations}) == 2  # one factor a size


def test_linears_that_share_a_weight_share_the_rotated_one() -> None:
    weight = stored(5, 8)
    after = apply(RotateInputs(), graph(*(linear(value(n, BATCH, 8), weight) for n in "xy")))
    assert after.outputs[0].inputs[1] is after.outputs[1].inputs[1]


def test_a_tied_table_stays_for_the_embedding() -> None:
    before = block_graph()
    tables = [[n.inputs[1] for n in g.nodes if isinstance(n.op, ops.Embedding)]
              for g in (before, apply(RotateInputs(), before))]  # fmt: skip
    assert tables[0] == tables[1]


def test_targets_are_searched_in_module_paths() -> None:
    assert count(apply(RotateInputs("gate|up"), block_graph())) == 1
    assert count(apply(RotateInputs("^down$"), block_graph())) == 1
    stays(RotateInputs("nothing"), linear(value("x", BATCH, 8), stored(5, 8)))


def test_other_readers_see_the_input_as_it_was() -> None:
    x = value("x", BATCH, 8)
    one = linear(x, stored(5, 8), "a")
    after = apply(RotateInputs("a"), graph(one, linear(x, stored(6, 8), "b")))
    assert isinstance(after.outputs[0].inputs[0].op, ops.Hadamard)
    assert after.outputs[1].inputs[0] is x


def test_inputs_that_are_no_multiple_of_the_block_stay() -> None:
    stays(RotateInputs(block=16), linear(value("x", BATCH, 24), stored(5, 24)))


def test_a_second_run_changes_nothing() -> None:
    once = apply(RotateInputs(), block_graph())
    assert apply(RotateInputs(), once).same_as(once)


def test_half_precision_weights_are_not_rounded_again() -> None:
    halves = table(torch.randn(5, 8).half())
    after = apply(RotateInputs(), graph(linear(value("x", BATCH, 8), halves)))
    rotated = values(after.outputs[0].inputs[1])
    expected = rotate(values(halves).double(), factor_for(8).double(), 8)
    torch.testing.assert_close(rotated.double(), expected, rtol=1e-6, atol=1e-6)
