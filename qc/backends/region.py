"""What every compiling backend's kernel rules look at, and how they name their arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qc.ir.fused import Fused
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.ops import FakeQuantize, Parameter
from qc.ir.target import Target
from qc.ir.types import ActivationFormat, Dim
from qc.ir.weights.weight import Weight, WeightFormat


@dataclass(frozen=True)
class ArrayArgument:
    """A buffer argument. `operand` is the position among the node's operands, or RESULT.

    `array` names one of the arrays that hold the value: "values" for an ordinary tensor;
    "codes" (int8 [rows, channels]), "scale" and "total" (float32 [rows, groups], with
    total = scale * sum of codes of the group) for a quantized activation; the names of stored or
    repacked arrays for a weight. `shape` is the shape under which the kernel sees the buffer
    (same elements, row-major); None: as it is.
    """

    operand: int
    array: str = "values"
    shape: tuple[Dim, ...] | None = None


RESULT = -1


@dataclass(frozen=True)
class SizeArgument:
    """An integer argument: the value of a symbolic dimension, such as `past`."""

    dim: Dim


Repack = Callable[[Weight], torch.Tensor]
"""Turn a stored weight into an array that a kernel reads: the same bits in another order."""


@dataclass(frozen=True)
class Region:
    """What a kernel rule looks at: a fused body, the formats behind its operands, the target."""

    body: Graph
    operands: tuple[Node, ...]
    target: Target

    @property
    def root(self) -> Node:
        """The node whose value the kernel writes."""
        return self.body.outputs[0]

    def format_of(self, node: Node) -> WeightFormat | None:
        """Return how the body input `node` is stored, where it is a parameter."""
        operand = self.operands[self.body.inputs.index(node)]
        return operand.op.weight.format if isinstance(operand.op, Parameter) else None


def rounding_of(node: Node) -> ActivationFormat | None:
    """Return how a fused node rounds the floats that it writes; None where it does not."""
    op = node.op.body.outputs[0].op if isinstance(node.op, Fused) else node.op
    return op.format if isinstance(op, FakeQuantize) else None


def region_of(node: Node, target: Target) -> Region:
    """View a fused node as a region."""
    assert isinstance(node.op, Fused)
    return Region(node.op.body, node.inputs, target)
