"""The generic rule: any weight format, any sizes, through the format's decode expression."""

from __future__ import annotations

from typing import Any

import torch
from tvm.tirx.script import builder as T

from qc.backends.tvm.expression import TirRendering, load_from
from qc.backends.tvm.kernel import Kernel, Region
from qc.backends.tvm.linear.matching import match_linear
from qc.backends.tvm.linear.skeleton import (
    Signature,
    accumulator,
    build_kernel,
    for_each_block,
    store_one,
)
from qc.backends.tvm.linear.vectors import float_lanes, span, splat, sum_of_lanes, typed
from qc.ir.node import Node
from qc.ir.weights.expression import COL, ROW
from qc.ir.weights.weight import Weight

TIR_DTYPES = {
    torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "int16",
    torch.uint8: "uint8", torch.int8: "int8", torch.int32: "int32", torch.int64: "int64",
}  # fmt: skip


def decoded_linear(region: Region) -> Kernel | None:
    """Decode each row of the weight to float32, then multiply all rows of x by it."""
    linear = match_linear(region)
    if linear is None:
        return None

    def emit(signature: Signature) -> None:
        for_each_block(signature, linear.outer, lambda out: emit_output(signature, out))

    return build_kernel("decode", linear, declare_stored, emit)


def stored_arrays(weight: Weight) -> dict[str, torch.Tensor]:
    """Return the stored arrays; bfloat16 as int16, which every exchange of buffers knows."""
    return {
        name: array.view(torch.int16) if array.dtype == torch.bfloat16 else array
        for name, array in weight.arrays().items()
    }


def declare_stored(signature: Signature) -> None:
    """Declare every array of every weight."""
    linear = signature.linear
    for node, format in zip(linear.weights, linear.formats, strict=True):
        operand = linear.operand(node)
        if operand in signature.repack:
            continue
        signature.repack[operand] = stored_arrays
        for name, spec in format.arrays((linear.outer, linear.inner)).items():
            signature.declare(operand, name, TIR_DTYPES[spec.dtype], spec.shape)


def emit_output(signature: Signature, out: Any) -> None:
    """Compute output channel `out` of all rows."""
    linear = signature.linear
    decoded: dict[Node, Any] = {}
    for node in linear.linears:
        decoded[node] = T.alloc_buffer((linear.inner,), "float32", layout=None)
        with T.serial(T.int64(0), T.int64(linear.inner)) as col:
            value = decode_element(signature, node, out, col)
            T.buffer_store(decoded[node], value, [col])
    with T.serial(T.int64(0), signature.rows) as row:
        products = {node: emit_dot(signature, decoded[node], row) for node in linear.linears}
        store_one(signature, products, row, out)


def decode_element(signature: Signature, node: Node, row: Any, col: Any) -> Any:
    """Render the value of one element of a linear's weight."""
    linear = signature.linear
    operand = linear.operand(node.inputs[1])
    format = linear.formats[linear.linears.index(node)]
    buffers = {name: b for (number, name), b in signature.buffers.items() if number == operand}
    rendering = TirRendering(load_from(buffers), T.Cast("int32", row), T.Cast("int32", col))
    return rendering.value(format.decode((linear.outer, linear.inner), ROW, COL))


def emit_dot(signature: Signature, decoded: Any, row: Any) -> Any:
    """Emit the dot product of one row of x with a decoded row; return its value."""
    linear = signature.linear
    lanes = float_lanes(linear.region.target)
    format = linear.activation
    if format is not None and (format.group or linear.inner) % lanes and format.group is not None:
        lanes = 1  # a vector would need several scales
    sums = accumulator(lanes, size=lanes)
    full = linear.inner // lanes
    with T.serial(T.int64(0), T.int64(full)) as step:
        at = span(step * lanes, lanes)
        product = x_values(signature, row, step * lanes, lanes) * decoded[at]
        T.buffer_store(sums, sums[span(0, lanes)] + product, [span(0, lanes)])
    rest = accumulator(1, size=1)
    with T.serial(T.int64(full * lanes), T.int64(linear.inner)) as col:
        T.buffer_store(rest, rest[0] + x_values(signature, row, col, 1) * decoded[col], [0])
    total = sums[0] if lanes == 1 else sum_of_lanes(sums[span(0, lanes)])
    return T.Bind(total + rest[0])


def x_values(signature: Signature, row: Any, col: Any, lanes: int) -> Any:
    """Load consecutive values of a row of x, dequantized."""
    format = signature.linear.activation
    if format is None:
        return signature.x()[row, span(col, lanes)]
    codes = T.Cast(typed("float32", lanes), signature.x("codes")[row, span(col, lanes)])
    group = T.int64(0) if format.group is None else T.floordiv(col, T.int64(format.group))
    return codes * splat(signature.x("scale")[row, group], lanes)
