"""What the GPU backend will make of a planned graph: kernels, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from qc.backends.linear_region import match_linear
from qc.backends.lowering import region_key, single_nodes
from qc.backends.region import region_of, rounding_of
from qc.backends.triton.kernel import Call
from qc.backends.triton.linear.affine import affine_term
from qc.backends.triton.linear.coded import matched, planes_of
from qc.backends.triton.linear.place import Place
from qc.checking.gpu_times import BUCKETS, KINDS, GpuWork
from qc.checking.linears import PlannedLinear, parameter_of
from qc.errors import UnsupportedError
from qc.ir import ops
from qc.ir.fused import Fused
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.target import Target
from qc.ir.weights.structure import Entries
from qc.ir.weights.weight import WeightFormat


class GpuChooser:
    """Asks the rules of the GPU backend; equal regions are asked for once."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.known: dict[object, Call | None] = {}

    def call(self, node: Node) -> Call | None:
        """Return what the first rule that takes a fused node makes of it."""
        from qc.backends.triton.rules import GPU_RULES

        region = region_of(node, self.target)
        key = region_key(region)
        if key not in self.known:
            self.known[key] = next((c for rule in GPU_RULES if (c := rule(region))), None)
        return self.known[key]

    def require(self, node: Node) -> None:
        """Refuse a node that has no kernel, whole or in parts.

        UnsupportedError with its origin.
        """
        where = node.origin.module or None
        if isinstance(node.op, ops.Torch):
            raise UnsupportedError(
                f"{node.op.overload} has no GPU kernel; the cpu and torch targets run it on torch",
                origin=where,
            )
        if not isinstance(node.op, Fused) or self.call(node) is not None:
            return
        for part in single_nodes(node):
            if self.call(part) is None:
                assert isinstance(part.op, Fused)
                op = part.op.body.outputs[0].op
                raise UnsupportedError(f"no GPU kernel computes {op}", origin=where)

    def linears(self, node: Node) -> Iterator[PlannedLinear]:
        """Yield the linears of stored weights inside a fused node."""
        if not isinstance(node.op, Fused):
            return
        linear = match_linear(region_of(node, self.target))
        if linear is None:
            return
        rules = rules_of(self.call(node))
        operands = dict(zip(node.op.body.inputs, node.inputs, strict=True))
        activation = linear.activation or rounding_of(operands[linear.x])
        for each, format in zip(linear.linears, linear.formats, strict=True):
            weight = parameter_of(operands[each.inputs[1]])
            measured = self.target.device != "rocm"  # nothing was on AMD's
            work = gpu_work(format, weight.shape, self.call(node)) if measured else None
            baseline = work_of_sixteen_bits(weight.shape)
            yield PlannedLinear(weight, activation, rules, work, baseline)


def rules_of(call: Call | None) -> tuple[str, ...]:
    """Name the rules behind the launches for one row."""
    launches = call.variants[0].launches if call is not None else ()
    return tuple(dict.fromkeys(launch.rule for launch in launches)) or ("parts",)


def gpu_work(format: WeightFormat, shape: tuple[int, ...], call: Call | None) -> GpuWork | None:
    """Return what a product has to do; None where no kernel like its own was measured."""
    if call is None or not set(KINDS) & set(kinds_of(call)):
        return None
    outer, inner = shape
    structures = [term.structure((outer, inner)) for term in format.terms]
    listed = [t for t, s in zip(format.terms, structures, strict=True) if isinstance(s, Entries)]
    entries = sum(prod(term.arrays((outer, inner))["columns"].shape) for term in listed)
    planes = 0
    for number, term in enumerate(format.terms):
        place = Place(0, str(number), term, (outer, inner))
        made = affine_term(place) if structures[number] is None else None
        found = made or (matched(place) if structures[number] is None else None)
        streams = [part.stream for part in found.parts if part.stream] if found else []
        for stream in streams:
            looked = 2 if stream.table else 1  # two bytes of each value
            planes += (looked + (made is not None)) * len(planes_of(stream.bits))
    launches = tuple(len(call.variant(rows).launches) for rows in (*BUCKETS, 1 << 30))
    return GpuWork(format.bits(shape) // 8, outer * inner, inner, entries, max(1, planes), launches)


def kinds_of(call: Call) -> list[str]:
    """Return the names of the rules behind a call's launches, one by one."""
    return [kind for launch in call.variants[0].launches for kind in launch.rule.split("_")]


def work_of_sixteen_bits(shape: tuple[int, ...]) -> GpuWork:
    """Return what the product with a float16 matrix has to do."""
    outer, inner = shape
    return GpuWork(2 * outer * inner, outer * inner, inner)


def require_gpu_kernels(graph: Graph, target: Target) -> None:
    """Refuse a planned graph with a node that no kernel computes. UnsupportedError."""
    chooser = GpuChooser(target)
    for node in graph.nodes:
        chooser.require(node)


def gpu_kernel_count(graph: Graph, target: Target) -> int:
    """Count the kernels to compile: launches that differ, for every architecture."""
    from qc.backends.triton.glue import launch_name

    chooser, names = GpuChooser(target), set()
    for node in graph.nodes:
        call = chooser.call(node) if isinstance(node.op, Fused) else None
        for variant in call.variants if call is not None else ():
            names |= {launch_name(launch) for launch in variant.launches}
    assert target.gpu is not None
    return len(names) * len(target.gpu.architectures)
