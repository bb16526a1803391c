"""Linear regions to test kernels with: how to build, compile, run and compare them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import tvm
from torch import Tensor

from qc.backends.region import RESULT, ArrayArgument, Region, region_of
from qc.backends.tvm.build import UNNEEDED_PASSES
from qc.backends.tvm.kernel import Kernel, KernelRule
from qc.ir import ops
from qc.ir.fused import Fused, fuse
from qc.ir.node import Node, make
from qc.ir.quantized import QuantizedTensor, quantize_activation, split_groups
from qc.ir.target import Target
from qc.ir.types import ActivationFormat, TensorType, symbol
from qc.ir.weights.dense import dense_weight
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import Term, TermFormat, Weight

ROWS = symbol("rows")


G32 = ActivationFormat(8, 32)


def term(text: str) -> TermFormat:
    """Return the format of a weight of one term."""
    return parse_weights(text).terms[0]


def random_term(format: TermFormat, outer: int, inner: int) -> Term:
    """Return random values in a storage format."""
    return format.nearest(torch.randn(outer, inner))


@dataclass(frozen=True)
class Case:
    """One linear region with random weights. `epilogue` is "", "bias", "residual" or "gated"."""

    outer: int
    inner: int
    formats: tuple[TermFormat, ...]
    activation: ActivationFormat | None = None
    epilogue: str = ""

    def weight(self, name: str) -> Node:
        terms = tuple(random_term(f, self.outer, self.inner) for f in self.formats)
        return make(ops.Parameter(Weight(name, (self.outer, self.inner), terms)))

    def vector(self, name: str) -> Node:
        return make(ops.Parameter(dense_weight(name, torch.randn(self.outer))))

    @cached_property
    def node(self) -> Node:
        """The fused node."""
        type = TensorType((ROWS, self.inner), torch.float32, self.activation)
        x = make(ops.Input("x", type))
        leaves = {x}
        first = (x, self.weight("w0"))
        leaves |= {*first}
        match self.epilogue:
            case "bias":
                bias, gain = self.vector("b"), self.vector("g")
                leaves |= {bias, gain}
                half = make(ops.Scalar(0.5))
                root = make(ops.Linear(), *first, bias)
                root = make(ops.Binary("mul"), make(ops.Unary("silu"), root), gain)
                root = make(ops.Binary("mul"), root, half)
            case "residual":
                residual = make(ops.Input("r", TensorType((ROWS, self.outer))))
                leaves |= {residual}
                root = make(ops.Binary("add"), residual, make(ops.Linear(), *first))
            case "gated":
                second = (x, self.weight("w1"))
                leaves |= {*second}
                pair = make(ops.Linear(), *first), make(ops.Linear(), *second)
                root = make(ops.GatedActivation("silu"), *pair)
            case _:
                root = make(ops.Linear(), *first)
        inside, waiting = {root}, [root]
        while waiting:
            for operand in waiting.pop().inputs:
                if operand not in leaves and not isinstance(operand.op, ops.Scalar):
                    inside.add(operand)
                    waiting.append(operand)
        return fuse("linear", root, frozenset(inside))

    def region(self, target: Target) -> Region:
        return region_of(self.node, target)

    def values(self, rows: int) -> list[Any]:
        """Return random operands for `rows` rows, and the stored weights."""
        found: list[Any] = []
        for operand in self.node.inputs:
            if isinstance(operand.op, ops.Parameter):
                found.append(operand.op.weight)
                continue
            value = torch.randn(rows, *operand.tensor.shape[1:])
            format = operand.tensor.format
            found.append(quantize_activation(value, format) if format else value)
        return found

    def expected(self, values: Sequence[Any]) -> Tensor:
        """Compute the torch meaning, in float64."""
        operands = [widened(v.dense() if isinstance(v, Weight) else v) for v in values]
        assert isinstance(self.node.op, Fused)
        result: Tensor = self.node.op.meaning(*operands, sizes={})
        return result


def widened(value: Any) -> Any:
    """Return a value whose torch meaning is computed in float64."""
    if isinstance(value, QuantizedTensor):
        return value.dequantize().double()
    return value.double()


def buffers(kernel: Kernel, values: Sequence[Any], result: Tensor) -> list[Any]:
    """Lay out a kernel's arguments."""
    arguments = []
    for argument in kernel.arguments:
        assert isinstance(argument, ArrayArgument)
        if argument.operand == RESULT:
            arguments.append(tvm.runtime.from_dlpack(result))
            continue
        array = array_of(values[argument.operand], kernel, argument).contiguous()
        arguments.append(tvm.runtime.from_dlpack(array.clone()))
    return arguments


def array_of(value: Any, kernel: Kernel, argument: ArrayArgument) -> Tensor:
    """Return one of the arrays that hold an operand."""
    if isinstance(value, Weight):
        repack = kernel.repack.get((argument.operand, argument.array))
        return value.arrays()[argument.array] if repack is None else repack(value)
    if isinstance(value, QuantizedTensor):
        groups, _ = split_groups(value.codes.float(), value.format.group)
        total = groups.sum(-1) * value.scale
        return {"codes": value.codes, "scale": value.scale, "total": total}[argument.array]
    assert isinstance(value, Tensor)
    return value


def compile_cases(rule: KernelRule, cases: Sequence[Case], target: Target) -> list[Kernel]:
    """Ask `rule` for the kernels of all cases."""
    kernels = [rule(case.region(target)) for case in cases]
    missing = [case for case, kernel in zip(cases, kernels, strict=True) if kernel is None]
    assert not missing, f"{rule.__name__} does not take {missing[0]}"
    return [kernel for kernel in kernels if kernel is not None]


def build(kernels: Sequence[Kernel], target: Target) -> Any:
    """Compile all kernels in one module, as k0, k1, ..."""
    functions = {
        f"k{i}": kernel.function.with_attr("global_symbol", f"k{i}")
        for i, kernel in enumerate(kernels)
    }
    described = tvm.target.Target({"kind": "llvm", "mcpu": target.llvm_cpu})
    with tvm.transform.PassContext(disabled_pass=list(UNNEEDED_PASSES)):
        return tvm.compile(tvm.IRModule(functions), target=described)


def worst_error(
    rule: KernelRule, cases: Sequence[Case], target: Target, rows: Sequence[int]
) -> dict[Case, float]:
    """Run every case for every number of rows; return its largest relative L2 error."""
    kernels = compile_cases(rule, cases, target)
    module = build(kernels, target)
    worst: dict[Case, float] = {}
    for i, (case, kernel) in enumerate(zip(cases, kernels, strict=True)):
        for count in rows:
            values = case.values(count)
            expected = case.expected(values)
            result = torch.full((count, case.outer), float("nan"))
            module[f"k{i}"](*buffers(kernel, values, result))
            error = float((result - expected).norm() / expected.norm())
            error = error if error == error else float("inf")
            worst[case] = max(worst.get(case, 0.0), error)
    return worst


def in_turns(formats: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[Case]:
    """Give every format a size, the sizes and the activations in turns, where it can be stored."""
    found = [
        Case(*sizes[number % len(sizes)], (term(text),), (None, G32)[number % 2])
        for number, text in enumerate(formats)
    ]
    return [case for case in found if case.formats[0].refusal((case.outer, case.inner)) is None]


def assert_exact(rule: KernelRule, cases: Sequence[Case], target: Target) -> None:
    """Check that one row and several are right up to float32 rounding."""
    errors = worst_error(rule, cases, target, rows=(1, 7))
    assert max(errors.values()) < 1e-5, max(errors, key=lambda case: errors[case])
