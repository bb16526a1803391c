"""Graphs: order, users, comparison, views; and the same on graphs too deep to recurse into."""

from dataclasses import replace

import networkx as nx
import pytest
import torch

from qc.ir import ops
from qc.ir.graph import Graph, map_nodes
from qc.ir.meaning import evaluate
from qc.ir.node import Node, Origin, make
from qc.ir.rewrite import rewrite, substitute, with_inputs
from qc.ir.types import TensorType, TupleType
from tests.ir.toys import Block, block_graph
from tests.passes.lift.drawing import add, graph, mul, number, unary, value

DEEP = 5_000


def chain(length: int) -> Graph:
    node = value("x", 2)
    for _ in range(length):
        node = unary("neg", node)
    return graph(node)


def test_operands_come_before_users() -> None:
    toy = block_graph()
    assert all(toy.positions[i] < toy.positions[n] for n in toy.nodes for i in n.inputs)
    assert toy.nodes[0] is toy.inputs[0]
    assert len(set(toy.nodes)) == len(toy.nodes)


def test_a_deep_graph_needs_no_recursion() -> None:
    deep = chain(DEEP)
    assert len(deep.nodes) == DEEP + 1
    assert deep.same_as(map_nodes(deep, lambda node, inputs: with_inputs(node, inputs)))
    assert rewrite(deep, [lambda node: None]).same_as(deep)
    assert substitute(deep, {deep.outputs[0]: deep.outputs[0]}).same_as(deep)
    assert torch.equal(evaluate(deep, {"x": torch.ones(2)})["out0"], torch.ones(2))
    assert nx.dag_longest_path_length(deep.to_networkx()) == DEEP
    assert str(deep).count("\n") == DEEP + 1


def test_shared_nodes_are_visited_once() -> None:
    node = value("x", 2)
    for _ in range(100):  # 2^100 paths
        node = add(node, node)
    assert len(graph(node).nodes) == 101


def test_users_read_a_node_once_each() -> None:
    x = value("x", 2)
    twice, other = add(x, x), unary("neg", x)
    found = graph(twice, other).users
    assert found[x] == (twice, other)
    assert found[twice] == ()


def test_inputs_and_outputs_have_names() -> None:
    toy = block_graph()
    assert toy.input("ids") is toy.inputs[0]
    assert toy.output("logits") is toy.outputs[0]
    with pytest.raises(KeyError):
        toy.input("pixels")


def test_equal_structure_is_the_same_whatever_the_origin_and_the_values() -> None:
    x = value("x", 2)
    here, there = (make(ops.Unary("exp"), x, origin=Origin(name)) for name in ("a", "b"))
    assert graph(here).same_as(graph(there))
    assert block_graph(0).same_as(block_graph(1))


def test_what_differs_is_not_the_same() -> None:
    x, y = value("x", 2), value("y", 2)
    one = Graph((x, y), (ops_sub(x, y),), ("out",))
    assert not one.same_as(Graph((x, y), (ops_sub(y, x),), ("out",)))
    assert not one.same_as(Graph((y, x), (ops_sub(x, y),), ("out",)))
    assert not one.same_as(replace(one, output_names=("other",)))
    assert not graph(mul(x, 2.0)).same_as(graph(mul(x, 3.0)))
    assert not graph(mul(x, number(2))).same_as(graph(mul(x, number(2.0))))


def ops_sub(a: Node, b: Node) -> Node:
    return make(ops.Binary("sub"), a, b)


def test_networkx_edges_carry_the_operand() -> None:
    x, y = value("x", 2), value("y", 2)
    difference = ops_sub(x, y)
    view = graph(difference).to_networkx()
    assert {(a, b, data["index"]) for a, b, data in view.edges(data=True)} == {
        (x, difference, 0),
        (y, difference, 1),
    }
    assert not list(nx.simple_cycles(view))


def test_several_results_have_no_tensor_type() -> None:
    several = Node(ops.Torch("aten.topk.default", ()), (), TupleType(()), Origin("model.router"))
    with pytest.raises(TypeError, match="several results"):
        _ = several.tensor


def test_the_origin_is_that_of_the_value() -> None:
    toy = Block()
    x = make(ops.Embedding(), toy.ids, toy.table, origin=Origin("embed"))
    assert make(ops.Unary("exp"), x).origin == Origin("embed")
    assert str(x.origin.touched_by("lift").touched_by("lift")) == "embed -> lift"


def test_types_are_checked_when_a_node_is_made() -> None:
    x, w = value("x", 2, 8), value("w", 3, 7)
    with pytest.raises(ValueError, match=r"a linear with weight f32\[3, 7\] does not take"):
        make(ops.Linear(), x, w)
    assert make(ops.Linear(), x, value("v", 3, 8)).type == TensorType((2, 3))
