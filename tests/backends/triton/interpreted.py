"""Run launches in Triton's interpreter: on this machine, one program after another, with numpy.

Import this before anything imports triton: the interpreter is chosen when triton is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("triton was imported for compiling; its interpreter needs another process")
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor

from qc.backends.region import RESULT, ArrayArgument, Region, SizeArgument
from qc.backends.triton.emit import load_function
from qc.backends.triton.kernel import Call, KernelRule, Launch, Scratch
from qc.backends.triton.lower import DTYPES
from qc.ir.fused import Fused
from qc.ir.node import Node
from qc.ir.ops import Append, Parameter
from qc.ir.quantized import QuantizedTensor
from qc.ir.target import Target, parse_machine
from qc.ir.types import bind_dim

HERE = parse_machine("cuda:sm_90")


def call_of(node: Node, rules: Sequence[KernelRule], target: Target = HERE) -> Call:
    """Return the call of the first rule that matches."""
    assert isinstance(node.op, Fused)
    region = Region(node.op.body, node.inputs, target)
    found = next((call for rule in rules if (call := rule(region))), None)
    assert found is not None, f"no rule takes {node.op}"
    return found


def launch(launch: Launch, arguments: Sequence[Any], sizes: Mapping[str, int]) -> None:
    """Run one launch: arguments are tensors, and ints."""
    function = load_function(launch.source, launch.function)
    grid = tuple(cells.count(sizes) for cells in launch.grid)
    function[grid](*arguments, **dict(launch.constants))


def run(
    node: Node, call: Call, operands: Sequence[Any], sizes: Mapping[str, int], rows: int
) -> Any:
    """Run the variant for some rows as the runtime would; return what it wrote."""
    written: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for each in call.variant(rows).launches:
        arguments: list[Any] = []
        for parameter in each.parameters:
            argument, dtype = parameter.argument, DTYPES.get(parameter.type)
            if isinstance(argument, SizeArgument):
                size = bind_dim(argument.dim, dict(sizes))
                arguments.append(size if dtype is None else torch.tensor([size], dtype=dtype))
            elif isinstance(argument, Scratch):
                if argument.name not in shared:
                    shape = [bind_dim(d, dict(sizes)) for d in argument.shape]
                    shared[argument.name] = rubbish(shape, argument.dtype)
                arguments.append(shared[argument.name])
            elif argument.operand == RESULT:
                if argument.array not in written:
                    written[argument.array] = result_array(call, argument, dtype, operands, sizes)
                arguments.append(written[argument.array])
            else:
                arguments.append(operand_array(node, call, argument, dtype, operands, sizes))
        launch(each, arguments, sizes)
    return written if "codes" in written else written["values"]


def rubbish(shape: Sequence[int], dtype: torch.dtype | None) -> Tensor:
    """Return memory that holds something else than zeros."""
    assert dtype is not None
    return torch.full(tuple(shape), 77, dtype=dtype)


def result_array(
    call: Call, argument: ArrayArgument, dtype: torch.dtype | None, operands: Sequence[Any],
    sizes: Mapping[str, int],
) -> Tensor:  # fmt: skip
    """Allocate a result: a cache holds its past, everything else rubbish."""
    assert argument.shape is not None
    array = rubbish([bind_dim(d, dict(sizes)) for d in argument.shape], dtype)
    if call.in_place is not None:
        past = operands[call.in_place]
        if isinstance(past, QuantizedTensor):
            past = past.codes if argument.array == "codes" else past.scale
        array[:, : past.shape[1]] = past
    return array


def operand_array(
    node: Node, call: Call, argument: ArrayArgument, dtype: torch.dtype | None,
    operands: Sequence[Any], sizes: Mapping[str, int],
) -> Tensor:  # fmt: skip
    """Return the array of an operand under the type and shape that the launch sees."""
    operand, value = node.inputs[argument.operand], operands[argument.operand]
    if isinstance(operand.op, Parameter):
        repack = call.repack.get((argument.operand, argument.array))
        weight = operand.op.weight
        return (repack(weight) if repack else weight.arrays()[argument.array]).contiguous()
    if isinstance(value, QuantizedTensor):
        value = value.arrays[argument.array]
    value = value.to(dtype)
    if argument.shape is None:
        return value.contiguous()
    shape = [bind_dim(d, dict(sizes)) for d in argument.shape]
    if prod(shape) == value.numel():
        return value.reshape(shape).contiguous()
    room = rubbish(shape, dtype)  # a cache
    assert isinstance(operand.op, Append)
    room[:, : value.shape[1]] = value
    return room


def relative(found: Any, expected: Tensor) -> float:
    """Return the error, relative in the Frobenius norm."""
    found = found if isinstance(found, Tensor) else torch.as_tensor(np.asarray(found))
    found, expected = found.double().reshape(-1), expected.double()
    return float((found - expected.reshape(-1)).norm() / expected.norm().clamp_min(1e-30))
