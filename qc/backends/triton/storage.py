"""In which type each value of a program is stored on a GPU."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from qc.backends.region import RESULT, ArrayArgument, Region, Repack
from qc.backends.triton.glue import Glue
from qc.ir import ops
from qc.ir.fused import Fused
from qc.ir.node import Node
from qc.ir.target import Target
from qc.ir.types import DTYPES_BY_NAME, ActivationFormat, Dim, TensorType, element_count
from qc.ir.weights.weight import Weight

PRODUCTS = (ops.Linear, ops.Embedding, ops.Conv2d, ops.Attention, ops.FakeQuantize)
"""Values that descend from these are activations."""

known: WeakKeyDictionary[Node, bool] = WeakKeyDictionary()


def half_dtype(target: Target) -> torch.dtype:
    """Return the type of activations between kernels, float16 or bfloat16."""
    return torch.float16 if target.gpu is None else DTYPES_BY_NAME[target.gpu.dtype]


def stored_dtype(node: Node, target: Target) -> torch.dtype:
    """Return the type in which a value is stored: that of activations, or caches as they are.

    What is computed from positions and parameters alone, such as the angles of rotations, keeps
    float32: a position of 2049 is no float16.
    """
    type = node.tensor
    root = node.op.body.outputs[0] if isinstance(node.op, Fused) else node
    kept = isinstance(root.op, ops.Parameter | ops.Input | ops.Append)
    if kept or type.dtype != torch.float32:
        return type.dtype
    return half_dtype(target) if is_activation(node) else torch.float32


def code_dtype(format: ActivationFormat) -> torch.dtype:
    """Return the type of the codes of quantized values: small floats are bytes, for not every
    GPU knows them."""
    return torch.int8 if format.kind == "int" else torch.uint8


def quantized_arrays(type: TensorType) -> dict[str, tuple[torch.dtype, tuple[Dim, ...]]]:
    """Return how a quantized value is stored, by the names of `QuantizedTensor.arrays`."""
    channels, format = type.shape[-1], type.format
    assert isinstance(channels, int)
    assert format is not None
    rows, groups = type.shape[:-1], -(-channels // (format.group or channels))
    if format.kind == "e2m1":
        return {
            "codes": (torch.uint8, (*rows, channels // 2)),
            "scale": (torch.uint8, (*rows, groups)),
            "factor": (torch.float32, (*rows, 1)),
        }
    return {
        "codes": (code_dtype(format), type.shape), "scale": (torch.float32, (*rows, groups)),
    }  # fmt: skip


def result_dtype(region: Region) -> torch.dtype:
    """Return the type in which the result of a region is stored."""
    dtype = region.root.tensor.dtype
    if dtype != torch.float32:
        return dtype
    product = any(isinstance(node.op, PRODUCTS) for node in region.body.nodes)
    activations = product or any(map(is_activation, region.operands))
    return half_dtype(region.target) if activations else dtype


def is_activation(node: Node) -> bool:
    """Say whether a value descends from a product or a lookup."""
    stack = [node]
    while stack:
        top = stack[-1]
        if top in known:
            stack.pop()
            continue
        body = top.op.body.nodes if isinstance(top.op, Fused) else (top,)
        if any(isinstance(inner.op, PRODUCTS) for inner in body):
            known[top] = True
            continue
        waiting = [i for i in top.inputs if i not in known]
        if waiting:
            stack += waiting
        else:
            known[top] = any(known[i] for i in top.inputs)
    return known[node]


def dense_values(weight: Weight) -> torch.Tensor:
    """Decode a parameter that a kernel wants as plain values."""
    return weight.dense()


def declare_input(
    glue: Glue, region: Region, node: Node, repack: dict[tuple[int, str], Repack]
) -> str:
    """Add a pointer to one input of a body: a tensor, or a parameter as plain values."""
    operand = region.body.inputs.index(node)
    format = region.format_of(node)
    if format is None:
        dtype = stored_dtype(region.operands[operand], region.target)
        return glue.pointer(ArrayArgument(operand, "values", flat(node)), dtype)
    shape = tuple(int(d) for d in node.tensor.shape)
    stored = format.arrays(shape)
    if list(stored) == ["0.values"]:
        return glue.pointer(
            ArrayArgument(operand, "0.values", flat(node)), stored["0.values"].dtype
        )
    repack[operand, "values"] = dense_values
    return glue.pointer(ArrayArgument(operand, "values", flat(node)), node.tensor.dtype)


def declare_result(glue: Glue, region: Region) -> str:
    """Add a pointer to the result."""
    return glue.pointer(ArrayArgument(RESULT, "values", flat(region.root)), result_dtype(region))


def flat(node: Node) -> tuple[Dim, ...]:
    """Return the shape of a value as one axis."""
    return (element_count(node.tensor.shape),)


def is_cache(node: Node) -> bool:
    """Say whether a value is a cache that has just been appended to: its buffer is longer than
    the value, `context` positions a batch."""
    op = node.op.body.outputs[0].op if isinstance(node.op, Fused) else node.op
    return isinstance(op, ops.Append)
