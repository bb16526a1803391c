"""What a linear region is: one product, or two that feed a gate, and an elementwise epilogue."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qc.backends.region import Region
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.types import ActivationFormat, Dim, element_count
from qc.ir.weights.weight import WeightFormat

ELEMENTWISE = (ops.Unary, ops.Binary, ops.Where, ops.Cast, ops.GatedActivation)


@dataclass(frozen=True)
class LinearRegion:
    """A region seen as `epilogue(x W_0^T, x W_1^T, extras)`, rows of `inner` to rows of `outer`."""

    region: Region
    linears: tuple[Node, ...]
    extras: tuple[Node, ...]

    @property
    def x(self) -> Node:
        return self.linears[0].inputs[0]

    @property
    def activation(self) -> ActivationFormat | None:
        """How x is quantized; None for float32."""
        return self.x.tensor.format

    @property
    def weights(self) -> tuple[Node, ...]:
        return tuple(linear.inputs[1] for linear in self.linears)

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """How the weights are stored."""
        found = (self.region.format_of(weight) for weight in self.weights)
        return tuple(format for format in found if format is not None)

    @property
    def rows(self) -> Dim:
        return element_count(self.x.tensor.shape[:-1])

    @property
    def outer(self) -> int:
        return int(self.weights[0].tensor.shape[0])

    @property
    def inner(self) -> int:
        return int(self.weights[0].tensor.shape[1])

    def operand(self, node: Node) -> int:
        """Return the operand number of a body input."""
        return self.region.body.inputs.index(node)


def match_linear(region: Region) -> LinearRegion | None:
    """View `region` as a linear region; None where it is something else."""
    linears = tuple(n for n in region.body.nodes if isinstance(n.op, ops.Linear))
    if len(linears) not in (1, 2) or not all(reads_parameters(region, n) for n in linears):
        return None
    first = linears[0]
    if any(n.inputs[0] is not first.inputs[0] or n.type != first.type for n in linears):
        return None
    root = region.root.tensor
    if root.shape != first.tensor.shape or root.dtype != torch.float32:
        return None
    x = first.inputs[0].tensor
    if x.format is None and x.dtype != torch.float32:
        return None
    products = {operand for linear in linears for operand in linear.inputs[:2]}
    extras = tuple(n for n in region.body.inputs if n not in products)
    if not all(is_elementwise(region.body, node, linears) for node in region.body.nodes):
        return None
    if not all(fits(region, node) for node in extras):
        return None
    return LinearRegion(region, linears, extras)


def reads_parameters(region: Region, linear: Node) -> bool:
    """Say whether a linear multiplies a body input by a stored matrix, both from outside."""
    x, weight = linear.inputs[:2]
    inputs = region.body.inputs
    return x in inputs and weight in inputs and region.format_of(weight) is not None


def is_elementwise(body: Graph, node: Node, linears: tuple[Node, ...]) -> bool:
    """Say whether a node of the body may stand in the epilogue, or before it."""
    if node in linears or node in body.inputs or isinstance(node.op, ops.Scalar):
        return True
    return isinstance(node.op, ELEMENTWISE) and node.tensor.format is None


def fits(region: Region, extra: Node) -> bool:
    """Say whether an extra operand is float32 of the result's shape, a vector, or one number."""
    type, stored = extra.tensor, region.format_of(extra) is not None
    if type.format is not None or (type.dtype != torch.float32 and not stored):
        return False
    if is_number(extra) or is_vector(extra, region.root.tensor.shape[-1]):
        return True
    return type.shape == region.root.tensor.shape and not stored


def is_number(extra: Node) -> bool:
    """Say whether `extra` is a single value."""
    return all(size == 1 for size in extra.tensor.shape)


def is_vector(extra: Node, outer: Dim) -> bool:
    """Say whether `extra` has one value for each output channel, the same for all rows."""
    shape = extra.tensor.shape
    return shape[-1:] == (outer,) and all(size == 1 for size in shape[:-1])
