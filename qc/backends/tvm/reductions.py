"""Single ops that combine many elements, over any axes: correct everywhere, fast where cheap to be.

These are the honest last resort: reductions and softmax over the last axis, attention and linears
with stored weights have kernels of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from tvm import tirx
from tvm.tirx.script import builder as T

from qc.backends.region import Region
from qc.backends.tvm.append import is_cache
from qc.backends.tvm.function import (
    Function,
    build,
    for_each,
    integer,
    known_product,
    pieces,
    product,
    span,
    store,
    tree_reduce,
)
from qc.backends.tvm.kernel import Kernel
from qc.backends.tvm.vector_math import TVM_NAMES, bind, convert, exp, spread
from qc.ir import ops
from qc.ir.node import Node
from qc.ir.op import Op
from qc.ir.types import Dim

PrimExpr = Any
COMBINE: dict[str, Callable[[PrimExpr, PrimExpr], PrimExpr]] = {
    "sum": lambda a, b: a + b, "mean": lambda a, b: a + b, "max": tirx.max, "min": tirx.min,
}  # fmt: skip

# A guess for loops of unknown length, on which only the decision to start threads depends.
TYPICAL = 64


def accumulator_type(dtype: torch.dtype) -> str:
    """Return the type in which sums are kept: float32 for half precision."""
    return "float32" if dtype in (torch.float16, torch.bfloat16) else TVM_NAMES[dtype]


def unflatten(function: Function, position: PrimExpr, dims: Sequence[Dim]) -> list[PrimExpr]:
    """Split a flat position into positions along `dims`."""
    index: list[PrimExpr] = []
    for dim in reversed(dims[1:]):
        size = function.dim(dim)
        index.append(bind(tirx.truncmod(position, size)))
        position = bind(tirx.truncdiv(position, size))
    return [position, *reversed(index)] if dims else []


def flatten(function: Function, index: Sequence[PrimExpr], dims: Sequence[Dim]) -> PrimExpr:
    """Combine positions along `dims` into a flat one; axes of size 1 are broadcast."""
    offset = integer(0)
    for dim, coordinate in zip(dims, index, strict=True):
        offset = offset * function.dim(dim) + (integer(0) if dim == 1 else coordinate)
    return offset


def each(function: Function, dims: Sequence[Dim], work: int, body: Callable[..., None]) -> None:
    """Visit every index of `dims`: body(flat position, index)."""
    known = known_product(tuple(dims))
    extent = function.dim(product(tuple(dims))) if known is None else known
    for_each(extent, work, lambda i: body(i, unflatten(function, i, dims)))


def length_of(dim: Dim) -> int:
    """Return a length, or a guess at it."""
    return dim if isinstance(dim, int) else TYPICAL


def lowest(kind: str, dtype: str) -> PrimExpr:
    """Return what changes nothing when combined."""
    if kind in ("sum", "mean"):
        return tirx.const(0, dtype)
    return tirx.min_value(dtype) if kind == "max" else tirx.max_value(dtype)


def emit_reduce(function: Function, node: Node, result: Any) -> None:
    """Reduce over any axes."""
    assert isinstance(node.op, ops.Reduce)
    op, (x,) = node.op, node.inputs
    shape = x.tensor.shape
    kept = [a for a in range(len(shape)) if a not in op.axes]
    dtype = accumulator_type(node.tensor.dtype)
    count = product(tuple(shape[a] for a in op.axes))

    def one(position: PrimExpr, index: list[PrimExpr]) -> None:
        total = T.alloc_buffer((1,), dtype)
        store(total, integer(0), lowest(op.kind, dtype))
        with ExitStack() as loops:
            coordinates = dict(zip(kept, index, strict=True))
            for axis in op.axes:
                loop = T.serial(integer(0), function.dim(shape[axis]))
                coordinates[axis] = loops.enter_context(loop)
            at = flatten(function, [coordinates[a] for a in range(len(shape))], shape)
            found = convert(function.buffers[x][at], dtype)
            store(total, integer(0), COMBINE[op.kind](total[integer(0)], found))
        value = total[integer(0)]
        if op.kind == "mean":
            value = value / convert(function.dim(count), dtype)
        store(result, position, convert(value, TVM_NAMES[node.tensor.dtype]))

    each(function, [shape[a] for a in kept], length_of(count), one)


def along(
    function: Function, node: Node, axis: int, body: Callable[[Callable[..., Any]], None]
) -> None:
    """Visit every line of a value along `axis`: body(position in the line -> flat position)."""
    shape = node.tensor.shape
    others = [*shape[:axis], *shape[axis + 1 :]]

    def line(_: PrimExpr, index: list[PrimExpr]) -> None:
        body(lambda i: flatten(function, [*index[:axis], i, *index[axis:]], shape))

    each(function, others, 16 * length_of(shape[axis]), line)


def emit_softmax(function: Function, node: Node, result: Any) -> None:
    """Softmax over any axis, in three walks over each line."""
    assert isinstance(node.op, ops.Softmax)
    (x,) = node.inputs
    length = function.dim(x.tensor.shape[node.op.axis])
    buffer, first = function.buffers[x], integer(0)

    def line(at: Callable[[PrimExpr], PrimExpr]) -> None:
        largest, total = T.alloc_buffer((1,), "float32"), T.alloc_buffer((1,), "float32")
        store(largest, first, tirx.const(-3.4e38, "float32"))
        with T.serial(first, length) as i:
            store(largest, first, tirx.max(largest[first], convert(buffer[at(i)], "float32")))
        store(total, first, tirx.const(0.0, "float32"))
        with T.serial(first, length) as i:
            power = bind(exp(convert(buffer[at(i)], "float32") - largest[first]))
            store(total, first, total[first] + power)
        with T.serial(first, length) as i:
            power = exp(convert(buffer[at(i)], "float32") - largest[first])
            store(result, at(i), convert(power / total[first], TVM_NAMES[node.tensor.dtype]))

    along(function, x, node.op.axis, line)


def emit_cumsum(function: Function, node: Node, result: Any) -> None:
    """Running sums along any axis."""
    assert isinstance(node.op, ops.CumSum)
    op, (x,) = node.op, node.inputs
    dtype, first = accumulator_type(node.tensor.dtype), integer(0)

    def line(at: Callable[[PrimExpr], PrimExpr]) -> None:
        total = T.alloc_buffer((1,), dtype)
        store(total, first, tirx.const(0, dtype))
        with T.serial(first, function.dim(x.tensor.shape[op.axis])) as i:
            found = convert(function.buffers[x][at(i)], dtype)
            store(total, first, total[first] + found)
            store(result, at(i), convert(total[first], TVM_NAMES[node.tensor.dtype]))

    along(function, x, node.op.axis, line)


def emit_matmul(function: Function, node: Node, result: Any) -> None:
    """One row of the product at a time: vectors along the columns of b."""
    a, b = node.inputs
    *batch, _, columns = node.tensor.shape
    inner, rows = a.tensor.shape[-1], node.tensor.shape[:-1]
    lanes, width = function.lanes, function.dim(columns)
    dtype = accumulator_type(node.tensor.dtype)
    work = length_of(inner) * length_of(columns) // 4

    def row(position: PrimExpr, index: list[PrimExpr]) -> None:
        left = flatten(function, index[-1 - len(a.tensor.shape[:-2]) :], a.tensor.shape[:-1])
        left = bind(left * function.dim(inner))
        right = index[:-1][len(batch) - len(b.tensor.shape[:-2]) :]
        right = flatten(function, right, b.tensor.shape[:-2])
        right = bind(right * function.dim(inner) * width)

        def columns_at(column: PrimExpr, lanes: int) -> None:
            total = T.alloc_buffer((lanes,), dtype)
            store(total, span(0, lanes), spread(tirx.const(0, dtype), lanes))
            with T.serial(integer(0), function.dim(inner)) as k:
                x = spread(convert(function.buffers[a][left + k], dtype), lanes)
                y = function.buffers[b][span(right + k * width + column, lanes)]
                store(total, span(0, lanes), total[span(0, lanes)] + x * convert(y, dtype))
            value = convert(total[span(0, lanes)], TVM_NAMES[node.tensor.dtype])
            store(result, span(position * width + column, lanes), value)

        vectors = bind(tirx.truncdiv(width, integer(lanes)))
        with T.serial(integer(0), vectors) as i:
            columns_at(i * integer(lanes), lanes)
        with T.serial(vectors * integer(lanes), width) as i:
            columns_at(i, 1)

    each(function, rows, work, row)


def dot(
    x: Any, y: Any, left: PrimExpr, right: PrimExpr, size: int, lanes: int
) -> list[tuple[PrimExpr, int]]:
    """Return the products of `size` consecutive values, vector by vector."""
    return [
        (
            convert(x[span(left + integer(offset), width)], "float32")
            * convert(y[span(right + integer(offset), width)], "float32"),
            width,
        )
        for offset, width in pieces(size, lanes)
    ]


def emit_linear(function: Function, node: Node, result: Any) -> None:
    """x W^T (+ bias) for a weight that is computed."""
    x, weight, *bias = node.inputs
    inner, outer = int(x.tensor.shape[-1]), int(node.tensor.shape[-1])
    lanes = function.lanes
    whole = inner // lanes * lanes

    def one(position: PrimExpr, index: list[PrimExpr]) -> None:
        left = bind(tirx.truncdiv(position, integer(outer)) * integer(inner))
        right = bind(index[-1] * integer(inner))
        total = T.alloc_buffer((lanes,), "float32")
        at = span(0, lanes)
        store(total, at, spread(tirx.const(0.0, "float32"), lanes))
        x_values, w_values = function.buffers[x], function.buffers[weight]
        with T.serial(integer(0), integer(whole // lanes)) as i:
            step = i * integer(lanes)
            ((term, _),) = dot(x_values, w_values, left + step, right + step, lanes, lanes)
            store(total, at, total[at] + term)
        value = tree_reduce(total[at], lanes, COMBINE["sum"])
        start = integer(whole)
        for term, width in dot(x_values, w_values, left + start, right + start, inner - whole,
                               lanes):  # fmt: skip
            value = value + tree_reduce(term, width, COMBINE["sum"])
        if bias:
            value = value + convert(function.buffers[bias[0]][index[-1]], "float32")
        store(result, position, convert(value, TVM_NAMES[node.tensor.dtype]))

    each(function, node.tensor.shape, inner, one)


def emit_conv2d(function: Function, node: Node, result: Any) -> None:
    """Two-dimensional convolution, one output element at a time."""
    assert isinstance(node.op, ops.Conv2d)
    op, (x, weight, *bias) = node.op, node.inputs
    _, channels, height, width = x.tensor.shape
    outer, inner, kernel_h, kernel_w = (int(d) for d in weight.tensor.shape)
    contiguous = op.dilation[1] == 1 and op.padding == (0, 0)

    def one(position: PrimExpr, index: list[PrimExpr]) -> None:
        n, out, row, column = index
        group = bind(tirx.truncdiv(out, integer(outer // op.groups)))
        total = T.alloc_buffer((1,), "float32")
        start = tirx.const(0.0, "float32")
        if bias:
            start = convert(function.buffers[bias[0]][out], "float32")
        store(total, integer(0), start)
        with (
            T.serial(integer(0), integer(inner)) as c,
            T.serial(integer(0), integer(kernel_h)) as i,
        ):
            y = row * integer(op.stride[0]) + i * integer(op.dilation[0]) - integer(op.padding[0])
            z = column * integer(op.stride[1]) - integer(op.padding[1])
            channel = group * integer(inner) + c
            left = bind(
                ((n * function.dim(channels) + channel) * function.dim(height) + y)
                * function.dim(width) + z
            )  # fmt: skip
            right = bind(((out * integer(inner) + c) * integer(kernel_h) + i) * integer(kernel_w))
            values, weights = function.buffers[x], function.buffers[weight]
            if contiguous:
                for term, lanes in dot(values, weights, left, right, kernel_w, function.lanes):
                    added = total[integer(0)] + tree_reduce(term, lanes, COMBINE["sum"])
                    store(total, integer(0), added)
            else:
                with T.serial(integer(0), integer(kernel_w)) as j:
                    step = j * integer(op.dilation[1])
                    inside = tirx.And(
                        tirx.And(y >= integer(0), y < function.dim(height)),
                        tirx.And(z + step >= integer(0), z + step < function.dim(width)),
                    )
                    zero = tirx.const(0.0, "float32")
                    found = convert(values[left + step], "float32")
                    found = tirx.if_then_else(inside, found, zero)
                    term = found * convert(weights[right + j], "float32")
                    store(total, integer(0), total[integer(0)] + term)
        store(result, position, convert(total[integer(0)], TVM_NAMES[node.tensor.dtype]))

    each(function, node.tensor.shape, inner * kernel_h * kernel_w, one)


EMITTERS: dict[type[Op], Callable[[Function, Node, Any], None]] = {
    ops.Reduce: emit_reduce,
    ops.Softmax: emit_softmax,
    ops.CumSum: emit_cumsum,
    ops.MatMul: emit_matmul,
    ops.Linear: emit_linear,
    ops.Conv2d: emit_conv2d,
}


def reduction(region: Region) -> Kernel | None:
    """A single op that combines many elements."""
    root = region.root
    emitter = EMITTERS.get(type(root.op))
    if emitter is None or not all(isinstance(i.op, ops.Input) for i in root.inputs):
        return None
    if any(i.tensor.format for i in root.inputs) or any(is_cache(o) for o in region.operands):
        return None
    if isinstance(root.op, ops.Linear) and not isinstance(root.inputs[0].tensor.shape[-1], int):
        return None

    def emit(function: Function) -> None:
        function.declare_inputs()
        emitter(function, root, function.declare_result())

    return build(root.op.name, region, emit)
