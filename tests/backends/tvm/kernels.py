"""Build kernels for bodies, compile many of them at once, run them against the torch meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tvm
from torch import Tensor

from qc.backends.region import RESULT, ArrayArgument, Region, SizeArgument
from qc.backends.tvm.build import UNNEEDED_PASSES
from qc.backends.tvm.kernel import Kernel, KernelRule
from qc.ir.fused import Fused, fuse
from qc.ir.meaning import evaluate_nodes
from qc.ir.node import Node, make
from qc.ir.ops import Append, Input, Parameter, Scalar
from qc.ir.quantized import QuantizedTensor
from qc.ir.target import CPUS, Target
from qc.ir.types import Dim, TensorType, bind_dim

HERE = CPUS["x86_64-v3"]


def value(label: str, *shape: Dim, dtype: torch.dtype = torch.float32) -> Node:
    """Make an input of a graph."""
    return make(Input(label, TensorType(shape, dtype)))


def fused(root: Node, stop: Sequence[Node] = ()) -> Node:
    """Fuse everything under `root` down to inputs, parameters and `stop`."""
    inside: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node in inside or node in stop or isinstance(node.op, Input | Parameter | Scalar):
            continue
        inside.add(node)
        stack.extend(node.inputs)
    return fuse("test", root, frozenset(inside))


@dataclass(frozen=True)
class Case:
    """A fused node, the sizes of its symbols, the values of its operands."""

    node: Node
    sizes: Mapping[str, int]
    values: tuple[Tensor, ...]
    tolerance: float = 2e-6

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """What the operands are for the torch meaning: parameters decoded."""
        parameters = (n.op.weight.dense() if isinstance(n.op, Parameter) else None
                      for n in self.node.inputs)  # fmt: skip
        given = iter(self.values)
        return tuple(next(given) if p is None else p for p in parameters)

    def expected(self) -> Any:
        op = self.node.op
        assert isinstance(op, Fused)
        known = dict(zip(op.body.inputs, self.operands, strict=True))
        return evaluate_nodes(op.body.outputs, {}, self.sizes, known=known)[0]


def kernel_of(node: Node, rules: Sequence[KernelRule], target: Target = HERE) -> Kernel:
    """Return the kernel of the first rule that matches."""
    assert isinstance(node.op, Fused)
    region = Region(node.op.body, node.inputs, target)
    found = next((k for k in (rule(region) for rule in rules) if k is not None), None)
    assert found is not None, f"no rule takes {node.op}"
    return found


def compiled(kernels: Sequence[Kernel], target: Target = HERE) -> Any:
    """Compile kernels as k0, k1, ..."""
    functions = {
        f"k{i}": kernel.function.with_attr("global_symbol", f"k{i}")
        for i, kernel in enumerate(kernels)
    }
    machine = tvm.target.Target({"kind": "llvm", "mcpu": target.llvm_cpu})
    with tvm.transform.PassContext(disabled_pass=list(UNNEEDED_PASSES)):
        return tvm.compile(tvm.IRModule(functions), target=machine)


def check(cases: Sequence[Case], rules: Sequence[KernelRule]) -> list[Kernel]:
    """Run every case and compare it with its meaning; cases of one node share a kernel."""
    nodes = list(dict.fromkeys(case.node for case in cases))
    kernels = [kernel_of(node, rules) for node in nodes]
    module = compiled(kernels)
    for case in cases:
        position = nodes.index(case.node)
        result = run(module[f"k{position}"], kernels[position], case)
        compare(result, case.expected(), case)
    return kernels


def is_append(node: Node) -> bool:
    """Say whether a value is a cache."""
    return isinstance(node.op, Append)


def run(function: Any, kernel: Kernel, case: Case, context: int | None = None) -> Any:
    """Call a compiled kernel as the runtime would; return what it wrote."""
    expected = case.expected()
    sizes = {"context": context or case.sizes.get("past", 0) + case.sizes.get("seq", 1) + 3,
             **case.sizes}  # fmt: skip
    written: dict[str, Tensor] = {}
    arguments: list[Any] = []
    operands = case.operands
    for argument in kernel.arguments:
        if isinstance(argument, SizeArgument):
            arguments.append(bind_dim(argument.dim, dict(sizes)))
            continue
        assert argument.shape is not None
        shape = [bind_dim(d, dict(sizes)) for d in argument.shape]
        if argument.operand == RESULT:
            array = result_array(kernel, argument, expected, operands, shape)
            written[argument.array] = array
        else:
            array = operand_array(kernel, argument, case, operands, shape)
        arguments.append(array)
    function(*arguments)
    if "codes" in written:
        return written
    return written["values"]


def result_array(
    kernel: Kernel, argument: ArrayArgument, expected: Any, operands: Sequence[Tensor],
    shape: list[int],
) -> Tensor:  # fmt: skip
    """Allocate a result: a cache holds its past, everything else is filled with rubbish."""
    if kernel.in_place is not None:
        past = operands[kernel.in_place]
        cache = torch.full(shape, -77.0, dtype=past.dtype)
        cache[:, : past.shape[1]] = past
        return cache
    if isinstance(expected, QuantizedTensor):
        dtype = torch.int8 if argument.array == "codes" else torch.float32
        return torch.full(shape, 77, dtype=dtype)
    return torch.full(shape, 1, dtype=expected.dtype)


def operand_array(
    kernel: Kernel, argument: ArrayArgument, case: Case, operands: Sequence[Tensor],
    shape: list[int],
) -> Tensor:  # fmt: skip
    """Return the array of an operand under the shape that the kernel sees."""
    node, operand = case.node.inputs[argument.operand], operands[argument.operand]
    if isinstance(node.op, Parameter):
        repack = kernel.repack.get((argument.operand, argument.array))
        weight = node.op.weight
        array = weight.arrays()[argument.array] if repack is None else repack(weight)
        return array.contiguous().reshape(shape)
    if is_append(node):
        cache = torch.full(shape, torch.nan, dtype=operand.dtype)
        cache[:, : operand.shape[1]] = operand
        return cache
    return operand.contiguous().reshape(shape)


def compare(result: Any, expected: Any, case: Case) -> None:
    """Compare with the meaning; quantized codes may differ by one where rounding is a tie."""
    if isinstance(expected, QuantizedTensor):
        codes = result["codes"].reshape(expected.codes.shape)
        difference = (codes.int() - expected.codes.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01
        scale = result["scale"].reshape(expected.scale.shape)
        torch.testing.assert_close(scale, expected.scale, rtol=case.tolerance, atol=0)
        again = QuantizedTensor(codes, scale, expected.format)
        groups = again.dequantize()
        group = expected.format.group or groups.shape[-1]
        totals = torch.stack([part.sum(-1) for part in groups.split(group, -1)], -1)
        total = result["total"].reshape(totals.shape)
        torch.testing.assert_close(total, totals, rtol=1e-5, atol=1e-4)
        return
    if isinstance(case.node.op, Fused) and is_append(case.node.op.body.outputs[0]):
        length = expected.shape[1]
        assert result[:, length:].eq(-77).all(), "wrote behind the new rows"
        result = result[:, :length]
    torch.testing.assert_close(
        result.reshape(expected.shape), expected, rtol=case.tolerance, atol=case.tolerance
    )
