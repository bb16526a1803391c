"""The linears of a planned graph: how each is stored, and which kernels will multiply by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qc.checking.roofline import Cost, Work, work_of
from qc.errors import UnsupportedError
from qc.ir import ops
from qc.ir.fused import Fused
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.target import Target
from qc.ir.types import ActivationFormat
from qc.ir.weights.dense import DenseFormat
from qc.ir.weights.weight import Weight, WeightFormat

if TYPE_CHECKING:
    from qc.backends.linear_region import LinearRegion
    from qc.backends.region import Region
    from qc.backends.tvm.kernel import Kernel

REFERENCE = "reference interpreter"
SIXTEEN_BITS = WeightFormat((DenseFormat(torch.float16),))
"""What speed-ups are over."""


@dataclass(frozen=True)
class PlannedLinear:
    """A linear, its stored weight, the names of the rules, and what a product costs. `activation`
    is what its inputs are rounded to, whether codes are stored or what they stand for."""

    weight: Weight
    activation: ActivationFormat | None
    rules: tuple[str, ...]
    work: Cost | None = None
    baseline: Cost | None = None


def linears_of(graph: Graph, target: Target) -> list[PlannedLinear]:
    """List the linears of a planned graph; UnsupportedError names one that no kernel computes."""
    if target.device == "torch":
        return [
            PlannedLinear(parameter_of(node.inputs[1]), node.inputs[0].tensor.format, (REFERENCE,))
            for node in graph.nodes
            if isinstance(node.op, ops.Linear) and isinstance(node.inputs[1].op, ops.Parameter)
        ]
    if target.gpu is not None:
        from qc.checking.gpu import GpuChooser

        on_gpu = GpuChooser(target)
        return [linear for node in graph.nodes for linear in on_gpu.linears(node)]
    require_int_activations(graph, target)
    chooser = KernelChooser(target)
    return [linear for node in graph.nodes for linear in chooser.linears(node)]


def require_kernels(graph: Graph, target: Target) -> None:
    """Refuse a planned graph with a linear that no kernel computes, without choosing kernels:
    what the rules for linears match, the last of them takes in any format. For a GPU, refuse what
    has no kernel, whatever it is: there is no torch between launches."""
    if target.gpu is not None:
        from qc.checking.gpu import require_gpu_kernels

        require_gpu_kernels(graph, target)
        return
    from qc.backends.linear_region import match_linear
    from qc.backends.region import region_of

    require_int_activations(graph, target)
    for node in graph.nodes:
        if not isinstance(node.op, Fused):
            continue
        operands = dict(zip(node.op.body.inputs, node.inputs, strict=True))
        inside = [n for n in node.op.body.nodes if reads_weight(n, operands)]
        region = region_of(node, target)
        if inside and match_linear(region) is None:
            other_kernel(node, region)


def require_int_activations(graph: Graph, target: Target) -> None:
    """Refuse activations of small floats on a CPU: none multiplies them."""
    for node in graph.nodes:
        op = node.op
        if not isinstance(op, Fused) or not isinstance(op.body.outputs[0].op, ops.Quantize):
            continue
        format = node.tensor.format
        if format is not None and format.kind != "int":
            raise UnsupportedError(
                f"no kernel of {target} reads activations of {format.code}: recipe w8 has int8 "
                "ones, w8a16 leaves them as they are; GPUs multiply e4m3 from sm_89 on, "
                "e2m1 from sm_100 on",
                origin=node.origin.module or None,
            )


def other_kernel(node: Node, region: Region) -> Kernel | None:
    """Return the kernel of a region that the rules for linears do not take; None where its parts
    have kernels of their own. UnsupportedError where it has one part and no rule takes it."""
    from qc.backends.tvm.rules import CPU_RULES

    kernel = next((k for rule in CPU_RULES if (k := rule(region)) is not None), None)
    if kernel is None and len(region.body.nodes) - len(region.body.inputs) == 1:
        raise UnsupportedError("no kernel computes linear", origin=node.origin.module or None)
    return kernel


def parameter_of(node: Node) -> Weight:
    """Return the stored weight behind a node."""
    assert isinstance(node.op, ops.Parameter)
    return node.op.weight


class KernelChooser:
    """Asks the rules of the CPU backend; equal linears are asked for once."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.known: dict[object, tuple[tuple[str, ...], Work]] = {}

    def linears(self, node: Node) -> Iterator[PlannedLinear]:
        """Yield the linears inside a fused node that read stored weights."""
        from qc.backends.linear_region import match_linear
        from qc.backends.region import region_of

        if not isinstance(node.op, Fused):
            return
        operands = dict(zip(node.op.body.inputs, node.inputs, strict=True))
        inside = [n for n in node.op.body.nodes if reads_weight(n, operands)]
        if not inside:
            return
        region = region_of(node, self.target)
        linear = match_linear(region)
        if linear is None:
            yield from self.others(node, region, inside, operands)
            return
        for each, format in zip(linear.linears, linear.formats, strict=True):
            weight = parameter_of(operands[each.inputs[1]])
            yield self.planned(weight, format, linear.activation, linear, each)

    def planned(
        self,
        weight: Weight,
        format: WeightFormat,
        activation: ActivationFormat | None,
        linear: LinearRegion,
        node: Node,
    ) -> PlannedLinear:
        """Describe one linear of a region that the rules for linears take."""
        rules, work = self.choose(weight, format, activation, linear, node)
        _, baseline = self.choose(weight, SIXTEEN_BITS, None, linear, node)
        return PlannedLinear(weight, activation, rules, work, baseline)

    def choose(
        self,
        weight: Weight,
        format: WeightFormat,
        activation: ActivationFormat | None,
        linear: LinearRegion,
        node: Node,
    ) -> tuple[tuple[str, ...], Work]:
        """Return the rules and the work for a weight, were it stored in `format`."""
        from qc.backends.tvm.linear.rule import LinearKernels, places_of, term_kernel

        key = (format, weight.shape, activation)
        if key not in self.known:
            places = [
                replace(place, activation=activation) for place in places_of(linear, node, format)
            ]
            kernels = [term_kernel(place) for place in places]
            tile = LinearKernels(linear, {node: kernels}).tile_height()
            size = format.bits(weight.shape) // 8
            instructions = [kernel.work for kernel in kernels]
            integers = activation is not None
            work = work_of(size, weight.elements, instructions, tile, self.target, integers)
            names = tuple(dict.fromkeys(kernel.rule for kernel in kernels))
            self.known[key] = names, work
        return self.known[key]

    def others(
        self, node: Node, region: Region, inside: list[Node], operands: Mapping[Node, Node]
    ) -> Iterator[PlannedLinear]:
        """Yield linears that other rules take, which name no costs."""
        kernel = other_kernel(node, region)
        for each in inside:
            x, weight = each.inputs[0], parameter_of(operands[each.inputs[1]])
            yield PlannedLinear(weight, x.tensor.format, (kernel.rule if kernel else "parts",))


def reads_weight(node: Node, operands: Mapping[Node, Node]) -> bool:
    """Say whether a node of a body is a linear of a stored matrix."""
    if not isinstance(node.op, ops.Linear):
        return False
    weight = operands.get(node.inputs[1])
    return weight is not None and isinstance(weight.op, ops.Parameter)
