"""Every translated call computes what ATen computes, and the families keep none."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.node import Node, make
from qc.ir.target import Target
from qc.ir.types import TensorType, TupleType
from qc.ir.weights.dense import dense_weight
from qc.passes.exactness import distance
from qc.passes.pipeline import Context, Pipeline
from qc.passes.prepare import PREPARE
from qc.passes.prepare.aten import TABLE, TranslateAten
from qc.passes.prepare.aten_shape import PARTS
from qc.passes.stage import CANONICAL
from tests import families
from tests.families import FAMILIES

CONTEXT = Context(Target("any", "any"))
LEFT = {"bert": {"aten.gather.default"}}
"""Calls that preparing leaves; lifting replaces this one, a table of zeros."""

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
Y = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(2)) + 0.5
W = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
M, B = X[0], X > 0
IDS = torch.tensor([[1, 0, 3], [2, 2, 0]])
Q = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(4))
KV = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(5))
F64 = torch.float64

CALLS: dict[str, list[tuple[Any, ...]]] = {
    **{f"aten.{kind}.default": [(Y,)] for kind in (
        "abs", "neg", "reciprocal", "sqrt", "rsqrt", "exp", "log", "sin", "cos", "tanh", "sigmoid",
        "erf", "floor", "relu", "silu", "square", "contiguous", "clone", "alias", "detach",
        "ones_like", "zeros_like", "mean", "sum", "logical_not", "positive")},
    "aten.bitwise_not.default": [(B,)],
    "aten.gelu.default": [(X,), (X, {"approximate": "tanh"})],
    **{f"aten.{kind}.Tensor": [(X, Y), (X, IDS[:, :, None])]
       for kind in ("eq", "ne", "lt", "le", "gt", "ge", "mul", "div")},
    **{f"aten.{kind}.Scalar": [(X, 2), (IDS, 2), (IDS, 0.5)]
       for kind in ("eq", "ne", "lt", "le", "gt", "ge", "mul", "div")},
    **{f"aten.{kind}.Tensor": [(X, Y), (X, Y, {"alpha": 2}), (IDS, 1), (X, 1)]
       for kind in ("add", "sub")},
    "aten.rsub.Scalar": [(X, 1.0), (IDS, 3)],
    "aten.div.Tensor_mode": [(X, Y, {"rounding_mode": "floor"}), (IDS, 2, {"rounding_mode": None})],
    "aten.floor_divide.default": [(IDS, 2)],
    "aten.minimum.default": [(X, Y)],
    "aten.maximum.default": [(X, Y)],
    "aten.pow.Tensor_Scalar": [(X, 2), (Y, -0.5)],
    "aten.pow.Tensor_Tensor": [(Y, X)],
    "aten.pow.Scalar": [(10000.0, X)],
    "aten.__and__.Tensor": [(B, X > 1)],
    "aten.bitwise_or.Tensor": [(B, X > 1)],
    "aten.logical_and.default": [(B, X > 1)],
    "aten.where.self": [(B, X, Y)],
    "aten.where.ScalarOther": [(B, X, -3.0)],
    "aten.where.ScalarSelf": [(B, 2.0, X)],
    "aten.where.Scalar": [(B, 0.0, 1.0)],
    "aten.masked_fill.Scalar": [(X, B, -1.0)],
    "aten.masked_fill.Tensor": [(X, B, torch.tensor(2.0))],
    "aten.clamp.default": [(X, -0.5, 0.5), (X, {"max": 0.0}), (IDS, 1)],
    "aten.clamp_min.default": [(X, 0)],
    "aten.to.dtype": [(X, F64), (X, torch.float32), (IDS, torch.float32), (B, torch.int64)],
    "aten.type_as.default": [(IDS, X)],
    "aten.dropout.default": [(X, 0.5, False)],
    "aten.mean.dim": [(X, [-1], True), (X, [0, 2])],
    "aten.sum.dim_IntList": [(X, [1]), (IDS, [-1], True), (B, [0])],
    "aten.amax.default": [(X, [-1], True), (X,)],
    "aten.softmax.int": [(X, -1), (X, 1, F64)],
    "aten.cumsum.default": [(IDS, 1), (B, -1), (X, 0)],
    "aten.full.default": [([2, 3], 1.5), ([], 2)],
    "aten.ones.default": [([2, 3],)],
    "aten.new_zeros.default": [(X, [3])],
    "aten.arange.default": [(5,)],
    "aten.arange.start": [(2, 5)],
    "aten.arange.start_step": [(1, 8, 3), (0, 8, 2, {"dtype": torch.float32})],
    "aten.view.default": [(X, [2, -1])],
    "aten.unsqueeze.default": [(X, -1)],
    "aten.squeeze.dim": [(X[:1], 0), (X, 0)],
    "aten.flatten.using_ints": [(X, 1)],
    "aten.unflatten.int": [(X, -1, [2, 2])],
    "aten.expand.default": [(X[:, :1], [2, 3, -1]), (M, [2, -1, -1])],
    "aten.permute.default": [(X, [2, 0, -2])],
    "aten.transpose.int": [(X, 0, -1)],
    "aten.t.default": [(M,)],
    "aten.slice.Tensor": [(X, 1), (X, 1, 1), (X, -1, -2), (X, 2, 0, 9223372036854775807, 2),
                          (X, 1, 2, 1), (X, 1, -9, 9)],
    "aten.narrow.default": [(X, 2, 1, 2)],
    "aten.einsum.default": [("abc -> cab", [X])],
    "aten.select.int": [(X, 1, 0), (X, -1, -1)],
    "aten.cat.default": [([X, Y], -1), ([X, IDS[:, :, None]], 2), ([X],)],
    "aten.stack.default": [([X, Y], 1), ([X, Y], -1)],
    "aten.repeat.default": [(X, [1, 2, 3]), (M, [2, 1, 1])],
    "aten.repeat_interleave.self_int": [(X, 3, 1)],
    "aten.diff.default": [(IDS,), (IDS, 1, -1, IDS[:, :1]), (X, 1, 1)],
    "aten.index_select.default": [(W, 0, torch.tensor([2, 0]))],
    "aten.split.Tensor": [(X, 3, -1)],
    "aten.split_with_sizes.default": [(X, [1, 3], 2)],
    "aten.chunk.default": [(X, 2, -1)],
    "aten.unbind.int": [(X, 1)],
    "aten.linear.default": [(X, W), (X, W, W[:, 0])],
    "aten.matmul.default": [(X, W.t()), (X, X.transpose(1, 2)), (M, M[0]), (M[:, 0], M),
                            (M[0], M[0]), (X[:, :, :1], X[:, :1])],
    "aten.mm.default": [(M, W.t())],
    "aten.bmm.default": [(X, X.transpose(1, 2))],
    "aten.addmm.default": [(W[:, 0], M, W.t()), (W[:, 0], M, W.t(), {"beta": 2, "alpha": 0.5})],
    "aten.baddbmm.default": [(X[:, :, :3], X, X.transpose(1, 2), {"alpha": 0.5}),
                             (X[:, :, :3], X, X.transpose(1, 2), {"beta": 0})],
    "aten.layer_norm.default": [(X, [4]), (X, [4], W[0], W[1], 1e-3)],
    "aten.rms_norm.default": [(X, [4]), (X, [4], W[0], 1e-3)],
    "aten.embedding.default": [(W, IDS)],
    "aten.conv2d.default": [(X[None], torch.randn(5, 2, 2, 2), W[:, 0], [1, 2], [1, 0])],
    "aten.scaled_dot_product_attention.default": [
        (Q, Q, Q), (Q, Q, Q, None, 0.0, True), (Q, Q, Q, torch.randn(3, 3), {"scale": 0.3}),
        (Q, KV, KV, {"enable_gqa": True})],
}  # fmt: skip


CASES = [
    pytest.param(overload, arguments, id=f"{overload}-{number}")
    for overload, calls in CALLS.items()
    for number, arguments in enumerate(calls)
]


def build(overload: str, arguments: tuple[Any, ...]) -> tuple[Graph, dict[str, Tensor]]:
    """Build the graph of one call; tensors become inputs, W and its transpose parameters."""
    tensors: list[Tensor] = []

    def template(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(template(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        tensors.append(value)
        return ops.Operand(len(tensors) - 1)

    named = arguments[-1] if isinstance(arguments[-1], dict) else {}
    args = tuple(template(a) for a in arguments[: len(arguments) - bool(named)])
    result = ops.Torch(overload, args, tuple(named.items())).meaning(*tensors, sizes={})
    several = isinstance(result, list | tuple)
    types = tuple(map(type_of, result if several else [result]))
    op = ops.Torch(overload, args, tuple(named.items()), TupleType(types) if several else types[0])
    node = make(op, *(operand(f"x{i}", tensor) for i, tensor in enumerate(tensors)))
    outputs = tuple(make(ops.Item(i), node) for i in range(len(types))) if several else (node,)
    inputs = tuple(n for n in node.inputs if isinstance(n.op, ops.Input))
    values = {f"x{i}": tensor for i, tensor in enumerate(tensors)}
    return Graph(inputs, outputs, tuple(f"y{i}" for i in range(len(outputs)))), values


def operand(label: str, value: Tensor) -> Node:
    """Make an input; W and its transpose come from a parameter."""
    if value is W:
        return make(ops.Parameter(dense_weight("w", W)))
    if value.shape == W.t().shape and value.data_ptr() == W.data_ptr():
        return make(ops.Permute((1, 0)), operand("w", W))
    return make(ops.Input(label, type_of(value)))


def type_of(value: Tensor) -> TensorType:
    return TensorType(tuple(value.shape), value.dtype)


@pytest.mark.parametrize(("overload", "arguments"), CASES)
def test_calls(overload: str, arguments: tuple[Any, ...]) -> None:
    before, values = build(overload, arguments)
    after = TranslateAten().run(before, CONTEXT)
    assert not any(isinstance(n.op, ops.Torch) for n in after.nodes)
    expected, got = evaluate(before, values), evaluate(after, values)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        torch.testing.assert_close(got[name], value)


def test_table_names_real_overloads() -> None:
    for overload in (*TABLE, *PARTS):
        namespace, packet, name = overload.split(".")
        getattr(getattr(getattr(torch.ops, namespace), packet), name)


@pytest.mark.parametrize(
    ("overload", "arguments"),
    [
        ("aten.linear.default", (X, W)),
        ("aten.matmul.default", (X, W.t())),
        ("aten.addmm.default", (W[:, 0], M, W.t())),
    ],
)
def test_products_with_stored_matrices_are_linears(
    overload: str, arguments: tuple[Any, ...]
) -> None:
    after = TranslateAten().run(build(overload, arguments)[0], CONTEXT)
    linear = after.outputs[0]
    assert isinstance(linear.op, ops.Linear)
    assert linear.inputs[1].tensor.shape == (5, 4)


def test_outer_products_have_no_sums() -> None:
    """Older rotary embeddings make their tables so: every backend multiplies elements."""
    after = TranslateAten().run(build("aten.matmul.default", (X[:, :, :1], X[:, :1]))[0], CONTEXT)
    assert after.outputs[0].op == ops.Binary("mul")


@pytest.mark.parametrize(
    ("overload", "arguments"),
    [
        ("aten.dropout.default", (X, 0.5, True)),
        ("aten.bitwise_not.default", (IDS,)),
        ("aten.__and__.Tensor", (IDS, IDS)),
        ("aten.scaled_dot_product_attention.default", (Q[:, :, :2], Q, Q, None, 0.0, True)),
        ("aten.topk.default", (X, 2)),
    ],
)
def test_what_has_no_translation_stays(overload: str, arguments: tuple[Any, ...]) -> None:
    before, _ = build(overload, arguments)
    assert any(isinstance(n.op, ops.Torch) for n in TranslateAten().run(before, CONTEXT).nodes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "seq"), [(1, 5), (3, 17)])
def test_families(family: str, batch: int, seq: int) -> None:
    prepared = Pipeline(PREPARE).run(families.captured(family), CONTEXT)
    CANONICAL.check(prepared)
    left = {n.op.overload for n in prepared.nodes if isinstance(n.op, ops.Torch)}
    assert left == LEFT.get(family, set())
    values = families.inputs(family, batch, seq)
    (result,) = evaluate(prepared, values).values()
    assert distance(families.first_output(families.model_of(family), values), result) < 1e-5
