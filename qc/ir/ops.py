"""All ops of the IR, on one page: attributes, type rule, torch meaning.

Order: leaves, element by element, shape, reductions and products, then the ops that passes
lift out of those (norms, RoPE, attention, gated activations), quantization, and `Torch`, which
carries any ATen call that is not understood.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qc.ir.hadamard import rotate
from qc.ir.op import Op, Sizes, same_float
from qc.ir.quantized import QuantizedTensor, quantize_activation
from qc.ir.types import (
    DTYPE_NAMES,
    ActivationFormat,
    Dim,
    TensorType,
    TupleType,
    ValueType,
    as_dim,
    bind_dim,
    broadcast_shapes,
    element_count,
    shape_text,
)
from qc.ir.weights.weight import Weight

# ---------------------------------------------------------------- leaves


@dataclass(frozen=True)
class Input(Op):
    """A named input of the graph."""

    name: ClassVar[str] = "input"
    label: str
    type: TensorType

    def infer(self) -> ValueType:
        return self.type

    def attributes(self) -> str:
        return self.label


@dataclass(frozen=True)
class Parameter(Op):
    """A stored tensor: a weight matrix as a sum of terms, or a vector, or a table."""

    name: ClassVar[str] = "weight"
    weight: Weight

    def infer(self) -> ValueType:
        return TensorType(self.weight.shape, self.weight.dtype)

    def meaning(self, *, sizes: Sizes) -> Tensor:
        return self.weight.dense()

    @property
    def structure(self) -> object:
        return self.weight.format

    def attributes(self) -> str:
        return str(self.weight.format)


@dataclass(frozen=True)
class Scalar(Op):
    """A number known at compile time, of rank 0."""

    name: ClassVar[str] = "scalar"
    value: float | int | bool
    dtype: torch.dtype = torch.float32

    def infer(self) -> ValueType:
        return TensorType((), self.dtype)

    def meaning(self, *, sizes: Sizes) -> Tensor:
        return torch.tensor(self.value, dtype=self.dtype)

    def attributes(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Size(Op):
    """The value of a symbolic dimension, as an i64 of rank 0."""

    name: ClassVar[str] = "size"
    dim: Dim

    def infer(self) -> ValueType:
        return TensorType((), torch.int64)

    def meaning(self, *, sizes: Sizes) -> Tensor:
        return torch.tensor(bind_dim(self.dim, dict(sizes)))


@dataclass(frozen=True)
class Arange(Op):
    """start, start + 1, ... (`length` values, i64)."""

    name: ClassVar[str] = "arange"
    length: Dim
    start: Dim = 0

    def infer(self) -> ValueType:
        return TensorType((as_dim(self.length),), torch.int64)

    def meaning(self, *, sizes: Sizes) -> Tensor:
        start = bind_dim(self.start, dict(sizes))
        return torch.arange(start, start + bind_dim(self.length, dict(sizes)))


@dataclass(frozen=True)
class Full(Op):
    """A tensor of one repeated value."""

    name: ClassVar[str] = "full"
    shape: tuple[Dim, ...]
    value: float | int | bool
    dtype: torch.dtype = torch.float32

    def infer(self) -> ValueType:
        return TensorType(self.shape, self.dtype)

    def meaning(self, *, sizes: Sizes) -> Tensor:
        return torch.full(concrete(self.shape, sizes), self.value, dtype=self.dtype)


def concrete(shape: tuple[Dim, ...], sizes: Sizes) -> tuple[int, ...]:
    """Bind every dimension of `shape`."""
    return tuple(bind_dim(d, dict(sizes)) for d in shape)


# ---------------------------------------------------------------- element by element

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs, "neg": torch.neg, "reciprocal": torch.reciprocal, "not": torch.logical_not,
    "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "exp": torch.exp, "log": torch.log,
    "sin": torch.sin, "cos": torch.cos, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "erf": torch.erf, "floor": torch.floor, "relu": torch.relu, "silu": F.silu,
    "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip
COMPARISONS: dict[str, Callable[[Any, Any], Tensor]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt,
    "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
BINARY: dict[str, Callable[[Any, Any], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.true_divide,
    "floordiv": torch.floor_divide, "pow": torch.pow,
    "min": torch.minimum, "max": torch.maximum,
    "and": torch.logical_and, "or": torch.logical_or, **COMPARISONS,
}  # fmt: skip
GATES = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")


@dataclass(frozen=True)
class Unary(Op):
    """A function of one value, element by element."""

    name: ClassVar[str] = "unary"
    kind: str

    def infer(self, x: TensorType) -> ValueType:
        if self.kind not in UNARY:
            raise ValueError(f"unknown function {self.kind!r}")
        if self.kind == "not":
            return x.cast(torch.bool)
        if self.kind not in ("abs", "neg", "relu") and not x.is_float:
            return x.cast(torch.float32)
        return x

    def meaning(self, x: Tensor, *, sizes: Sizes) -> Tensor:
        return UNARY[self.kind](x)

    def __str__(self) -> str:
        return self.kind


def promote(a: TensorType, b: TensorType) -> torch.dtype:
    """Promote dtypes as torch does; a value of rank 0 does not widen within its category."""
    left = torch.empty((1,) if a.rank else (), dtype=a.dtype, device="meta")
    right = torch.empty((1,) if b.rank else (), dtype=b.dtype, device="meta")
    return torch.result_type(left, right)


@dataclass(frozen=True)
class Binary(Op):
    """A function of two values, element by element, with broadcasting."""

    name: ClassVar[str] = "binary"
    kind: str

    def infer(self, a: TensorType, b: TensorType) -> ValueType:
        if self.kind not in BINARY:
            raise ValueError(f"unknown function {self.kind!r}")
        dtype = promote(a, b)
        if self.kind in COMPARISONS or self.kind in ("and", "or"):
            dtype = torch.bool
        elif self.kind == "div" and not dtype.is_floating_point:
            dtype = torch.float32
        return TensorType(broadcast_shapes(a.shape, b.shape), dtype)

    def meaning(self, a: Tensor, b: Tensor, *, sizes: Sizes) -> Tensor:
        if self.kind in ("min", "max"):
            dtype = torch.result_type(a, b)
            a, b = a.to(dtype), b.to(dtype)
        return BINARY[self.kind](a, b)

    def __str__(self) -> str:
        return self.kind


@dataclass(frozen=True)
class Where(Op):
    """condition ? a : b, element by element, with broadcasting."""

    name: ClassVar[str] = "where"

    def infer(self, condition: TensorType, a: TensorType, b: TensorType) -> ValueType:
        if condition.dtype != torch.bool:
            raise ValueError(f"the condition of where must be bool, not {condition}")
        return TensorType(broadcast_shapes(condition.shape, a.shape, b.shape), promote(a, b))

    def meaning(self, condition: Tensor, a: Tensor, b: Tensor, *, sizes: Sizes) -> Tensor:
        return torch.where(condition, a, b)


@dataclass(frozen=True)
class Cast(Op):
    """Convert to another dtype."""

    name: ClassVar[str] = "cast"
    dtype: torch.dtype

    def infer(self, x: TensorType) -> ValueType:
        return x.cast(self.dtype)

    def meaning(self, x: Tensor, *, sizes: Sizes) -> Tensor:
        return x.to(self.dtype)

    def attributes(self) -> str:
        return DTYPE_NAMES[self.dtype]


@dataclass(frozen=True)
class GatedActivation(Op):
    """kind(gate) * up: SwiGLU, GeGLU and their relatives. Shazeer 2020, section 2."""

    name: ClassVar[str] = "gated"
    kind: str

    def infer(self, gate: TensorType, up: TensorType) -> ValueType:
        if self.kind not in GATES or gate != up:
            raise ValueError(f"{self.kind} gates two equal values, got {gate} and {up}")
        return up

    def meaning(self, gate: Tensor, up: Tensor, *, sizes: Sizes) -> Tensor:
        return UNARY[self.kind](gate) * up


# ---------------------------------------------------------------- shape


@dataclass(frozen=True)
class Reshape(Op):
    """The same elements in row-major order under another shape."""

    name: ClassVar[str] = "reshape"
    shape: tuple[Dim, ...]

    def infer(self, x: TensorType) -> ValueType:
        if element_count(x.shape) != element_count(self.shape):
            raise ValueError(f"{x} has not as many elements as {shape_text(self.shape)}")
        return x.reshaped(self.shape)

    def meaning(self, x: Tensor, *, sizes: Sizes) -> Tensor:
        return x.reshape(concrete(self.shape, sizes))

    def attributes(self) -> str:
        return shape_text(self.shape)


@dataclass(frozen=True)
class Permute(Op):
    """Reorder the axes: axis i of the result is axis order[i] of the input."""

    name: ClassVar[str] = "permute"
    order: tuple[int, ...]

    def infer(self, x: TensorType) -> ValueType:
        if sorted(self.order) != list(range(x.rank)):
            raise ValueError(f"{self.order} is no order of the axes of {x}")
        return x.reshaped(tuple(x.shape[i] for i in self.order))

    def meaning(self, x: Tensor, *, sizes: Sizes) -> Tensor:
        return x.permute(self.order)

    def attributes(self) -> str:
        return str(list(self.order))


@dataclass(frozen=True)
class Expand(Op):
    """Repeat axes of size 1 without copying."""

    name: ClassVar[str] = "expand"
    shape: tuple[Dim, ...]

    def infer(self, x: TensorType) -> ValueType:
        if broadcast_shapes(x.shape, self.shape) != self.shape:
            raise ValueError(f"{x} does not expand to {shape_text(self.shape)}")
        return x.reshaped(self.shape)

    def meaning(self, x: Tensor, *, sizes: Sizes) -> Tensor:
        return x.expand(concrete(self.shape, sizes))

    def attributes(self) -> str:
        return shape_text(self.shape)


@dataclass(frozen=True)
class Slice(Op):
    """Elements start, start + step, ... below stop of one axis (0 <= start <= stop <= size)."""

    name: ClassVar[str] = "slice"
    axis: int
    start: Dim
    stop: Dim
    step: int = 1

    def infer(self, x: TensorType) -> ValueType:
        if not 0 <= self.axis < x.rank:
            raise ValueError(f"{x} has no axis {self.axis}")
        length = as_dim(self.stop - self.start)
        if self.step != 1:
            if not isinstance(length, int):
                raise ValueError("a strided slice needs a length known at compile time")
            length = -(-length // self.step)
        shape = (*x.shape[: self.axis], length, *x.shape[self.axis + 1 :])
        return x.reshaped(shape)

    def meaning(self, x: Tensor, *, sizes: Sizes) -> Tensor:
        start, stop = bind_dim(self.start, dict(sizes)), bind_dim(self.stop, dict(sizes))
        index: list[slice] = [slice(None)] * x.ndim
        index[self.axis] = slice(start, stop, self.step)
        return x[tuple(index)]

    def attributes(self) -> str:
        step = f":{self.step}" if self.step != 1 else ""
        return f"axis={self.axis}, {self.start}:{self.stop}{step}"


@dataclass(frozen=True)
class Concat(Op):
    """Join along one axis."""

    name: ClassVar[str] = "concat"
    axis: int

    def infer(self, *xs: TensorType) -> ValueType:
        first = xs[0]
        around = first.shape[: self.axis] + first.shape[self.axis + 1 :]
        if any(x.shape[: self.axis] + x.shape[self.axis + 1 :] != around for x in xs):
            raise ValueError("cannot join " + ", ".join(map(str, xs)))
        length = as_dim(sum((x.shape[self.axis] for x in xs), 0))
        shape = (*first.shape[: self.axis], length, *first.shape[self.axis + 1 :])
        return first.reshaped(shape)

    def meaning(self, *xs: Tensor, sizes: Sizes) -> Tensor:
        return torch.cat(xs, self.axis)


@dataclass(frozen=True)
class Embedding(Op):
    """Rows of a table, chosen by integer ids: table[ids]."""

    name: ClassVar[str] = "embedding"

    def infer(self, ids: TensorType, table: TensorType) -> ValueType:
        if ids.is_float or table.rank != 2:
            raise ValueError(f"expected integer ids and a matrix, got {ids} and {table}")
        return TensorType((*ids.shape, table.shape[1]), table.dtype)

    def meaning(self, ids: Tensor, table: Tensor, *, sizes: Sizes) -> Tensor:
        return F.embedding(ids, table)


# ---------------------------------------------------------------- reductions and products

REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin,
}  # fmt: skip


@dataclass(frozen=True)
class Reduce(Op):
    """Sum, mean, maximum or minimum over axes."""

    name: ClassVar[str] = "reduce"
    kind: str
    axes: tuple[int, ...]
    keepdim: bool = False

    def infer(self, x: TensorType) -> ValueType:
        if self.kind not in REDUCTIONS or any(not 0 <= a < x.rank for a in self.axes):
            raise ValueError(f"cannot reduce {x} by {self}")
        kept = [1 if i in self.axes else d for i, d in enumerate(x.shape)]
        if not self.keepdim:
            kept = [d for i, d in enumerate(kept) if i not in self.axes]
        return x.reshaped(tuple(kept))

    def meaning(self, x: Tensor, *, sizes: Sizes) -> Tensor:
        return REDUCTIONS[self.kind](x, dim=self.axes, keepdim=self.keepdim)


@dataclass(frozen=True)
class CumSum(Op):
    """Running sum along one axis, in i64 for integers and booleans."""

    name: ClassVar[str] = "cumsum"
    axis: int

    def infer(self, x: TensorType) -> ValueType:
        return x if x.is_float else x.cast(torch.int64)

    def meaning(self, x: Tensor, *, sizes: Sizes) -> Tensor:
        return torch.cumsum(x, self.axis)


@dataclass(frozen=True)
class Softmax(Op):
    """exp(x) / sum(exp(x)) over one axis."""

    name: ClassVar[str] = "softmax"
    axis: int

    def infer(self, x: TensorType) -> ValueType:
        same_float(x)
        return x

    def meaning(self, x: Tensor, *, sizes: Sizes) -> Tensor:
        return torch.softmax(x, self.axis)


@dataclass(frozen=True)
class MatMul(Op):
    """Batched matrix product [..., m, k] x [..., k, n], batch axes broadcast."""

    name: ClassVar[str] = "matmul"

    def infer(self, a: TensorType, b: TensorType) -> ValueType:
        if a.rank < 2 or b.rank < 2 or a.shape[-1] != b.shape[-2]:
            raise ValueError(f"cannot multiply {a} by {b}")
        batch = broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return TensorType((*batch, a.shape[-2], b.shape[-1]), promote(a, b))

    def meaning(self, a: Tensor, b: Tensor, *, sizes: Sizes) -> Tensor:
        return a @ b


@dataclass(frozen=True)
class Linear(Op):
    """x W^T (+ bias), with x [..., in], W [out, in], bias [out]. x may be quantized."""

    name: ClassVar[str] = "linear"

    def infer(self, x: TensorType, weight: TensorType, bias: TensorType | None = None) -> ValueType:
        if weight.rank != 2 or x.shape[-1] != weight.shape[1]:
            raise ValueError(f"a linear with weight {weight} does not take {x}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias {bias} does not fit weight {weight}")
        dtype = torch.float32 if x.format else x.dtype
        return TensorType((*x.shape[:-1], weight.shape[0]), dtype)

    def meaning(
        self,
        x: Tensor | QuantizedTensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        sizes: Sizes,
    ) -> Tensor:
        if isinstance(x, QuantizedTensor):
            x = x.dequantize()
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@dataclass(frozen=True)
class Hadamard(Op):
    """x (S (x) factor) over each `block` channels: a rotation where `factor` is orthogonal.

    x [..., channels], factor [m, m], S the orthonormal Sylvester matrix of order block / m, a power
    of two: channel i m + j of a block is place (i, j). A transposed factor gives the inverse.
    """

    name: ClassVar[str] = "hadamard"
    block: int

    def infer(self, x: TensorType, factor: TensorType) -> ValueType:
        same_float(x, factor)
        order = factor.shape[0] if factor.rank == 2 else 0
        if not isinstance(order, int) or order < 1 or factor.shape[1] != order:
            raise ValueError(f"the factor of a transform must be square, not {factor}")
        rows, rest = divmod(self.block, order)
        if rest or rows < 1 or rows & (rows - 1):
            raise ValueError(f"{self.block} is not a power of two times the order of {factor}")
        if not x.shape or not isinstance(x.shape[-1], int) or x.shape[-1] % self.block:
            raise ValueError(f"{x} has no blocks of {self.block} channels")
        return x

    def meaning(self, x: Tensor, factor: Tensor, *, sizes: Sizes) -> Tensor:
        return rotate(x, factor, self.block)


@dataclass(frozen=True)
class Conv2d(Op):
    """Two-dimensional convolution: x [n, c, h, w], weight [out, c / groups, kh, kw], bias [out]."""

    name: ClassVar[str] = "conv2d"
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def infer(self, x: TensorType, weight: TensorType, bias: TensorType | None = None) -> ValueType:
        if x.rank != 4 or weight.rank != 4 or x.shape[1] != weight.shape[1] * self.groups:
            raise ValueError(f"a convolution with weight {weight} does not take {x}")
        window = zip(
            x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
        )
        if not all(isinstance(size, int) for size in x.shape[2:]):
            raise ValueError("a convolution needs an image size known at compile time")
        out = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in window]
        return x.reshaped((x.shape[0], weight.shape[0], *out))

    def meaning(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, sizes: Sizes
    ) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


# ---------------------------------------------------------------- lifted


@dataclass(frozen=True)
class RMSNorm(Op):
    """x / sqrt(mean(x^2) + eps) * gain over the last axis. Zhang and Sennrich 2019, eq. 4."""

    name: ClassVar[str] = "rms_norm"
    eps: float

    def infer(self, x: TensorType, gain: TensorType) -> ValueType:
        same_float(x, gain)
        if gain.shape != x.shape[-1:]:
            raise ValueError(f"gain {gain} does not fit {x}")
        return x

    def meaning(self, x: Tensor, gain: Tensor, *, sizes: Sizes) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * gain


@dataclass(frozen=True)
class LayerNorm(Op):
    """(x - mean) / sqrt(variance + eps) * gain + bias over the last axis. Ba et al. 2016."""

    name: ClassVar[str] = "layer_norm"
    eps: float

    def infer(self, x: TensorType, gain: TensorType, bias: TensorType) -> ValueType:
        same_float(x, gain, bias)
        if gain.shape != x.shape[-1:] or bias.shape != gain.shape:
            raise ValueError(f"gain {gain} and bias {bias} do not fit {x}")
        return x

    def meaning(self, x: Tensor, gain: Tensor, bias: Tensor, *, sizes: Sizes) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], gain, bias, self.eps)


@dataclass(frozen=True)
class Rope(Op):
    """Rotary position embedding of the first `cos.shape[-1]` channels of each head.

    x [batch, seq, heads, dim]; cos, sin [batch or 1, seq, rotary]. Su et al. 2021, eq. 34, in the
    "rotate half" pairing (channel i with i + rotary/2): x cos + rotate_half(x) sin.
    """

    name: ClassVar[str] = "rope"

    def infer(self, x: TensorType, cos: TensorType, sin: TensorType) -> ValueType:
        fits = x.rank == 4 and cos.rank == 3 and cos.shape == sin.shape
        if not fits or cos.shape[1] != x.shape[1] or cos.shape[2] > x.shape[3]:
            raise ValueError(f"tables {cos} and {sin} do not rotate {x}")
        return x

    def meaning(self, x: Tensor, cos: Tensor, sin: Tensor, *, sizes: Sizes) -> Tensor:
        rotary, half = cos.shape[-1], cos.shape[-1] // 2
        turned, kept = x[..., :rotary], x[..., rotary:]
        partner = torch.cat((-turned[..., half:], turned[..., :half]), -1)
        return torch.cat((turned * cos.unsqueeze(2) + partner * sin.unsqueeze(2), kept), -1)


@dataclass(frozen=True)
class Append(Op):
    """The cache after this call: past [batch, past, heads, dim] followed by new [batch, seq, ...],
    stored as past is: in its dtype, or quantized in its format."""

    name: ClassVar[str] = "append"

    def infer(self, past: TensorType, new: TensorType) -> ValueType:
        around = (past.shape[0], *past.shape[2:])
        if past.rank != 4 or (new.shape[0], *new.shape[2:]) != around:
            raise ValueError(f"cannot append {new} to {past}")
        length = as_dim(past.shape[1] + new.shape[1])
        return past.reshaped((past.shape[0], length, *past.shape[2:]))

    def meaning(
        self, past: Tensor | QuantizedTensor, new: Tensor, *, sizes: Sizes
    ) -> Tensor | QuantizedTensor:
        if isinstance(past, QuantizedTensor):
            added = quantize_activation(new, past.format)
            codes = torch.cat((past.codes, added.codes), 1)
            return QuantizedTensor(codes, torch.cat((past.scale, added.scale), 1), past.format)
        return torch.cat((past, new.to(past.dtype)), 1)


@dataclass(frozen=True)
class Attention(Op):
    """softmax(softcap(scale q k^T) + mask) v with grouped heads.

    q [batch, seq, heads, dim], k [batch, total, kv_heads, dim], v [batch, total, kv_heads, dim_v],
    mask (optional) bool or additive, broadcast to [batch, heads, seq, total].
    Query i stands at position total - seq + i. `causal` hides later positions, `window` all but
    the last `window` positions up to its own, `softcap` is c tanh(x / c).
    Vaswani et al. 2017, section 3.2.1; grouped heads: Ainslie et al. 2023.
    """

    name: ClassVar[str] = "attention"
    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None

    def infer(
        self, q: TensorType, k: TensorType, v: TensorType, mask: TensorType | None = None
    ) -> ValueType:
        same_float(q, k, v)
        if not (q.rank == k.rank == v.rank == 4) or q.shape[3] != k.shape[3]:
            raise ValueError(f"cannot attend from {q} to {k} and {v}")
        if k.shape[:3] != v.shape[:3] or q.shape[2] % k.shape[2]:
            raise ValueError(f"heads of {q}, {k} and {v} do not match")
        return q.reshaped((*q.shape[:3], v.shape[3]))

    def meaning(
        self, q: Tensor, k: Tensor | QuantizedTensor, v: Tensor | QuantizedTensor,
        mask: Tensor | None = None, *, sizes: Sizes,
    ) -> Tensor:  # fmt: skip
        k, v = (t.dequantize() if isinstance(t, QuantizedTensor) else t for t in (k, v))
        q, k, v = (t.to(q.dtype).transpose(1, 2) for t in (q, k, v))
        if self.is_plain(q.shape[2], k.shape[2]) and mask is None:
            attended = F.scaled_dot_product_attention(
                q, k, v, is_causal=self.causal and q.shape[2] > 1, scale=self.scale, enable_gqa=True
            )
            return attended.transpose(1, 2)
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = (q @ k.transpose(-1, -2)) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None and mask.dtype != torch.bool:
            scores = scores + mask
        visible = self.visible(q.shape[2], k.shape[2])
        if mask is not None and mask.dtype == torch.bool:
            visible = visible & mask
        scores = scores.masked_fill(~visible, -math.inf)
        return (torch.softmax(scores, -1) @ v).transpose(1, 2)

    def is_plain(self, seq: int, total: int) -> bool:
        """Say whether torch has this attention as one call, which is four times as fast; its
        causal one sees no past, and a single query sees everything."""
        plain = self.window is None and self.softcap is None
        return plain and (not self.causal or seq in (1, total))

    def visible(self, seq: int, total: int) -> Tensor:
        """Return the bool [seq, total] pattern of `causal` and `window`."""
        query = torch.arange(total - seq, total).unsqueeze(1)
        key = torch.arange(total).unsqueeze(0)
        pattern = torch.ones(seq, total, dtype=torch.bool)
        if self.causal:
            pattern &= key <= query
        if self.window is not None:
            pattern &= key > query - self.window
        return pattern


# ---------------------------------------------------------------- quantization


@dataclass(frozen=True)
class Quantize(Op):
    """Round an activation to the codes of `format`; `Linear` accepts the quantized value."""

    name: ClassVar[str] = "quantize"
    format: ActivationFormat

    def infer(self, x: TensorType) -> TensorType:
        same_float(x)
        if not self.format.takes(x.shape[-1]):
            raise ValueError(f"{shape_text(x.shape)} is no whole number of groups of {self.format}")
        return TensorType(x.shape, x.dtype, self.format)

    def meaning(self, x: Tensor, *, sizes: Sizes) -> QuantizedTensor:
        return quantize_activation(x, self.format)

    def attributes(self) -> str:
        return str(self.format)


@dataclass(frozen=True)
class FakeQuantize(Op):
    """Round an activation to what codes of `format` stand for, and leave it a float. Jacob et al.
    2018, section 3."""

    name: ClassVar[str] = "fake_quantize"
    format: ActivationFormat

    def infer(self, x: TensorType) -> TensorType:
        return Quantize(self.format).infer(x).cast(torch.float32)

    def meaning(self, x: Tensor, *, sizes: Sizes) -> Tensor:
        return quantize_activation(x, self.format).dequantize()

    def attributes(self) -> str:
        return str(self.format)


# ---------------------------------------------------------------- anything else


@dataclass(frozen=True)
class Operand:
    """The place of input `index` in the arguments of an uninterpreted call."""

    index: int

    def __str__(self) -> str:
        return f"#{self.index}"


def fill_arguments(template: Any, values: tuple[Any, ...], sizes: Sizes) -> Any:
    """Put input values and concrete sizes into an argument template."""
    if isinstance(template, Operand):
        return values[template.index]
    if isinstance(template, tuple | list):
        return [fill_arguments(t, values, sizes) for t in template]
    if hasattr(template, "free_symbols"):
        return bind_dim(template, dict(sizes))
    return template


@dataclass(frozen=True)
class Torch(Op):
    """An ATen call carried untouched: `overload` such as "aten.topk.default", its positional and
    keyword arguments as templates, and the type that torch.export inferred."""

    name: ClassVar[str] = "torch"
    overload: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    type: ValueType = field(default_factory=lambda: TupleType(()))

    def infer(self, *types: ValueType) -> ValueType:
        return self.type

    @property
    def operator(self) -> Any:
        """The overload; AttributeError or RuntimeError where torch has none of this name."""
        namespace, packet, overload = self.overload.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)

    def meaning(self, *values: Any, sizes: Sizes) -> Any:
        args = fill_arguments(self.args, values, sizes)
        kwargs = {name: fill_arguments(value, values, sizes) for name, value in self.kwargs}
        return self.operator(*args, **kwargs)

    def attributes(self) -> str:
        return self.overload


@dataclass(frozen=True)
class Item(Op):
    """One result of a call that has several."""

    name: ClassVar[str] = "item"
    index: int

    def infer(self, several: TupleType) -> ValueType:
        return several.items[self.index]

    def meaning(self, several: Any, *, sizes: Sizes) -> Tensor:
        item: Tensor = several[self.index]
        return item
