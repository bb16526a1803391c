"""Element-by-element ops as calls of device functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qc.backends.triton.glue import NAMES, Glue, Text
from qc.ir import ops
from qc.ir.node import Node

ELEMENTWISE = (ops.Unary, ops.Binary, ops.Where, ops.Cast, ops.GatedActivation)

RESERVED = ("abs", "not", "and", "or", "min", "max", "pow")
"""Kinds whose device function has an underscore: Python has the names."""
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ON_INTEGERS = ("abs", "neg", "relu", "not")
HALVES = (torch.float16, torch.bfloat16)


def render(glue: Glue, node: Node, operands: Sequence[str]) -> str:
    """Write the call that computes a node; float values are float32, whatever their type is."""
    op = node.op
    match op:
        case ops.Unary(kind):
            (x,) = operands
            if node.inputs[0].tensor.dtype in (*INTEGERS, torch.bool) and kind not in ON_INTEGERS:
                x = cast(glue, x, torch.float32)
            return glue.call(f"elementwise.{function_of(kind)}", x)
        case ops.Binary(kind):
            a, b = promoted(glue, node, operands)
            return glue.call(f"elementwise.{function_of(kind)}", a, b)
        case ops.Where():
            return glue.call("elementwise.where", *operands)
        case ops.Cast(torch.bool):
            return glue.call("elementwise.nonzero", operands[0])
        case ops.Cast(dtype):
            x = cast(glue, operands[0], dtype)
            return cast(glue, x, torch.float32) if dtype in HALVES else x
        case ops.GatedActivation(kind):
            gate, up = operands
            return glue.call("elementwise.mul", glue.call(f"elementwise.{kind}", gate), up)
    raise TypeError(f"{op} is not computed element by element")


def function_of(kind: str) -> str:
    """Return the device function of a kind."""
    return f"{kind}_" if kind in RESERVED else kind


def cast(glue: Glue, x: str, dtype: torch.dtype) -> str:
    """Write a conversion."""
    return glue.call("elementwise.cast", x, Text(NAMES[dtype]))


def promoted(glue: Glue, node: Node, operands: Sequence[str]) -> list[str]:
    """Convert integers and booleans among the operands of an operation on floats."""
    assert isinstance(node.op, ops.Binary)
    types = [operand.tensor.dtype for operand in node.inputs]
    floating = any(dtype.is_floating_point for dtype in types) or node.op.kind in ("div", "pow")
    if not floating:
        return list(operands)
    return [
        x if dtype.is_floating_point else cast(glue, x, torch.float32)
        for x, dtype in zip(operands, types, strict=True)
    ]
