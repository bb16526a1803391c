"""What stands behind the products in a region, element by element on the accumulators."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qc.backends.linear_region import LinearRegion, is_number, is_vector
from qc.backends.region import ArrayArgument
from qc.backends.triton.emit import Emission
from qc.ir import ops
from qc.ir.node import Node
from qc.ir.ops import Parameter
from qc.ir.weights.weight import Weight

RESERVED = {"abs", "not", "pow", "min", "max", "and", "or"}
"""Kinds whose names Python has already: their device functions end with _."""


def function_of(kind: str) -> str:
    """Return the device function of an element-by-element kind."""
    return f"elementwise.{kind}_" if kind in RESERVED else f"elementwise.{kind}"


@dataclass
class Epilogue:
    """The values of the nodes of a region while they are written, f32[out, rows] or smaller."""

    emission: Emission
    linear: LinearRegion
    values: dict[Node, str]

    def value(self, node: Node) -> str:
        """Return the name of a value."""
        if node not in self.values:
            self.values[node] = self.compute(node)
        return self.values[node]

    def product(self, node: Node, acc: str) -> None:
        """Say that `acc` holds the product of a linear, still without its bias."""
        self.values[node] = acc
        if len(node.inputs) > 2:
            bias = self.value(node.inputs[2])
            self.values[node] = self.emission.bind(f"elementwise.add({acc}, {bias})")

    def compute(self, node: Node) -> str:
        """Write one node."""
        inputs = [self.value(operand) for operand in node.inputs]
        match node.op:
            case ops.Scalar(value):
                return f"({float(value)!r})"
            case ops.Input():
                return self.extra(node)
            case ops.Unary(kind) | ops.Binary(kind):
                return self.emission.bind(f"{function_of(kind)}({', '.join(inputs)})")
            case ops.Where():
                return self.emission.bind(f"elementwise.where({', '.join(inputs)})")
            case ops.GatedActivation(kind):
                gate = self.emission.bind(f"{function_of(kind)}({inputs[0]})")
                return self.emission.bind(f"elementwise.mul({gate}, {inputs[1]})")
            case ops.Cast(dtype) if dtype.is_floating_point:
                return self.emission.bind(f"elementwise.cast({inputs[0]}, {TRITON_NAMES[dtype]})")
        raise TypeError(f"{node.op.name} stands in no epilogue")

    def extra(self, node: Node) -> str:
        """Load an operand that is no factor of a product."""
        number = self.linear.operand(node)
        stored = isinstance(self.linear.region.operands[number].op, Parameter)
        if stored:
            name = self.emission.weight(number, "decoded", torch.float32, decoded)
        else:
            name = self.emission.array(f"e{number}", ArrayArgument(number), self.emission.dtype)
        if is_number(node):
            return self.emission.bind(f"products.number({name})")
        if is_vector(node, self.linear.outer):
            return self.emission.bind(f"products.vector({name}, out)")
        return self.emission.bind(f"products.full({name}, out, rows, {self.linear.outer})")


def decoded(weight: Weight) -> torch.Tensor:
    """Return a vector as float32."""
    return weight.dense().float().contiguous()


TRITON_NAMES = {
    torch.float32: "tl.float32", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16",
}  # fmt: skip
