"""Bodies of every kind that is no linear, with values: what the GPU's kernels must compute.

Names are the tests'; numbers are drawn anew for each, from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.fused import fuse
from qc.ir.node import Node, make
from qc.ir.quantized import quantize_activation
from qc.ir.types import ActivationFormat, Dim, TensorType, symbol

BATCH, SEQ, KEEP, PAST = (symbol(name) for name in ("batch", "seq", "keep", "past"))
HALF, LONG = torch.float16, torch.int64


@dataclass(frozen=True)
class Case:
    """A fused node, the values of its operands, the sizes, and the rows that choose a variant."""

    node: Node
    operands: tuple[Tensor, ...]
    sizes: Mapping[str, int]
    rows: int = 6


def value(label: str, *shape: Dim, dtype: torch.dtype = torch.float32) -> Node:
    """Make an input of a graph."""
    return make(ops.Input(label, TensorType(shape, dtype)))


def case_of(
    root: Node, values: Mapping[Node, Tensor], sizes: Mapping[str, int], rows: int = 6
) -> Case:
    """Fuse everything under `root` down to what has values."""
    inside: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node in inside or node in values or isinstance(node.op, ops.Scalar):
            continue
        inside.add(node)
        stack.extend(node.inputs)
    fused = fuse("test", root, frozenset(inside))
    return Case(fused, tuple(values[each] for each in fused.inputs), sizes, rows)


SIZES = {"batch": 2, "seq": 3, "keep": 2, "past": 5, "context": 16}


def rows(make_root: Callable[..., Node], vectors: int = 1, channels: int = 56) -> Case:
    """A body over rows and some vectors along them."""
    x = value("x", BATCH, SEQ, channels)
    others = [value(f"w{i}", channels) for i in range(vectors)]
    values = {x: torch.randn(2, 3, channels), **{w: torch.randn(channels) for w in others}}
    return case_of(make_root(x, *others), values, SIZES)


Rounding = type[ops.Quantize] | type[ops.FakeQuantize]


def rounded_norm(
    op: Rounding, group: int | None, channels: int, kind: str = "int", bits: int = 8
) -> Case:
    """A norm that ends in codes, or in what they stand for."""

    def root(x: Node, gain: Node) -> Node:
        norm = make(ops.RMSNorm(1e-5), x, gain)
        return make(op(ActivationFormat(bits, group, kind)), norm)

    return rows(root, channels=channels)


def rotated(channels: int, block: int, order: int, after: Rounding | None, before: bool) -> Case:
    """A rotation, perhaps behind a norm, perhaps rounded."""
    x, gain, factor = (
        value("x", BATCH, SEQ, channels),
        value("g", channels),
        value("f", order, order),
    )
    source = make(ops.RMSNorm(1e-5), x, gain) if before else x
    root = make(ops.Hadamard(block), source, factor)
    if after is not None:
        root = make(after(ActivationFormat(8, 32)), root)
    mixing = torch.linalg.qr(torch.randn(order, order)).Q
    values = {x: torch.randn(2, 3, channels), gain: torch.rand(channels) + 0.5, factor: mixing}
    return case_of(root, values, SIZES)


def rounded_pieces(op: Rounding, group: int | None, channels: int) -> Case:
    """Rows that several programs share, element by element and then rounded."""

    def root(x: Node) -> Node:
        half = make(ops.Binary("mul"), make(ops.Unary("silu"), x), make(ops.Scalar(0.5)))
        return make(op(ActivationFormat(8, group)), half)

    return rows(root, 0, channels)


def residual_norm() -> Case:
    """Element by element in front of a norm and behind it."""
    x, y, gain = value("x", BATCH, SEQ, 40), value("y", BATCH, SEQ, 40), value("g", 40)
    half = make(ops.Scalar(0.5))
    inner = make(ops.Binary("add"), make(ops.Binary("mul"), x, half), y)
    root = make(ops.Unary("gelu"), make(ops.RMSNorm(1e-6), inner, gain))
    values = {x: torch.randn(2, 3, 40), y: torch.randn(2, 3, 40), gain: torch.randn(40)}
    return case_of(root, values, SIZES)


def angles() -> Case:
    """Angles of rotations, at positions that float16 does not hold."""
    frequency = value("f", 7)
    place = make(ops.Reshape((1, SEQ, 1)), make(ops.Arange(SEQ, PAST)))
    product = make(ops.Binary("mul"), make(ops.Cast(torch.float32), place), frequency)
    root = make(ops.Unary("cos"), make(ops.Concat(2), product, product))
    return case_of(root, {frequency: torch.rand(7)}, {**SIZES, "past": 4099})


def embedding() -> Case:
    ids, table = value("ids", BATCH, SEQ, dtype=LONG), value("table", 320, 56)
    values = {ids: torch.randint(0, 320, (2, 3)), table: torch.randn(320, 56)}
    return case_of(make(ops.Embedding(), ids, table), values, SIZES)


def trailing() -> Case:
    x = value("x", BATCH, SEQ, 56)
    root = make(ops.Slice(1, SEQ - KEEP, SEQ), x)
    return case_of(root, {x: torch.randn(2, 3, 56)}, SIZES)


def strided() -> Case:
    x = value("x", BATCH, SEQ, 8, 7)
    root = make(ops.Permute((0, 2, 1, 3)), make(ops.Slice(2, 1, 7, 3), x))
    return case_of(root, {x: torch.randn(2, 3, 8, 7)}, SIZES)


def reshaped() -> Case:
    x, y = value("x", BATCH, SEQ, 6, 8), value("y", BATCH, 1, 48)
    merged = make(ops.Reshape((BATCH, SEQ, 48)), x)
    root = make(ops.Binary("sub"), merged, make(ops.Expand((BATCH, SEQ, 48)), y))
    return case_of(root, {x: torch.randn(2, 3, 6, 8), y: torch.randn(2, 1, 48)}, SIZES)


def chosen() -> Case:
    """Comparisons, logic, integers, a condition."""
    a, b = value("a", BATCH, SEQ, 9, dtype=LONG), value("b", BATCH, SEQ, 9, dtype=LONG)
    x = value("x", BATCH, SEQ, 9)
    low = make(ops.Binary("lt"), a, b)
    odd = make(ops.Binary("ne"), make(ops.Binary("floordiv"), a, make(ops.Scalar(2, LONG))), b)
    both = make(ops.Binary("and"), low, make(ops.Unary("not"), odd))
    root = make(ops.Where(), both, x, make(ops.Cast(torch.float32), b))
    values = {a: torch.randint(-9, 9, (2, 3, 9)), b: torch.randint(-9, 9, (2, 3, 9)),
              x: torch.randn(2, 3, 9)}  # fmt: skip
    return case_of(root, values, SIZES)


def unary(kind: str) -> Case:
    x = value("x", BATCH, SEQ, 10)
    values = 3 * torch.randn(2, 3, 10)
    return case_of(
        make(ops.Unary(kind), x),
        {x: values.abs() + 0.1 if kind in ("log", "sqrt", "rsqrt") else values},
        SIZES,
    )


def binary(kind: str) -> Case:
    x, y = value("x", BATCH, SEQ, 10), value("y", BATCH, SEQ, 10)
    values = {x: 2 * torch.randn(2, 3, 10), y: torch.randn(2, 3, 10)}
    if kind == "pow":
        values[y] = values[y].round()
    return case_of(make(ops.Binary(kind), x, y), values, SIZES)


def gated(kind: str) -> Case:
    x, y = value("x", BATCH, SEQ, 10), value("y", BATCH, SEQ, 10)
    values = {x: 2 * torch.randn(2, 3, 10), y: torch.randn(2, 3, 10)}
    return case_of(make(ops.GatedActivation(kind), x, y), values, SIZES)


def rotation(new: Node, rotary: int, batches: Dim = 1) -> tuple[Node, dict[Node, Tensor]]:
    """Return a rotation of heads, and its tables."""
    cos, sin = (value(name, batches, SEQ, rotary) for name in ("cos", "sin"))
    angle = 6 * torch.rand(2 if batches == BATCH else 1, 3, rotary)
    return make(ops.Rope(), new, cos, sin), {cos: angle.cos(), sin: angle.sin()}


def appended(rotated: bool) -> Case:
    past, new = value("past", BATCH, PAST, 3, 14, dtype=HALF), value("new", BATCH, SEQ, 3, 14)
    source, tables = rotation(new, 14) if rotated else (new, {})
    values = {past: torch.randn(2, 5, 3, 14).half(), new: torch.randn(2, 3, 3, 14), **tables}
    return case_of(make(ops.Append(), past, source), values, SIZES)


def cache_type(code: str, *shape: Dim) -> TensorType:
    """The type of a cache: "f16", or the codes of a quantized one."""
    if code == "f16":
        return TensorType(shape, HALF)
    return TensorType(shape, torch.float32, ActivationFormat(8, kind=code.removesuffix("8")))


def cache_of(type: TensorType, *shape: int) -> Any:
    """Random values of a cache."""
    found = torch.randn(shape) * torch.rand(*shape[:-1], 1)
    return found.half() if type.format is None else quantize_activation(found, type.format)


def appended_codes(code: str) -> Case:
    """Rotated keys behind quantized ones."""
    type = cache_type(code, BATCH, PAST, 3, 14)
    past, new = make(ops.Input("past", type)), value("new", BATCH, SEQ, 3, 14)
    source, tables = rotation(new, 14)
    new_values = torch.randn(2, 3, 3, 14)
    new_values[0, 1, 2] = 0.0  # a head without a scale
    values = {past: cache_of(type, 2, 5, 3, 14), new: new_values, **tables}
    return case_of(make(ops.Append(), past, source), values, SIZES)


def rope() -> Case:
    """A rotation alone, of some of the channels, with tables for each sequence."""
    x = value("x", BATCH, SEQ, 3, 20)
    root, tables = rotation(x, 12, BATCH)
    return case_of(root, {x: torch.randn(2, 3, 3, 20), **tables}, SIZES)


def attention(
    seq: int,
    past: int,
    *,
    heads: tuple[int, int] = (6, 3),
    rotated: bool = True,
    mask: torch.dtype | None = None,
    cached: bool = True,
    code: str = "f16",
    **options: Any,
) -> Case:
    """An attention of `seq` queries; `cached`: to keys and values in a cache with `past` more."""
    many, few = heads
    q, total = value("q", BATCH, SEQ, many, 14), seq + past if cached else seq
    new = value("new", BATCH, SEQ, few, 14)
    k, v = (value(name, BATCH, SEQ, few, 14) for name in ("k", "v"))
    if cached:
        type = cache_type(code, BATCH, PAST, few, 14)
        pasts = [make(ops.Input(name, type)) for name in ("pk", "pv")]
        k, v = (make(ops.Append(), each, new) for each in pasts)
    cos, sin = (value(name, 1, SEQ, 14) for name in ("cos", "sin"))
    angle = 6 * torch.rand(1, seq, 14)
    values = {
        q: torch.randn(2, seq, many, 14), cos: angle.cos(), sin: angle.sin(),
        k: cache_of(k.tensor, 2, total, few, 14) if cached else torch.randn(2, total, few, 14),
        v: cache_of(v.tensor, 2, total, few, 14) if cached else torch.randn(2, total, few, 14),
    }  # fmt: skip
    masks = []
    if mask == torch.bool:
        masks = [value("m", BATCH, 1, 1, SEQ, dtype=mask)]
        values[masks[0]] = torch.rand(2, 1, 1, total) > 0.3
    elif mask is not None:
        masks = [value("m", 1, many, SEQ, SEQ, dtype=mask)]
        values[masks[0]] = torch.randn(1, many, seq, total).to(mask)
    query = make(ops.Rope(), q, cos, sin) if rotated else q
    root = make(ops.Attention(14**-0.5, **options), query, k, v, *masks)
    sizes = {"batch": 2, "seq": seq, "past": past, "context": total + 7}
    return case_of(root, values, sizes, seq)


def convolved(
    op: ops.Conv2d, image: tuple[int, int, int], filters: tuple[int, int, int, int], bias: bool
) -> Case:
    """A convolution of a batch of images [channels, height, width]."""
    x, weight = value("x", BATCH, *image), value("w", *filters)
    values = {x: torch.randn(2, *image), weight: torch.randn(filters)}
    more = [value("b", filters[0])] if bias else []
    values |= {each: torch.randn(filters[0]) for each in more}
    return case_of(make(op, x, weight, *more), values, SIZES)


HALF_KINDS = ("decode", "prefill", "few", "mask", "embedding", "append", "convolution", "round ")
"""What the names of cases begin with whose results are stored in half precision."""

ROUNDED: dict[str, tuple[Any, ...]] = {
    "in groups": (32, 56), "a token": (None, 33), "to 4 bits": (16, 56, "int", 4),
    "to e4m3": (None, 56, "e4m3"), "to e2m1": (16, 80, "e2m1", 4),
}  # fmt: skip
"""Groups, channels, kinds and bits of activations that are rounded."""

CASES: dict[str, Callable[[], Case]] = {
    "rms_norm": partial(rows, lambda x, g: make(ops.RMSNorm(1e-5), x, g)),
    "layer_norm": partial(rows, lambda x, g, b: make(ops.LayerNorm(1e-5), x, g, b), 2),
    "softmax": partial(rows, lambda x: make(ops.Softmax(2), x), 0),
    **{
        f"reduce {kind}": partial(
            rows, lambda x, kind=kind: make(ops.Reduce(kind, (2,)), x), 0
        )
        for kind in ops.REDUCTIONS
    },
    **{
        f"{name} {what}": partial(rounded_norm, op, *sizes)
        for name, op in (("quantize", ops.Quantize), ("round", ops.FakeQuantize))
        for what, sizes in ROUNDED.items()
    },
    "residual and norm": residual_norm,
    "quantize long rows": partial(rounded_pieces, ops.Quantize, 32, 1536),
    "round long rows": partial(rounded_pieces, ops.FakeQuantize, 32, 1536),
    "round long rows, whole": partial(rounded_pieces, ops.FakeQuantize, None, 1536),
    "rotation": partial(rotated, 64, 64, 1, None, False),
    "rotation of blocks, quantized": partial(rotated, 128, 32, 1, ops.Quantize, True),
    "round a rotation of blocks": partial(rotated, 128, 32, 1, ops.FakeQuantize, True),
    "rotation by a factor": partial(rotated, 96, 48, 12, None, True),
    "rotation by a factor, quantized": partial(rotated, 72, 36, 36, ops.Quantize, False),
    "angles": angles,
    "embedding": embedding,
    "trailing positions": trailing,
    "strided slice, permuted": strided,
    "reshape and expand": reshaped,
    "conditions and integers": chosen,
    **{kind: partial(unary, kind) for kind in ops.UNARY if kind != "not"},
    **{kind: partial(binary, kind) for kind in ops.BINARY if kind not in ("and", "or")},
    **{f"gated {kind}": partial(gated, kind) for kind in ops.GATES},
    "append": partial(appended, False),
    "append rotated": partial(appended, True),
    "append int8": partial(appended_codes, "int8"),
    "append e4m3": partial(appended_codes, "e4m3"),
    "decode int8": partial(attention, 1, 100, causal=True, code="int8"),
    "decode e4m3": partial(attention, 2, 70, causal=True, code="e4m3"),
    "prefill int8": partial(attention, 70, 9, causal=True, code="int8"),
    "prefill e4m3": partial(attention, 70, 9, causal=True, code="e4m3"),
    "rope": rope,
    "convolution, patches": partial(
        convolved, ops.Conv2d((2, 2)), (4, 16, 16), (70, 4, 2, 2), True
    ),
    "convolution, padded": partial(
        convolved, ops.Conv2d((2, 1), (1, 2), (1, 2)), (5, 9, 11), (7, 5, 3, 3), False
    ),
    "convolution in groups": partial(
        convolved, ops.Conv2d(padding=(1, 1), groups=3), (9, 7, 6), (6, 3, 3, 3), True
    ),
    "decode": partial(attention, 1, 100, causal=True),
    "decode, first token": partial(attention, 1, 0, causal=True),
    "decode, a head each": partial(attention, 2, 70, heads=(3, 3), causal=True),
    "decode, window and cap": partial(attention, 2, 150, causal=True, window=20, softcap=5.0),
    "prefill": partial(attention, 70, 9, causal=True),
    "prefill, window": partial(attention, 70, 90, causal=True, window=20),
    "prefill, plain": partial(attention, 20, 0, rotated=False, cached=False),
    "few, plain": partial(attention, 5, 0, rotated=False, cached=False),
    "mask of bool": partial(
        attention, 20, 0, rotated=False, cached=False, mask=torch.bool
    ),
    "mask to add": partial(
        attention, 5, 0, rotated=False, cached=False, mask=torch.float32, softcap=3.0
    ),
}  # fmt: skip

HALVES = tuple(name for name in CASES if name.startswith(HALF_KINDS))
