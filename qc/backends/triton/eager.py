"""Run one linear on a GPU from torch, on torch's stream: kernels are compiled when they are first
needed, weights are laid out for them once.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qc.backends.region import RESULT, ArrayArgument, region_of
from qc.backends.triton.compile import compile_launch
from qc.backends.triton.jit import Loaded
from qc.backends.triton.kernel import Argument, Call, Cubin, Launch, Scratch
from qc.backends.triton.linear.rule import linear_rule
from qc.errors import TargetError
from qc.ir import ops
from qc.ir.fused import fuse
from qc.ir.node import Node, make
from qc.ir.target import computing, parse_machine
from qc.ir.types import DTYPE_NAMES, TensorType, bind_dim, symbol
from qc.ir.weights.weight import Weight
from qc.runtime.cuda.driver import LIBRARY, Driver

ROWS = symbol("rows")


class TorchDriver(Driver):
    """The driver, with launches on the stream that torch uses now."""

    @property
    def stream(self) -> Any:
        return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


@cache
def driver() -> TorchDriver:
    """Return the driver; torch has made its context."""
    torch.cuda.init()
    found = TorchDriver(ctypes.CDLL(LIBRARY))
    found.activate()
    return found


class EagerLinear:
    """One stored weight with what follows its product, laid out on a GPU. It keeps nothing of the
    weight as it came."""

    def __init__(
        self, weight: Weight, bias: bool, activation: str, residual: bool, dtype: torch.dtype
    ) -> None:
        planned = weight.format.planned(weight.name, weight.shape, weight.dtype)
        self.node, self.inputs = node_of(planned, bias, activation, residual)
        capability = driver().capability
        machine = computing(parse_machine(f"cuda:sm_{capability}"), DTYPE_NAMES[dtype])
        call = linear_rule(region_of(self.node, machine))
        if call is None:
            raise TargetError(f"no GPU kernel multiplies by {weight.format} {list(weight.shape)}")
        self.call, self.laid = call, laid_out(call, self.node, weight)
        self.loaded: dict[int, Placed] = {}

    def run(self, values: Sequence[Tensor], result: Tensor) -> None:
        """Compute the result of operands of its type, in the order of `inputs`."""
        rows = result.shape[0]
        operands = [
            node.op.weight if isinstance(node.op, ops.Parameter) else values[self.inputs[node]]
            for node in self.node.inputs
        ]
        if rows not in self.loaded:
            if len(self.loaded) >= MOST_SIZES:
                self.loaded.clear()
            self.loaded[rows] = Placed(self.call, operands, rows, result, self.laid)
        self.loaded[rows].launch(operands, result)


def laid_out(call: Call, node: Node, weight: Weight) -> dict[Argument, Tensor]:
    """Lay a weight out for all launches of a call."""
    found: dict[Argument, Tensor] = {}
    device = next(iter(weight.terms[0].arrays().values())).device
    for launch in (each for variant in call.variants for each in variant.launches):
        for argument in (each.argument for each in launch.parameters):
            if not isinstance(argument, ArrayArgument) or argument.operand == RESULT:
                continue
            if argument in found or not isinstance(node.inputs[argument.operand].op, ops.Parameter):
                continue
            repack = call.repack.get((argument.operand, argument.array))
            with torch.device(device):  # where the tables that repacking makes lie, too
                stored = weight.arrays()[argument.array] if repack is None else repack(weight)
            found[argument] = stored.contiguous().to(device)
    return found


MOST_SIZES = 64
"""Numbers of rows for which arguments are kept in place."""


class Placed(Loaded):
    """A call for a number of rows. Weights are shared with those for other numbers."""

    def __init__(
        self, call: Call, operands: Sequence[Any], rows: int, result: Tensor,
        laid: dict[Argument, Tensor],
    ) -> None:  # fmt: skip
        self.laid = laid
        super().__init__(call, operands, {"rows": rows}, result, driver(), cubin_of)
        self.operands = [each if isinstance(each, Weight) else None for each in operands]
        self.arrays = {a: laid.get(a) for a in self.arrays}  # others come with every call
        self.bound, self.slots, self.addresses = [], [], []

    def array(self, argument: Argument) -> Tensor:
        return self.laid[argument] if self.is_weight(argument) else super().array(argument)

    def launch(self, operands: Sequence[Any], result: Tensor) -> None:
        """Run on other operands, into another result; what launches share is new memory."""
        arrays: dict[Argument, Any] = {}
        for argument, array in self.arrays.items():
            arrays[argument] = array
            if isinstance(argument, Scratch):
                shape = [bind_dim(dim, self.sizes) for dim in argument.shape]
                arrays[argument] = torch.empty(shape, dtype=argument.dtype, device=result.device)
            elif isinstance(argument, ArrayArgument) and argument.operand == RESULT:
                arrays[argument] = result
            elif isinstance(argument, ArrayArgument) and not self.is_weight(argument):
                arrays[argument] = operands[argument.operand]
        self.copied(arrays).run()


def cubin_of(launch: Launch) -> Cubin:
    return compile_launch(launch, driver().capability)


def node_of(
    weight: Weight, bias: bool, activation: str, residual: bool
) -> tuple[Node, Mapping[Node, int]]:
    """Build the fused node, and say which value each of its inputs takes: x, bias, residual."""
    outer, inner = weight.shape
    x = make(ops.Input("x", TensorType((ROWS, inner))))
    places = {x: 0}
    operands = [x, make(ops.Parameter(weight))]
    if bias:
        vector = make(ops.Input("bias", TensorType((outer,))))
        places[vector] = 1
        operands.append(vector)
    inside = [make(ops.Linear(), *operands)]
    if activation:
        inside.append(make(ops.Unary(activation), inside[-1]))
    if residual:
        beside = make(ops.Input("residual", TensorType((ROWS, outer))))
        places[beside] = 2
        inside.append(make(ops.Binary("add"), beside, inside[-1]))
    return fuse("linear", inside[-1], frozenset(inside)), places


def state_of(array: Tensor) -> tuple[int, int]:
    """Return where an array lies, and how often it was written to."""
    return array.data_ptr(), 0 if array.is_inference() else array._version


kept: dict[tuple[Any, ...], EagerLinear] = {}
"""By the states of the stored arrays; forgotten with the first of them."""


def run_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    """Return activation(x W^T + bias) + residual for x [rows, in] on a GPU, computed in float16
    with float32 sums, or in bfloat16 where x is."""
    arrays = [array for term in weight.terms for array in term.arrays().values()]
    epilogue = bias is not None, activation, residual is not None
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
    key = (*map(state_of, arrays), str(weight.format), *epilogue, dtype)
    if key not in kept:
        kept[key] = EagerLinear(weight, *epilogue, dtype)
        weakref.finalize(arrays[0], kept.pop, key, None)
    result = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
    if x.shape[0]:
        values = [x, bias, residual]
        halves = [v if v is None else v.to(dtype).contiguous() for v in values]
        kept[key].run(halves, result)  # type: ignore[arg-type]  # inputs name what is there
    return result.to(x.dtype)
