"""Every op: what it computes is what torch computes, and its type is that of the result."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qc.ir import ops
from qc.ir.fused import fuse
from qc.ir.meaning import evaluate_nodes
from qc.ir.node import Node, make
from qc.ir.op import Op
from qc.ir.quantized import QuantizedTensor
from qc.ir.serialize import op_classes
from qc.ir.types import ActivationFormat, TensorType, TupleType, symbol
from qc.ir.weights.dense import dense_weight

SEQ = symbol("seq")
SIZES = {"seq": 5}
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def whole(*shape: int, below: int = 7) -> Tensor:
    return torch.randint(0, below, shape, generator=GENERATOR)


@dataclass(frozen=True, eq=False)
class Case:
    """An op on these values means `expected`."""

    op: Op
    values: tuple[Tensor, ...]
    expected: Callable[..., Any]

    def __str__(self) -> str:
        return str(self.op).replace(" ", "")


def attend(scale: float, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True, **how)
    return mixed.transpose(1, 2)


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = 3.0 * torch.tanh((q @ k.mT) * 0.5 / 3.0)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) as complex numbers."""
    half = cos.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
    turn = torch.complex(cos[..., :half], sin[..., :half]).unsqueeze(2)
    turned = pairs * turn
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)


def band(seq: int, total: int, window: int) -> Tensor:
    """Positions that a causal sliding window shows, one by one."""
    return torch.tensor(
        [[total - seq + i - window < j <= total - seq + i for j in range(total)]
         for i in range(seq)]
    )  # fmt: skip


X, Y, INTEGERS = draw(2, 3, 8), draw(2, 3, 8), whole(2, 3, 8)
POSITIVE, TRUTH = X.abs() + 0.1, draw(2, 3, 8) > 0
Q, K, V = draw(2, 5, 4, 8), draw(2, 7, 2, 8), draw(2, 7, 2, 6)
ANGLES = draw(2, 5, 3).repeat(1, 1, 2)
GAIN, BIAS = draw(8), draw(8)
MASK, ADDED = draw(2, 1, 5, 7) > -1, draw(2, 1, 5, 7)
ONE, FACTOR = torch.ones(1, 1), draw(2, 2)
SYLVESTER = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(8)] for i in range(8)])
UNARY = {
    "not": torch.logical_not,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    **{kind: getattr(F, kind) for kind in ("silu", "gelu", "relu")},
}
BINARY = {
    "min": torch.minimum, "max": torch.maximum, "floordiv": torch.floor_divide,
    "and": torch.logical_and, "or": torch.logical_or,
}  # fmt: skip


def in_steps(x: Tensor, group: int, limit: int) -> Tensor:
    """Round to multiples of 1 / limit of the largest value of each group."""
    groups = x.unflatten(-1, (-1, group))
    step = groups.abs().amax(-1, keepdim=True) / limit
    return ((groups / step).round() * step).flatten(-2)


CASES = [
    *(Case(ops.Unary(kind), (POSITIVE,), UNARY.get(kind) or getattr(torch, kind))
      for kind in ops.UNARY),
    Case(ops.Unary("exp"), (INTEGERS,), torch.exp),
    Case(ops.Unary("neg"), (INTEGERS,), torch.neg),
    *(Case(ops.Binary(kind), (X, Y), BINARY.get(kind) or getattr(torch, kind))
      for kind in ops.BINARY if kind != "pow"),
    Case(ops.Binary("pow"), (POSITIVE, Y), torch.pow),
    Case(ops.Binary("add"), (X, INTEGERS), torch.add),
    Case(ops.Binary("div"), (INTEGERS, INTEGERS + 1), torch.div),
    Case(ops.Binary("max"), (X, torch.tensor(0.5, dtype=torch.float64)),
         lambda a, b: torch.maximum(a, b.float())),
    Case(ops.Binary("mul"), (X.half(), torch.tensor(2.0)), torch.mul),
    Case(ops.Binary("sub"), (X, GAIN), torch.sub),
    Case(ops.Where(), (TRUTH, X, torch.tensor(0.0)), torch.where),
    Case(ops.Cast(torch.bfloat16), (X,), Tensor.bfloat16),
    *(Case(ops.GatedActivation(kind), (X, Y),
           lambda a, b, kind=kind: (UNARY.get(kind) or getattr(torch, kind))(a) * b)
      for kind in ops.GATES),
    Case(ops.Scalar(3, torch.int64), (), lambda: torch.tensor(3)),
    Case(ops.Size(2 * SEQ), (), lambda: torch.tensor(10)),
    Case(ops.Arange(SEQ, 3), (), lambda: torch.arange(3, 8)),
    Case(ops.Full((SEQ, 2), -math.inf), (), lambda: torch.full((5, 2), -math.inf)),
    Case(ops.Parameter(dense_weight("w", GAIN)), (), lambda: GAIN),
    Case(ops.Reshape((3, 16)), (X,), lambda x: x.reshape(3, 16)),
    Case(ops.Permute((2, 0, 1)), (X,), lambda x: x.permute(2, 0, 1)),
    Case(ops.Expand((4, 2, 3, 8)), (X,), lambda x: x.expand(4, 2, 3, 8)),
    Case(ops.Slice(2, 1, 7), (X,), lambda x: x[..., 1:7]),
    Case(ops.Slice(2, 1, 8, 3), (X,), lambda x: x[..., 1:8:3]),
    Case(ops.Concat(1), (X, Y, X), lambda *xs: torch.cat(xs, 1)),
    Case(ops.Embedding(), (INTEGERS, draw(7, 4)), F.embedding),
    *(Case(ops.Reduce(kind, (0, 2), keepdim), (X,),
           lambda x, kind=kind, keepdim=keepdim: {"max": torch.amax, "min": torch.amin}.get(
               kind, getattr(torch, kind))(x, (0, 2), keepdim))
      for kind in ops.REDUCTIONS for keepdim in (False, True)),
    Case(ops.CumSum(1), (INTEGERS,), lambda x: x.cumsum(1)),
    Case(ops.CumSum(1), (TRUTH,), lambda x: x.cumsum(1)),
    Case(ops.Softmax(1), (X,), lambda x: x.softmax(1)),
    Case(ops.MatMul(), (X, draw(8, 5)), torch.matmul),
    Case(ops.MatMul(), (draw(4, 1, 3, 8), draw(2, 8, 5)), torch.matmul),
    Case(ops.Linear(), (X, draw(5, 8)), F.linear),
    Case(ops.Linear(), (X, draw(5, 8), draw(5)), F.linear),
    Case(ops.Hadamard(8), (X, ONE), lambda x, f: x @ (SYLVESTER / 8**0.5)),
    Case(ops.Hadamard(4), (X, ONE),
         lambda x, f: x @ torch.kron(torch.eye(2), SYLVESTER[:4, :4] / 2)),
    Case(ops.Hadamard(8), (X, FACTOR), lambda x, f: x @ torch.kron(SYLVESTER[:4, :4] / 2, f)),
    Case(ops.Hadamard(2), (X.half(), FACTOR),
         lambda x, f: (x.float() @ torch.kron(torch.eye(4), f)).half()),
    Case(ops.Conv2d(), (draw(2, 3, 9, 8), draw(4, 3, 3, 2)), F.conv2d),
    Case(ops.Conv2d((2, 1), (1, 0), (1, 2), 2), (draw(2, 4, 9, 8), draw(6, 2, 3, 2), draw(6)),
         lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 0), (1, 2), 2)),
    Case(ops.RMSNorm(1e-3), (X, GAIN), lambda x, g: F.rms_norm(x, (8,), g, 1e-3)),
    Case(ops.LayerNorm(1e-3), (X, GAIN, BIAS), lambda x, g, b: F.layer_norm(x, (8,), g, b, 1e-3)),
    Case(ops.Rope(), (Q, ANGLES.cos(), ANGLES.sin()), rotate),
    Case(ops.Append(), (K.half(), draw(2, 5, 2, 8)), lambda a, b: torch.cat((a, b.half()), 1)),
    Case(ops.Attention(0.5), (Q, K, V), lambda *t: attend(0.5, *t)),
    Case(ops.Attention(0.5, causal=True), (Q, K[:, :5], V[:, :5]),
         lambda *t: attend(0.5, *t, is_causal=True)),
    Case(ops.Attention(0.5, causal=True), (Q, K, V),
         lambda *t: attend(0.5, *t, attn_mask=band(5, 7, 7))),
    Case(ops.Attention(0.5, causal=True, window=3), (Q, K, V),
         lambda *t: attend(0.5, *t, attn_mask=band(5, 7, 3))),
    Case(ops.Attention(0.5, softcap=3.0), (Q, K.repeat_interleave(2, 2), V.repeat_interleave(2, 2)),
         softcapped),
    Case(ops.Attention(0.5), (Q, K, V, MASK), lambda *t: attend(0.5, *t[:3], attn_mask=t[3])),
    Case(ops.Attention(0.5), (Q, K, V, ADDED), lambda *t: attend(0.5, *t[:3], attn_mask=t[3])),
    Case(ops.FakeQuantize(ActivationFormat(8, 4)), (X,), lambda x: in_steps(x, 4, 127)),
    Case(ops.FakeQuantize(ActivationFormat(4)), (X,), lambda x: in_steps(x, 8, 7)),
    Case(ops.FakeQuantize(ActivationFormat(8, 4)), (X.half(),),
         lambda x: in_steps(x.float(), 4, 127)),
    Case(ops.Torch("aten.roll.default", (ops.Operand(0), (1,), (2,)), (), TensorType((2, 3, 8))),
         (X,), lambda x: x.roll((1,), (2,))),
    Case(ops.Torch("aten.full.default", ((SEQ, 2), 1.5), (), TensorType((SEQ, 2))), (),
         lambda: torch.full((5, 2), 1.5)),
]  # fmt: skip

SEPARATELY = {"Input", "Quantize", "Item", "Fused"}
"""Ops that the tests below look at."""


def placed(value: Tensor) -> Node:
    return make(ops.Input("", TensorType(tuple(value.shape), value.dtype)))


def test_every_op_has_a_case() -> None:
    assert {type(case.op).__name__ for case in CASES} | SEPARATELY == op_classes().keys()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_meaning_is_what_torch_computes(case: Case) -> None:
    found = case.op.meaning(*case.values, sizes=SIZES)
    expected = case.expected(*case.values)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_inferred_type_is_that_of_the_result(case: Case) -> None:
    inferred = make(case.op, *map(placed, case.values)).tensor
    found = case.op.meaning(*case.values, sizes=SIZES)
    assert ops.concrete(inferred.shape, SIZES) == tuple(found.shape)
    assert inferred.dtype == found.dtype


E2M1 = ActivationFormat(4, 16, "e2m1")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 3, 8, 32])
def test_quantized_activations_are_within_half_a_step(bits: int, group: int | None) -> None:
    format = ActivationFormat(bits, group)
    quantized = ops.Quantize(format).meaning(X, sizes={})
    assert isinstance(quantized, QuantizedTensor)
    assert int(quantized.codes.abs().max()) == 2 ** (bits - 1) - 1
    assert quantized.scale.shape[-1] == -(-8 // (group or 8))
    width = min(group or 8, 8)
    steps = quantized.scale.repeat_interleave(width, -1)[..., :8]
    assert bool(((quantized.dequantize() - X).abs() <= steps * 0.5001).all())
    assert make(ops.Quantize(format), placed(X)).tensor.format == format


def test_activations_of_four_bits_are_floats_with_scales_of_their_own() -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-6, 2, 64)
    quantized = ops.Quantize(E2M1).meaning(x, sizes={})
    assert isinstance(quantized, QuantizedTensor)
    assert quantized.shape == x.shape
    stored = {name: (each.dtype, each.shape[-1]) for name, each in quantized.arrays.items()}
    bytes, floats = torch.uint8, torch.float32
    assert stored == {"codes": (bytes, 32), "scale": (bytes, 4), "factor": (floats, 1)}
    groups, values = x.unflatten(-1, (4, 16)), quantized.dequantize().unflatten(-1, (4, 16))
    largest = groups.abs().amax(-1)
    token = largest.amax(-1, keepdim=True)
    # Half the widest step is a sixth of the largest value; a scale is off by 1/16, or by half the
    # smallest of e4m3, 2^-10 of 448; what a scale is too small for becomes the largest code.
    bound = largest / 6 * 17 / 16 + 6 * token / 6 / 448 * 2**-10
    assert bool(((values - groups).abs().amax(-1) <= bound).all())
    assert bool((values.abs().amax(-1) > 0)[token.expand_as(largest) < 448 * 64 * largest].all())


def test_groups_of_four_bits_are_whole() -> None:
    with pytest.raises(ValueError, match="whole number of groups"):
        make(ops.Quantize(E2M1), placed(torch.zeros(2, 24)))
    with pytest.raises(ValueError, match="whole number of groups"):
        make(ops.FakeQuantize(E2M1), placed(torch.zeros(2, 24)))


@pytest.mark.parametrize(
    ("bits", "kind"), [(8, "int"), (4, "int"), (8, "e4m3"), (4, "e2m1")], ids=str
)
def test_the_widest_step_is_that_between_the_largest_codes(bits: int, kind: str) -> None:
    format = ActivationFormat(bits, None, kind)
    values = ops.FakeQuantize(format).meaning(torch.linspace(0, 1, 4096)[None], sizes={}).unique()
    assert float(values[-1]) == pytest.approx(1.0)
    steps = values.diff()
    assert float(steps[-1]) == pytest.approx(format.widest_step, rel=1e-4)
    assert float(steps.max()) == pytest.approx(format.widest_step, rel=1e-4)


@pytest.mark.parametrize("format", [ActivationFormat(8, 4), ActivationFormat(4, 4, "e2m1")])
def test_a_token_of_zeros_stays_zero(format: ActivationFormat) -> None:
    quantized = ops.Quantize(format).meaning(torch.zeros(2, 8), sizes={})
    assert torch.equal(quantized.dequantize(), torch.zeros(2, 8))


def test_a_linear_reads_quantized_values() -> None:
    weight = draw(5, 8)
    quantized = ops.Quantize(ActivationFormat(8, 4)).meaning(X, sizes={})
    found = ops.Linear().meaning(quantized, weight, sizes={})
    assert torch.equal(found, F.linear(quantized.dequantize(), weight))
    x, w = make(ops.Quantize(ActivationFormat()), placed(X)), placed(weight)
    assert make(ops.Linear(), x, w).type == TensorType((2, 3, 5))


def test_an_item_is_one_of_several_results() -> None:
    types = TupleType((TensorType((2, 3, 2)), TensorType((2, 3, 2), torch.int64)))
    several = make(ops.Torch("aten.topk.default", (ops.Operand(0), 2), (), types), placed(X))
    item = make(ops.Item(1), several)
    assert item.type == types.items[1]
    (found,) = evaluate_nodes((item,), {"": X}, {})
    assert torch.equal(found, X.topk(2).indices)


def test_a_fused_node_means_its_body() -> None:
    x = placed(X)
    twice = make(ops.Binary("mul"), x, make(ops.Scalar(2.0)))
    whole = make(ops.Unary("exp"), twice)
    fused = fuse("elements", whole, frozenset({whole, twice}))
    assert fused.inputs == (x,)
    assert fused.op.infer(x.type) == whole.type
    assert torch.equal(fused.op.meaning(X, sizes={}), torch.exp(2 * X))
    with pytest.raises(ValueError, match="elements takes"):
        fused.op.infer(TensorType((3,)))


REFUSED: list[tuple[Op, tuple[Tensor, ...], str]] = [
    (ops.Unary("cbrt"), (X,), "unknown function 'cbrt'"),
    (ops.Binary("xor"), (X, Y), "unknown function 'xor'"),
    (ops.Where(), (X, X, Y), "condition of where must be bool"),
    (ops.GatedActivation("silu"), (X, GAIN), "gates two equal values"),
    (ops.Reshape((7, 7)), (X,), "has not as many elements"),
    (ops.Permute((0, 0, 1)), (X,), "no order of the axes"),
    (ops.Expand((2, 3, 9)), (X,), "do not broadcast"),
    (ops.Slice(3, 0, 1), (X,), "has no axis 3"),
    (ops.Slice(0, 0, SEQ, 2), (X,), "length known at compile time"),
    (ops.Concat(0), (X, Q), "cannot join"),
    (ops.Embedding(), (X, K), "expected integer ids and a matrix"),
    (ops.Reduce("sum", (4,)), (X,), "cannot reduce"),
    (ops.Softmax(0), (INTEGERS,), "expected floating-point values"),
    (ops.MatMul(), (X, Y), "cannot multiply"),
    (ops.Linear(), (X, draw(5, 8), draw(6)), "bias"),
    (ops.Hadamard(8), (X, draw(2, 3)), "must be square"),
    (ops.Hadamard(8), (X, draw(3, 3)), "not a power of two times"),
    (ops.Hadamard(0), (X, ONE), "not a power of two times"),
    (ops.Hadamard(16), (X, ONE), "has no blocks of 16"),
    (ops.Hadamard(8), (INTEGERS, ONE), "expected floating-point values"),
    (ops.Conv2d(), (draw(1, 2, 4, 4), draw(1, 3, 2, 2)), "a convolution with weight"),
    (ops.RMSNorm(1e-6), (X, draw(7)), "gain"),
    (ops.LayerNorm(1e-6), (X, GAIN, draw(7)), "bias"),
    (ops.Rope(), (Q, draw(1, 4, 6), draw(1, 4, 6)), "do not rotate"),
    (ops.Append(), (K, draw(2, 5, 3, 8)), "cannot append"),
    (ops.Attention(1.0), (Q, V, V), "cannot attend"),
    (ops.Attention(1.0), (Q, draw(2, 7, 3, 8), draw(2, 7, 3, 8)), "do not match"),
    (ops.Quantize(ActivationFormat()), (INTEGERS,), "expected floating-point values"),
]


@pytest.mark.parametrize(("op", "values", "message"), REFUSED, ids=lambda v: str(v)[:20])
def test_what_does_not_fit_is_refused(op: Op, values: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(op, *map(placed, values))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seq", "total"), [(5, 5), (1, 5), (1, 1), (3, 5)])
def test_attention_as_one_call_is_attention_written_out(causal: bool, seq: int, total: int) -> None:
    """A window that hides nothing takes the other way to the same values."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, seq, 6, 8, generator=generator)
    k, v = (torch.randn(2, total, 3, 8, generator=generator) for _ in range(2))
    one = ops.Attention(0.3, causal)
    written = ops.Attention(0.3, causal, window=total + 1)
    assert one.is_plain(seq, total) == (not causal or seq in (1, total))
    assert not written.is_plain(seq, total)
    if causal:  # without it a window also looks ahead
        expected = written.meaning(q, k, v, sizes={})
    else:
        expected = ops.Attention(0.3, False, softcap=1e6).meaning(q, k, v, sizes={})
    torch.testing.assert_close(one.meaning(q, k, v, sizes={}), expected, rtol=1e-4, atol=1e-5)
