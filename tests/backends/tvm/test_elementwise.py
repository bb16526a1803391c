"""Index and element-by-element bodies, and single reductions, against their torch meaning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qc.backends.tvm.elementwise import elementwise_rules
from qc.ir.node import Node, make
from qc.ir.ops import (
    Arange,
    Binary,
    Cast,
    Concat,
    Conv2d,
    CumSum,
    Embedding,
    Expand,
    Full,
    Linear,
    MatMul,
    Parameter,
    Permute,
    Reduce,
    Reshape,
    Scalar,
    Size,
    Slice,
    Softmax,
    Unary,
    Where,
)
from qc.ir.target import CPUS
from qc.ir.types import Dim, bind_dim, symbol
from qc.ir.weights.grouped import GroupedFormat
from qc.ir.weights.weight import Weight
from tests.backends.tvm.kernels import Case, check, compiled, fused, kernel_of, value

BATCH, SEQ, PAST = symbol("batch"), symbol("seq"), symbol("past")
SIZES = ({"batch": 1, "seq": 1, "past": 3}, {"batch": 2, "seq": 37, "past": 5})
LARGE = {"batch": 3, "seq": 700, "past": 5}


def binary(kind: str, a: Node, b: Node) -> Node:
    return make(Binary(kind), a, b)


def number(value: float) -> Node:
    return make(Scalar(value))


def random_values(node: Node, sizes: dict[str, int]) -> tuple[torch.Tensor, ...]:
    """Draw values for the operands that are no parameters; integers stay below 100."""
    values = []
    for operand in node.inputs:
        if isinstance(operand.op, Parameter):
            continue
        shape = [bind_dim(d, sizes) for d in operand.tensor.shape]
        dtype = operand.tensor.dtype
        drawn = torch.randn(shape)
        if dtype == torch.int64:
            drawn = torch.randint(0, 100, shape)
        values.append(drawn > 0 if dtype == torch.bool else drawn.to(dtype))
    return tuple(values)


def cases_of(roots: list[Node], all_sizes: tuple[dict[str, int], ...] = SIZES) -> list[Case]:
    """Make cases with random values for every size."""
    torch.manual_seed(0)
    nodes = [fused(root) for root in roots]
    return [Case(node, sizes, random_values(node, sizes), 1e-5)
            for node in nodes for sizes in all_sizes]  # fmt: skip


def test_index_operations() -> None:
    x, y = value("x", BATCH, SEQ, 36), value("y", BATCH, SEQ, 36)
    gain, column = value("g", 36), value("z", BATCH, SEQ, 1)
    heads = value("h", BATCH, SEQ, 3, 16)
    scaled = binary("add", x, gain)
    shifted = binary("add", binary("mul", x, number(2.0)), y)
    angle = binary("mul", make(Reshape((1, SEQ, 1)), make(Cast(torch.float32),
                   make(Arange(SEQ, PAST)))), value("f", 16))  # fmt: skip
    row, key = make(Reshape((SEQ, 1)), make(Arange(SEQ))), make(Reshape((1, SEQ)),
                                                                make(Arange(SEQ)))  # fmt: skip
    roots = [
        make(Unary("silu"), binary("add", shifted, shifted)),
        binary("mul", scaled, column),
        make(Permute((1, 0, 2)), scaled),
        make(Permute((2, 0, 1)), scaled),
        make(Reshape((BATCH, SEQ, 3, 12)), scaled),
        make(Reshape((BATCH, SEQ, 48)), make(Unary("neg"), heads)),
        make(Concat(2), make(Unary("neg"), make(Slice(2, 16, 36), x)), make(Slice(2, 0, 16), x)),
        make(Concat(2), make(Slice(2, 0, 16), x), make(Unary("neg"), make(Slice(2, 16, 36), x))),
        make(Concat(1), x, y),
        make(Slice(2, 1, 36, 3), scaled),
        make(Slice(0, SEQ - 1, SEQ), value("s", SEQ, 33)),
        make(Unary("cos"), make(Concat(2), angle, angle)),
        make(Where(), binary("le", key, row), number(0.0), number(-1e9)),
        make(Size(PAST + SEQ)),
        make(Full((BATCH, SEQ), 2.0)),
        make(Expand((BATCH, SEQ, 3, 12)), make(Reshape((1, SEQ, 1, 12)), value("q", SEQ, 12))),
    ]  # fmt: skip
    check(cases_of(roots, (*SIZES, LARGE)), elementwise_rules)


def test_other_dtypes() -> None:
    x, halves = value("x", BATCH, SEQ, 36), value("h", BATCH, SEQ, 36, dtype=torch.float16)
    chosen = value("c", BATCH, SEQ, 36, dtype=torch.bool)
    ids = value("i", BATCH, SEQ, dtype=torch.int64)
    roots = [
        make(Where(), chosen, x, number(1.0)),
        make(Unary("not"), chosen),
        make(Cast(torch.float32), halves),
        binary("add", halves, x),
        binary("floordiv", ids, make(Scalar(7, torch.int64))),
        make(Cast(torch.bool), ids),
    ]
    check(cases_of(roots), elementwise_rules)


def test_parts_of_a_concatenation_are_read_only_where_chosen() -> None:
    # The branches of a concatenation must be read under their condition alone.
    parts = [value(f"p{i}", SEQ, 1) for i in range(4)]
    check(cases_of([make(Unary("exp"), make(Concat(1), *parts))]), elementwise_rules)


@pytest.mark.parametrize("offset", ["symmetric", "minimum"])
def test_embedding_in_a_quantized_table(offset: str) -> None:
    format = GroupedFormat(4, 32, offset)  # type: ignore[arg-type]
    arrays = {}
    for name, spec in format.arrays((100, 48)).items():
        drawn = torch.randint(0, 255, spec.shape, dtype=torch.uint8)
        arrays[name] = drawn if spec.dtype == torch.uint8 else torch.rand(spec.shape).to(spec.dtype)
    weight = Weight("table", (100, 48), (format.term((100, 48), arrays),))
    ids = value("ids", BATCH, SEQ, dtype=torch.int64)
    looked_up = make(Embedding(), ids, make(Parameter(weight)))
    check(cases_of([binary("mul", looked_up, number(3.0))]), elementwise_rules)


def test_embedding_limits_ids_to_the_table() -> None:
    node = fused(make(Embedding(), value("ids", 2, dtype=torch.int64), value("t", 10, 8)))
    table = torch.randn(10, 8)
    kernel = kernel_of(node, elementwise_rules)
    result = torch.empty(16)
    compiled([kernel])["k0"](torch.tensor([-5, 1 << 40]), table.flatten(), result)
    torch.testing.assert_close(result.reshape(2, 8), table[[0, 9]])


def test_reductions_and_products() -> None:
    x = value("x", BATCH, SEQ, 5, 12)
    flags, ids = (value("b", BATCH, SEQ, dtype=torch.bool),
                  value("i", BATCH, SEQ, dtype=torch.int64))  # fmt: skip
    roots = [
        *(make(Reduce(kind, (1,)), x) for kind in ("sum", "mean", "max", "min")),
        make(Reduce("mean", (0, 2, 3), True), x),
        make(Softmax(1), x), make(Softmax(3), x),
        make(CumSum(1), x), make(CumSum(1), flags),
        make(Reduce("max", (1,)), ids), make(Reduce("sum", (0, 1)), ids),
        make(MatMul(), value("a", BATCH, 3, SEQ, 12), value("c", 3, 12, SEQ)),
        make(MatMul(), value("a", SEQ, 12), value("c", BATCH, 1, 12, 33)),
        make(Linear(), value("l", BATCH, SEQ, 36), value("w", 7, 36), value("bias", 7)),
        make(Conv2d((4, 4)), value("im", BATCH, 3, 16, 16), value("w", 8, 3, 4, 4),
             value("bias", 8)),
        make(Conv2d((2, 1), (1, 2), (1, 2), 2), value("im", BATCH, 4, 9, 10),
             value("w", 6, 2, 3, 3)),
    ]  # fmt: skip
    check(cases_of(roots), elementwise_rules)


LAST = 24


@st.composite
def bodies(draw: st.DrawFn) -> Node:
    """Draw a body over [batch, seq, 24] whose steps move or compute elements."""
    shape: tuple[Dim, ...] = (BATCH, SEQ, LAST)
    current, other = value("x", *shape), value("y", *shape)
    for _ in range(draw(st.integers(1, 4))):
        step = draw(st.sampled_from(["unary", "add", "permute", "roll", "heads", "row"]))
        if step == "unary":
            current = make(Unary(draw(st.sampled_from(["tanh", "neg", "relu"]))), current)
        elif step == "add":
            current = binary("add", current, other)
        elif step == "row":
            current = binary("mul", current, make(Slice(2, 3, 4), other))
        elif step == "permute":
            current = make(Permute((1, 0, 2)), make(Permute((1, 0, 2)), current))
        elif step == "roll":
            at = draw(st.sampled_from([1, 8, 16]))
            ends = make(Slice(2, at, LAST), current), make(Slice(2, 0, at), current)
            current = make(Concat(2), *ends)
        else:
            heads = make(Reshape((BATCH, SEQ, 3, 8)), current)
            order = make(Permute((0, 1, 3, 2)), heads)
            current = make(Reshape(shape), order)
    return make(Unary("abs"), current)


@given(st.lists(bodies(), min_size=6, max_size=6))
@settings(max_examples=2, deadline=None, derandomize=True)
def test_random_bodies(roots: list[Node]) -> None:
    check(cases_of(roots), elementwise_rules)


@pytest.mark.parametrize("architecture", ["x86_64-v2", "avx512-vnni"])
def test_other_machines_compile(architecture: str) -> None:
    target = CPUS[architecture]
    x = value("x", BATCH, SEQ, 36)
    roots = [make(Unary("gelu"), x), make(Concat(2), make(Slice(2, 0, 32), x), x)]
    compiled([kernel_of(fused(root), elementwise_rules, target) for root in roots], target)
