"""The interpreter: binding sizes, watching values, and errors that say where."""

import gc
import weakref

import pytest
import torch

from qc.errors import UnsupportedError
from qc.ir import ops
from qc.ir.meaning import evaluate
from qc.ir.node import Origin, make
from qc.ir.types import TensorType, symbol
from tests.passes.lift.drawing import BATCH, SEQ, add, graph, unary, value


def test_sizes_are_read_off_the_inputs() -> None:
    x, y = value("x", BATCH, SEQ), value("y", SEQ, 2)
    found = evaluate(
        graph(make(ops.Reshape((BATCH * SEQ,)), x), y, names=("flat", "y")),
        {"x": torch.zeros(3, 5), "y": torch.zeros(5, 2)},
    )
    assert found["flat"].shape == (15,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"x": torch.zeros(3, 5)}, "missing input y"),
        ({"x": torch.zeros(3), "y": torch.zeros(5, 2)}, r"x has shape \(3,\), expected f32\[batch"),
        ({"x": torch.zeros(3, 5), "y": torch.zeros(5, 3)}, r"expected f32\[seq, 2\]"),
        ({"x": torch.zeros(3, 5), "y": torch.zeros(4, 2)}, "with seq = 5"),
        ({"x": torch.zeros(3, 5).half(), "y": torch.zeros(5, 2)}, "x is f16, expected f32"),
    ],
)
def test_inputs_that_do_not_fit_are_named(values: dict[str, torch.Tensor], message: str) -> None:
    both = graph(value("x", BATCH, SEQ), value("y", SEQ, 2))
    with pytest.raises(ValueError, match=message):
        evaluate(both, values)


def test_other_sizes_are_given() -> None:
    ones = make(ops.Full((symbol("keep"),), 1.0))
    out = graph(ones, value("x", BATCH), names=("ones", "x"))
    assert evaluate(out, {"x": torch.zeros(2)}, {"keep": 3})["ones"].shape == (3,)


def test_what_torch_refuses_is_told_with_its_origin() -> None:
    x = value("x", 2, 3)
    wrong = ops.Torch("aten.mm.default", (ops.Operand(0), ops.Operand(0)), (), TensorType((2, 2)))
    node = make(wrong, x, origin=Origin("model.layers.1.router"))
    with pytest.raises(UnsupportedError, match=r"mm\.default.*at model\.layers\.1\.router"):
        evaluate(graph(node), {"x": torch.zeros(2, 3)})


def test_an_unknown_call_is_told_with_its_origin() -> None:
    x = value("x", 2)
    node = make(ops.Torch("elsewhere.call.default", (), (), TensorType((2,))), x,
                origin=Origin("model.head"))  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"elsewhere\.call.*at model\.head"):
        evaluate(graph(node), {"x": torch.zeros(2)})


def test_every_value_can_be_watched() -> None:
    x = value("x", 2)
    e = unary("exp", x)
    seen: dict[str, torch.Tensor] = {}
    evaluate(
        graph(add(e, x)), {"x": torch.zeros(2)}, watch=lambda n, v: seen.update({str(n.op): v})
    )
    assert seen.keys() == {"input(x)", "exp", "add"}


def test_values_are_dropped_after_their_last_use() -> None:
    node = value("x", 2)
    for _ in range(6):
        node = unary("exp", node)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watch(node: object, value: torch.Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(value))
        gc.collect()
        most = max(most, sum(each() is not None for each in alive))

    evaluate(graph(node), {"x": torch.zeros(2)}, watch=watch)
    assert most <= 3  # the caller's input, an operand and a result
