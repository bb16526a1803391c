"""Lower a planned graph to a native program: one step a kernel, ATen calls that stay on torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from qc.backends.artifact import dim_text
from qc.backends.lowering import Lowered, Lowering, Place, renamed
from qc.backends.region import RESULT, SizeArgument
from qc.backends.tvm.kernel import Kernel, KernelRule
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.target import Target
from qc.ir.types import DTYPE_NAMES, TensorType, TupleType
from qc.runtime.manifest import KernelStep, Scalar, TorchStep, ValueArg


def lower(graph: Graph, target: Target, rules: Sequence[KernelRule]) -> Lowered[Kernel]:
    """Turn a planned graph into a program for `target`."""
    return NativeLowering(graph, target, rules).run()


class NativeLowering(Lowering[Kernel, Kernel]):
    """One run of `lower`."""

    def quantized(self, name: str, type: TensorType, kind: str = "scratch") -> Place:
        """Add the codes, and for each group the scale and the scaled sum of codes."""
        channels = type.shape[-1]
        assert isinstance(channels, int)
        assert type.format is not None
        groups = -(-channels // (type.format.group or channels))
        per_group = (*type.shape[:-1], groups)
        return {
            "codes": self.add_value(f"{name}.codes", torch.int8, type.shape, kind),
            "scale": self.add_value(f"{name}.scale", torch.float32, per_group, kind),
            "total": self.add_value(f"{name}.total", torch.float32, per_group, kind),
        }

    def add_steps(self, node: Node, key: object, found: Kernel) -> None:
        """Bind a kernel's arguments to the buffers of this node and its operands."""
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:8]
        name = f"{found.rule}_{digest}"
        self.program.kernels.setdefault(name, found)
        arguments: list[ValueArg | Scalar] = []
        reads: dict[int, None] = {}
        writes: dict[int, None] = {}
        for argument in found.arguments:
            if isinstance(argument, SizeArgument):
                arguments.append(Scalar(dim_text(renamed(argument.dim, self.names(node)))))
                continue
            bound = self.array_argument(node, found.rule, found, argument)
            arguments.append(bound)
            (writes if argument.operand == RESULT else reads)[bound.value] = None
        if found.in_place is not None:
            reads |= writes
        origin = str(node.origin.module)
        step = KernelStep(name, tuple(arguments), tuple(reads), tuple(writes), origin)
        self.program.steps.append(step)

    def call_torch(self, node: Node) -> None:
        """Add an ATen call that stays on torch."""
        op = node.op
        assert isinstance(op, ops.Torch)
        types = node.type.items if isinstance(node.type, TupleType) else (node.type,)
        scratch = [self.scratch(type)["values"] for type in types]
        names = [str(i) for i in range(len(types))] if isinstance(node.type, TupleType) else None
        self.places[node] = dict(zip(names or ["values"], scratch, strict=True))
        operands = [self.torch_operand(i) for i in node.inputs]
        namespace, _, rest = op.overload.partition(".")
        self.program.steps.append(
            TorchStep(
                f"{namespace}::{rest}",
                tuple(torch_template(a, operands) for a in op.args),
                tuple(dict.fromkeys(o["value"] for o in operands)),
                tuple(scratch),
                {name: torch_template(a, operands) for name, a in op.kwargs},
                node.origin.module,
            )
        )
        self.program.on_torch.append((op.overload, node.origin.module))

    def torch_operand(self, node: Node) -> dict[str, Any]:
        """Return the template entry of a tensor operand."""
        if isinstance(node.op, ops.Parameter):
            index = self.stored(node, "dense", node.op.weight.dense)
        elif isinstance(node.op, ops.Scalar):
            value = node.op.meaning(sizes={})
            index = self.stored_scalar(node, value)
        else:
            index = self.places[node]["values"]
        return {"value": index, "shape": [dim_text(d) for d in node.tensor.shape]}

    def stored_scalar(self, node: Node, value: Tensor) -> int:
        """Store a number that an ATen call wants as a tensor."""
        name = self.unused_name("scalar")
        self.program.arrays[name] = lambda: value
        return self.add_value(name, value.dtype, (), "weight", name)


def torch_template(argument: object, operands: Sequence[Mapping[str, Any]]) -> object:
    """Turn an argument of an ATen call into the JSON template of a torch step."""
    if isinstance(argument, ops.Operand):
        return dict(operands[argument.index])
    if isinstance(argument, tuple | list):
        return [torch_template(a, operands) for a in argument]
    if isinstance(argument, sympy.Expr):
        return {"symbol": str(argument)}
    if isinstance(argument, torch.dtype):
        return {"dtype": DTYPE_NAMES[argument]}
    if isinstance(argument, torch.device | torch.layout | torch.memory_format):
        return None
    return argument
