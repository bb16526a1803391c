"""ATen calls that work element by element, reduce, or make constants."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from qc.ir import ops
from qc.ir.node import Node
from qc.passes.prepare.aten_call import Builder, Call


def unary(kind: str, call: Call) -> Node:
    """`abs(self) --> abs(self)`"""
    return call.make(ops.Unary(kind), call.tensor("self"))


def binary(kind: str, call: Call, first: str = "self", second: str = "other") -> Node:
    """`mul(self, other) --> mul(self, other)`; a number becomes a scalar of matching dtype."""
    return call.make(ops.Binary(kind), *matched(call, first, second))


def matched(call: Call, first: str, second: str) -> tuple[Node, Node]:
    """Return two operands; a number takes the dtype that torch gives it beside the other."""
    nodes = {name: call.tensor(name) for name in (first, second)}
    for name, other in ((first, second), (second, first)):
        if isinstance(nodes[name].op, ops.Scalar) and not isinstance(call[name], ops.Operand):
            nodes[name] = call.make(number(call[name], nodes[other].tensor.dtype))
    return nodes[first], nodes[second]


def number(value: Any, beside: torch.dtype) -> ops.Scalar:
    """Make the scalar of a Python number beside a tensor: it never widens the tensor."""
    if isinstance(value, bool):
        return ops.Scalar(value, torch.bool)
    if beside.is_floating_point:
        return ops.Scalar(float(value), beside if beside == torch.float64 else torch.float32)
    return ops.Scalar(value, torch.float32 if isinstance(value, float) else torch.int64)


def scaled(kind: str, call: Call) -> Node:
    """`add(a, b, alpha=k) --> add(a, mul(b, k))`"""
    a, b = matched(call, "self", "other")
    if call["alpha"] != 1:
        b = call.make(ops.Binary("mul"), b, call.make(number(call["alpha"], b.tensor.dtype)))
    return call.make(ops.Binary(kind), a, b)


def reversed_sub(call: Call) -> Node | None:
    """`rsub(a, b) --> sub(b, a)`"""
    if call["alpha"] != 1:
        return None
    a, b = matched(call, "self", "other")
    return call.make(ops.Binary("sub"), b, a)


def divide_rounding(call: Call) -> Node | None:
    """`div(a, b, rounding_mode="floor") --> floordiv(a, b)`"""
    mode = call["rounding_mode"]
    if mode not in (None, "floor"):
        return None
    return binary("div" if mode is None else "floordiv", call)


def logical(kind: str, call: Call) -> Node | None:
    """`a & b --> and(a, b)` on booleans."""
    a, b = matched(call, "self", "other")
    if {a.tensor.dtype, b.tensor.dtype} != {torch.bool}:
        return None
    return call.make(ops.Binary(kind), a, b)


def bitwise_not(call: Call) -> Node | None:
    """`~a --> not(a)` on booleans."""
    return unary("not", call) if call.tensor("self").tensor.dtype == torch.bool else None


def gelu(call: Call) -> Node:
    """`gelu(x, approximate="tanh") --> gelu_tanh(x)`"""
    return unary({"none": "gelu", "tanh": "gelu_tanh"}[call["approximate"]], call)


def square(call: Call) -> Node:
    """`square(x) --> pow(x, 2)`"""
    x = call.tensor("self")
    return call.make(ops.Binary("pow"), x, call.make(number(2, x.tensor.dtype)))


def clamp(call: Call) -> Node:
    """`clamp(x, low, high) --> min(max(x, low), high)`"""
    x = call.tensor("self")
    for name, kind in (("min", "max"), ("max", "min")):
        if call.arguments.get(name) is not None:
            limit = call[name]
            bound = (call.as_node(limit) if isinstance(limit, ops.Operand)
                     else call.make(number(limit, x.tensor.dtype)))  # fmt: skip
            x = call.make(ops.Binary(kind), x, bound)
    return x


def where(call: Call) -> Node:
    """`where(c, a, b) --> where(c, a, b)`"""
    return call.make(ops.Where(), call.tensor("condition"), *matched(call, "self", "other"))


def masked_fill(call: Call) -> Node:
    """`masked_fill(x, m, v) --> where(m, v, x)`"""
    x, value = matched(call, "self", "value")
    return call.make(ops.Where(), call.tensor("mask"), value, x)


def convert(call: Call) -> Node:
    """`to(x, dtype) --> cast(x)`, or x where it has that dtype."""
    return call.cast(call.tensor("self"), call.type.dtype)


def unchanged(call: Call) -> Node:
    """`contiguous(x) --> x`: values have no memory layout."""
    return call.tensor("self")


def dropout(call: Call) -> Node | None:
    """`dropout(x) --> x` outside training."""
    return call.tensor("input") if not call["train"] or call["p"] == 0 else None


# ---------------------------------------------------------------- reductions


def reduce(kind: str, call: Call) -> Node:
    """`mean(x, [-1], keepdim) --> reduce(x)`; integers are summed in i64, as torch does."""
    x = call.tensor("self")
    axes = call.arguments.get("dim")
    listed = (axes,) if isinstance(axes, int) else axes or tuple(range(x.tensor.rank))
    dtype = call.type.dtype if kind in ("sum", "mean") else None
    op = ops.Reduce(
        kind, tuple(call.axis_of(a) for a in listed), bool(call.arguments.get("keepdim"))
    )
    return call.make(op, call.cast(x, dtype))


def softmax(call: Call) -> Node:
    """`softmax(x, -1, dtype) --> softmax(cast(x))`"""
    x = call.cast(call.tensor("self"), call.type.dtype)
    return call.make(ops.Softmax(call.axis()), x)


def cumsum(call: Call) -> Node:
    """`cumsum(x, 1) --> cumsum(x)`"""
    x = call.cast(call.tensor("self"), call.arguments.get("dtype"))
    return call.make(ops.CumSum(call.axis()), x)


# ---------------------------------------------------------------- constants


def constant(value: Callable[[Call], Any], call: Call) -> Node | None:
    """`ones([batch, seq]) --> full([batch, seq], 1)`; of rank 0: a scalar."""
    filled, type = value(call), call.type
    if not isinstance(filled, bool | int | float):
        return None
    typed = torch.tensor(filled, dtype=type.dtype).item()
    if not type.rank:
        return call.make(ops.Scalar(typed, type.dtype))
    return call.make(ops.Full(type.shape, typed, type.dtype))


def arange(call: Call) -> Node | None:
    """`arange(start, end, step) --> start + step * arange(length)`"""
    start, step = call.arguments.get("start", 0), call.arguments.get("step", 1)
    if any(isinstance(v, float) for v in (start, call["end"], step)):
        return None
    length = call.type.shape[0]
    if step == 1:
        return call.cast(call.make(ops.Arange(length, start)), call.type.dtype)
    if not (isinstance(start, int) and isinstance(step, int)):
        return None
    steps = call.make(ops.Binary("mul"), call.make(ops.Arange(length)),
                      call.make(ops.Scalar(step, torch.int64)))  # fmt: skip
    shifted = call.make(ops.Binary("add"), steps, call.make(ops.Scalar(start, torch.int64)))
    return call.cast(shifted, call.type.dtype)


UNARY = ("abs", "neg", "reciprocal", "sqrt", "rsqrt", "exp", "log", "sin", "cos", "tanh",
         "sigmoid", "erf", "floor", "relu", "silu")  # fmt: skip
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
CONVERSIONS = ("to.dtype", "to.dtype_layout", "to.device", "to.other", "type_as.default",
               "_to_copy.default")  # fmt: skip
COPIES = ("contiguous.default", "clone.default", "alias.default", "detach.default",
          "lift_fresh_copy.default", "positive.default")  # fmt: skip

ELEMENTWISE: dict[str, Builder] = {
    **{f"aten.{kind}.default": partial(unary, kind) for kind in UNARY},
    "aten.logical_not.default": partial(unary, "not"),
    "aten.bitwise_not.default": bitwise_not,
    "aten.gelu.default": gelu,
    "aten.square.default": square,
    **{f"aten.{kind}.{form}": partial(binary, kind)
       for kind in (*COMPARISONS, "mul", "div") for form in ("Tensor", "Scalar")},
    **{f"aten.{kind}.{form}": partial(scaled, kind)
       for kind in ("add", "sub") for form in ("Tensor", "Scalar")},
    "aten.rsub.Tensor": reversed_sub,
    "aten.rsub.Scalar": reversed_sub,
    "aten.div.Tensor_mode": divide_rounding,
    "aten.div.Scalar_mode": divide_rounding,
    "aten.floor_divide.default": partial(binary, "floordiv"),
    "aten.minimum.default": partial(binary, "min"),
    "aten.maximum.default": partial(binary, "max"),
    **{f"aten.pow.{form}": partial(binary, "pow", second="exponent")
       for form in ("Tensor_Scalar", "Tensor_Tensor", "Scalar")},
    **{f"aten.{name}": partial(logical, kind) for kind in ("and", "or")
       for name in (f"__{kind}__.Tensor", f"bitwise_{kind}.Tensor", f"logical_{kind}.default")},
    **{f"aten.where.{form}": where for form in ("self", "Scalar", "ScalarOther", "ScalarSelf")},
    "aten.masked_fill.Scalar": masked_fill,
    "aten.masked_fill.Tensor": masked_fill,
    "aten.clamp.default": clamp,
    "aten.clamp.Tensor": clamp,
    "aten.clamp_min.default": clamp,
    "aten.clamp_max.default": clamp,
    **{f"aten.{name}": convert for name in CONVERSIONS},
    **{f"aten.{name}": unchanged for name in COPIES},
    "aten.dropout.default": dropout,
    "aten.mean.default": partial(reduce, "mean"),
    "aten.mean.dim": partial(reduce, "mean"),
    "aten.sum.default": partial(reduce, "sum"),
    "aten.sum.dim_IntList": partial(reduce, "sum"),
    "aten.amax.default": partial(reduce, "max"),
    "aten.amin.default": partial(reduce, "min"),
    "aten.softmax.int": softmax,
    "aten._softmax.default": softmax,
    "aten.cumsum.default": cumsum,
    **{f"aten.{name}.default": partial(constant, lambda call: 1)
       for name in ("ones", "new_ones", "ones_like")},
    **{f"aten.{name}.default": partial(constant, lambda call: 0)
       for name in ("zeros", "new_zeros", "zeros_like")},
    **{f"aten.{name}.default": partial(constant, lambda call: call["fill_value"])
       for name in ("full", "new_full", "full_like")},
    "aten.scalar_tensor.default": partial(constant, lambda call: call["s"]),
    **{f"aten.arange.{form}": arange for form in ("default", "start", "start_step")},
}  # fmt: skip
