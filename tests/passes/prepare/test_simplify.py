"""Each rule as an equation, and what simplifying a whole graph leaves."""

from collections.abc import Callable

import pytest
import torch

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.node import Node, make
from qc.ir.target import Target
from qc.ir.types import Dim, TensorType, symbol
from qc.ir.weights.dense import dense_weight
from qc.passes.pipeline import Context
from qc.passes.prepare.sharing import share
from qc.passes.prepare.simplify import Simplify

BATCH, SEQ = symbol("batch"), symbol("seq")
X = make(ops.Input("x", TensorType((BATCH, SEQ, 8))))
MASK = make(ops.Input("mask", TensorType((BATCH, SEQ), torch.bool)))
IDS = make(ops.Input("ids", TensorType((BATCH, SEQ), torch.int64)))
GAIN = make(ops.Parameter(dense_weight("gain", torch.arange(8.0))))


def simplified(node: Node) -> Node:
    graph = Graph((X, MASK, IDS), (node,), ("y",))
    return Simplify().run(graph, Context(Target("any", "any"))).outputs[0]


def equal(node: Node, expected: Node) -> bool:
    graphs = (Graph((X, MASK, IDS), (n,), ("y",)) for n in (simplified(node), expected))
    return next(graphs).same_as(next(graphs))


def number(value: float | int | bool) -> Node:
    kinds = {bool: torch.bool, int: torch.int64, float: torch.float32}
    return make(ops.Scalar(value, kinds[type(value)]))


def binary(kind: str, a: Node, b: Node) -> Node:
    return make(ops.Binary(kind), a, b)


def full(shape: tuple[Dim, ...], value: float | int | bool, dtype: torch.dtype) -> Node:
    return make(ops.Full(shape, value, dtype))


NOTHING: dict[str, Callable[[], Node]] = {
    "reshape": lambda: make(ops.Reshape((BATCH, SEQ, 8)), X),
    "reshape there and back": lambda: make(
        ops.Reshape((BATCH, SEQ, 8)), make(ops.Reshape((BATCH * SEQ, 8)), X)
    ),
    "permute": lambda: make(ops.Permute((0, 1, 2)), X),
    "permute there and back": lambda: make(ops.Permute((2, 0, 1)), make(ops.Permute((1, 2, 0)), X)),
    "expand": lambda: make(ops.Expand((BATCH, SEQ, 8)), X),
    "cast": lambda: make(ops.Cast(torch.float32), X),
    "slice": lambda: make(ops.Slice(1, 0, SEQ), X),
    "concat": lambda: make(ops.Concat(0), X),
    "slice of a part": lambda: make(ops.Slice(1, SEQ, 2 * SEQ), make(ops.Concat(1), X, X)),
    "add": lambda: binary("add", X, number(0.0)),
    "add first": lambda: binary("add", number(0), X),
    "sub": lambda: binary("sub", X, number(0.0)),
    "mul": lambda: binary("mul", number(1.0), X),
    "div": lambda: binary("div", X, number(1)),
    "pow": lambda: binary("pow", X, number(1.0)),
    "mul by filled": lambda: binary("mul", X, full((SEQ, 8), 1.0, torch.float32)),
    "where": lambda: make(ops.Where(), number(True), X, number(1.0)),
    "where not": lambda: make(ops.Where(), full((8,), False, torch.bool), number(1.0), X),
}


@pytest.mark.parametrize("name", NOTHING)
def test_without_effect(name: str) -> None:
    assert simplified(NOTHING[name]()) is X


def test_true_is_neutral_for_and() -> None:
    assert simplified(binary("and", number(True), MASK)) is MASK
    assert simplified(binary("or", MASK, number(False))) is MASK
    assert simplified(binary("and", MASK, MASK)) is MASK


def test_what_has_an_effect_stays() -> None:
    for node in (
        binary("sub", number(0.0), X),
        binary("div", number(1.0), X),
        binary("or", number(True), MASK),
        binary("add", X, full((3, BATCH, SEQ, 8), 0.0, torch.float32)),
        binary("mul", IDS, number(1.0)),  # makes floats of integers
    ):
        assert simplified(node).op == node.op


def test_merged() -> None:
    inner = make(ops.Slice(2, 2, 8), X)
    assert equal(make(ops.Slice(2, 1, 3), inner), make(ops.Slice(2, 3, 5), X))
    wide = make(ops.Expand((2, BATCH, SEQ, 8)), X)
    assert equal(
        make(ops.Expand((3, 2, BATCH, SEQ, 8)), wide), make(ops.Expand((3, 2, BATCH, SEQ, 8)), X)
    )
    permuted = make(ops.Permute((1, 0, 2)), X)
    assert equal(make(ops.Permute((0, 2, 1)), permuted), make(ops.Permute((1, 2, 0)), X))


def test_constants_are_computed() -> None:
    gain = simplified(binary("mul", X, binary("add", GAIN, number(1.0)))).inputs[1]
    assert isinstance(gain.op, ops.Parameter)
    assert torch.equal(gain.op.weight.dense(), torch.arange(8.0) + 1)
    assert gain.op.weight.name != "gain"
    assert equal(binary("mul", number(2), number(3)), number(6))
    assert equal(make(ops.Size(4)), number(4))
    assert equal(make(ops.Cast(torch.float32), number(3)), number(3.0))


def test_large_parameters_are_not_computed() -> None:
    table = make(ops.Parameter(dense_weight("table", torch.empty(1 << 12, 1 << 9))))
    doubled = binary("mul", table, number(2.0))
    assert simplified(doubled).op == doubled.op


def test_an_infinite_constant_is_not_computed() -> None:
    assert isinstance(simplified(binary("div", number(1.0), number(0.0))).op, ops.Binary)


def test_filled_tensors_move() -> None:
    ones = full((SEQ,), 1, torch.int64)
    assert equal(
        make(ops.Cast(torch.float32), make(ops.Reshape((1, SEQ)), ones)),
        full((1, SEQ), 1.0, torch.float32),
    )
    counted = make(ops.Slice(0, 1, SEQ), make(ops.Arange(SEQ)))
    assert equal(counted, make(ops.Arange(SEQ - 1, 1)))


def test_equal_values_are_one_node() -> None:
    def layer() -> Node:
        gain = make(ops.Parameter(dense_weight("copy", torch.arange(8.0))))
        return make(ops.Unary("cos"), binary("mul", binary("mul", X, gain), number(2.0)))

    node = simplified(binary("add", layer(), layer()))
    assert node.inputs[0] is node.inputs[1]


def test_different_values_stay_apart() -> None:
    def kept(a: Node, b: Node) -> bool:
        shared = share(Graph((X, MASK, IDS), (a, b), ("a", "b")))
        return shared.outputs[0] is not shared.outputs[1]

    shape = TensorType((2,))
    assert kept(number(1), number(1.0))
    assert kept(number(0.0), number(-0.0))
    assert kept(*(make(ops.Torch("aten.rand.default", ((2,),), (), shape)) for _ in range(2)))
    assert kept(*(make(ops.Torch("aten.full.default", ((2,), v), (), shape)) for v in (1, True)))
    parameters = (dense_weight("a", torch.zeros(8)), dense_weight("b", torch.ones(8)))
    assert kept(*(make(ops.Parameter(weight)) for weight in parameters))


def test_meaning_of_a_mixture() -> None:
    start = make(ops.Reshape((BATCH * SEQ, 8)), X)
    node = binary("add", make(ops.Reshape((BATCH, SEQ, 8)), start), GAIN)
    node = make(ops.Slice(1, 1, SEQ), make(ops.Concat(1), node, node))
    ones = torch.ones(2, 5)
    values = {"x": torch.randn(2, 5, 8), "mask": ones > 0, "ids": ones.long()}
    before, after = (Graph((X, MASK, IDS), (n,), ("y",)) for n in (node, simplified(node)))
    assert torch.equal(evaluate(before, values)["y"], evaluate(after, values)["y"])
    assert len(after.nodes) < len(before.nodes)
