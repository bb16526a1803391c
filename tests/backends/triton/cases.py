"""Linear regions to try GPU kernels with; no hypothesis, no TVM: a GPU machine runs them, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qc.backends.region import RESULT, region_of
from qc.backends.triton.jit import Prepared
from qc.backends.triton.kernel import TYPES, Call
from qc.backends.triton.linear import stages
from qc.backends.triton.linear.rule import linear_rule
from qc.ir import ops
from qc.ir.fused import Fused, fuse
from qc.ir.node import Node, make
from qc.ir.quantized import QuantizedTensor, quantize_activation
from qc.ir.target import Target, computing, parse_machine
from qc.ir.types import ActivationFormat, TensorType, symbol
from qc.ir.weights.dense import dense_weight
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import Weight

ROWS = symbol("rows")
GPU = parse_machine("cuda:sm_90")
HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}

COUNTED = ("turns", "turns_of_gates")
"""Arrays that programs count in, and leave as they found them: zeros."""

Run = Callable[[Call, Sequence[Any], tuple[int, int]], Tensor]
"""(call, operands, shape of the result) -> the result, on the CPU."""


@dataclass(frozen=True)
class Case:
    """One linear region. `epilogue`: "", "bias", "residual", "gated", "all"."""

    format: str
    outer: int
    inner: int
    rows: int = 1
    activation: int | None = None
    """Channels of a group of int8 activations; 0: one group a token."""
    epilogue: str = ""
    fast: bool = True
    """With the fast rules; without them, every weight is decoded by itself."""
    dtype: str = "f16"
    kind: str = "int"
    """Of the activations' codes: "int", "e4m3" or "e2m1"."""
    architecture: str = "sm_90"
    multiprocessors: int | None = None
    """Of the machine, where they are fewer."""

    def __str__(self) -> str:
        code = "int8" if self.kind == "int" else self.kind
        x = "" if self.activation is None else f" {code}/{self.activation or 'token'}"
        more = f" {self.epilogue}" if self.epilogue else ""
        slow = "" if self.fast else " decoded"
        brain = " bf16" if self.dtype == "bf16" else ""
        where = "" if self.architecture == "sm_90" else f" {self.architecture}"
        where += f" on {self.multiprocessors}" if self.multiprocessors else ""
        size = f"{self.outer}x{self.inner} rows {self.rows}"
        return f"{self.format} {size}{x}{more}{slow}{brain}{where}"

    @property
    def target(self) -> Target:
        """The machine."""
        device = "rocm" if self.architecture.startswith("gfx") else "cuda"
        found = computing(parse_machine(f"{device}:{self.architecture}"), self.dtype)
        if self.multiprocessors is None or found.gpu is None:
            return found
        return replace(found, gpu=replace(found.gpu, multiprocessors=self.multiprocessors))

    @property
    def half(self) -> torch.dtype:
        """The type of activations."""
        return HALVES[self.dtype]

    @property
    def refused(self) -> bool:
        """Say whether the format stores no such matrix."""
        return parse_weights(self.format).refusal((self.outer, self.inner)) is not None

    def planned(self) -> Node:
        """Build the fused node of weights without values."""
        return self.node(values=False)

    def weight(self, name: str, values: bool = True) -> Node:
        shape = (self.outer, self.inner)
        if not values:
            planned = parse_weights(self.format).planned(name, shape, torch.float32)
            return make(ops.Parameter(planned))
        terms = tuple(f.nearest(torch.randn(shape)) for f in parse_weights(self.format).terms)
        return make(ops.Parameter(Weight(name, shape, terms)))

    def node(self, values: bool = True) -> Node:
        """Build the fused node."""
        format = None
        if self.activation is not None:
            bits = 4 if self.kind == "e2m1" else 8
            format = ActivationFormat(bits, self.activation or None, self.kind)
        x = make(ops.Input("x", TensorType((ROWS, self.inner), torch.float32, format)))
        vector = make(ops.Parameter(dense_weight("b", torch.randn(self.outer))))
        residual = make(ops.Input("r", TensorType((ROWS, self.outer))))
        first = self.weight("w0", values)
        match self.epilogue:
            case "bias":
                root = make(ops.Unary("silu"), make(ops.Linear(), x, first, vector))
                root = make(ops.Binary("mul"), root, make(ops.Scalar(0.5)))
            case "residual":
                root = make(ops.Binary("add"), residual, make(ops.Linear(), x, first))
            case "gated":
                pair = (
                    make(ops.Linear(), x, first),
                    make(ops.Linear(), x, self.weight("w1", values)),
                )
                root = make(ops.GatedActivation("silu"), *pair)
            case "all":
                root = make(ops.Unary("silu"), make(ops.Linear(), x, first, vector))
                root = make(ops.Binary("add"), residual, root)
            case _:
                root = make(ops.Linear(), x, first)
        leaves = ops.Input | ops.Parameter | ops.Scalar
        inside, waiting = {root}, [root]
        while waiting:
            for operand in waiting.pop().inputs:
                if not isinstance(operand.op, leaves):
                    inside.add(operand)
                    waiting.append(operand)
        return fuse("linear", root, frozenset(inside))

    def values(self, node: Node) -> list[Any]:
        """Return random operands, activations as a GPU holds them, and the stored weights."""
        found: list[Any] = []
        for operand in node.inputs:
            if isinstance(operand.op, ops.Parameter):
                found.append(operand.op.weight)
                continue
            value = torch.randn(self.rows, operand.tensor.shape[-1])
            format = operand.tensor.format
            found.append(quantize_activation(value, format) if format else value.to(self.half))
        return found

    def error(self, run: Run) -> float:
        """Run the case; return the relative Frobenius error against float64 of the same stored
        weights and activations."""
        torch.manual_seed(0)
        node = self.node()
        call = (call_of if self.fast else decoded_call_of)(node, self.target)
        values = self.values(node)
        result = run(call, values, (self.rows, self.outer))
        assert isinstance(node.op, Fused)
        expected: Tensor = node.op.meaning(*map(widened, values), sizes={})
        error = float((result.double() - expected).norm() / expected.norm())
        return error if error == error else float("inf")


def interpreted(call: Call, values: Sequence[Any], shape: tuple[int, int]) -> Tensor:
    """Run a call in Triton's interpreter."""
    result = torch.full(shape, float("nan"), dtype=result_dtype(call))
    prepared = Prepared(call, values, {"rows": shape[0]}, result)
    prepared.run()
    for argument, array in prepared.arrays.items():
        if getattr(argument, "array", None) in COUNTED:
            assert not array.any(), f"{argument} is not left as zeros"
    return result


def result_dtype(call: Call) -> torch.dtype:
    """Return the type of the result of a call."""
    parameters = call.variants[-1].launches[-1].parameters
    written = (p.type for p in parameters if getattr(p.argument, "operand", None) == RESULT)
    name = next(written)
    return next(dtype for dtype, known in TYPES.items() if known == name)


def call_of(node: Node, target: Target = GPU) -> Call:
    """Ask the rule for the call of a fused node."""
    call = linear_rule(region_of(node, target))
    assert call is not None, f"the rule does not take {node.op}"
    return call


def widened(value: Any) -> Tensor:
    """Return an operand in float64."""
    if isinstance(value, QuantizedTensor):
        return value.dequantize().double()
    dense: Tensor = value.dense() if isinstance(value, Weight) else value
    return dense.double()


def decoded_call_of(node: Node, target: Target = GPU) -> Call:
    """Ask the rule for a call without fast rules."""
    kept, stages.FAST_RULES = stages.FAST_RULES, ()
    try:
        return call_of(node, target)
    finally:
        stages.FAST_RULES = kept
