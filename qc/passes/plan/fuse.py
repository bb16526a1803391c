"""Decide which nodes run together: every node but views and leaves ends up in a fused node.

Four kinds of regions, tried in this order; each grows only over values that nothing else reads,
so fusing never computes anything twice and never makes a cycle:

    linear      linear(s) sharing an input, then element by element on the result
    attention   rope in front of the queries, attention; rope in front of a cache append
    rows        norms, rotations, quantization and what is local to a row around them
    elements    any chain of element-by-element and index operations
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from qc.ir import ops
from qc.ir.fused import Fused, fuse
from qc.ir.graph import Graph, map_nodes
from qc.ir.node import Node
from qc.ir.op import Op
from qc.ir.rewrite import with_inputs
from qc.ir.types import TupleType
from qc.passes.pipeline import Context, Pass
from qc.passes.stage import QUANTIZED, Stage, types_are_inferred

ELEMENTWISE = (ops.Unary, ops.Binary, ops.Where, ops.Cast, ops.GatedActivation)
WHOLE_ROW = (ops.RMSNorm, ops.LayerNorm, ops.Hadamard, ops.Quantize, ops.FakeQuantize)
ROW_LOCAL = (*ELEMENTWISE, *WHOLE_ROW)
INDEXING = (
    ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Concat,
    ops.Arange, ops.Full, ops.Size, ops.Embedding,
)  # fmt: skip
LEAVES = (ops.Input, ops.Parameter, ops.Scalar)
UNFUSED = (*LEAVES, ops.Reshape, ops.Torch, ops.Item, Fused)


def only_planned_ops(node: Node) -> str | None:
    """What is planned is a kernel, a view, a leaf or an uninterpreted call."""
    if isinstance(node.op, UNFUSED):
        return None
    return f"{node.op.name} belongs to no kernel"


PLANNED = Stage("planned", (types_are_inferred, only_planned_ops))


@dataclass(frozen=True)
class Fuse(Pass):
    """Group the nodes of a graph into kernels.

        %2 = rms_norm(%1, %w)  -->  %3 = fused(%1, %w, rows: rms_norm quantize)
        %3 = quantize(%2)

    Exact.
    """

    name: ClassVar[str] = "fuse"
    requires: ClassVar[Stage] = QUANTIZED
    ensures: ClassVar[Stage] = PLANNED

    def run(self, graph: Graph, context: Context) -> Graph:
        regions = find_regions(graph)

        def transform(node: Node, inputs: tuple[Node, ...]) -> Node:
            region = regions.get(node)
            if region is None:
                return with_inputs(node, inputs)
            fused = fuse(region.label, node, region.inside)
            return with_inputs(fused, tuple(planned[i] for i in fused.inputs))

        planned: dict[Node, Node] = {}

        def remember(node: Node, inputs: tuple[Node, ...]) -> Node:
            planned[node] = transform(node, inputs)
            return planned[node]

        return map_nodes(graph, remember)


@dataclass(frozen=True)
class RegionNodes:
    """The nodes of one kernel; the root is the key under which the region is kept."""

    label: str
    inside: frozenset[Node]


class Grouping:
    """The regions found so far in one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.regions: dict[Node, RegionNodes] = {}
        self.taken: set[Node] = set()
        self.outputs = frozenset(graph.outputs)

    def free(self, node: Node, kinds: tuple[type[Op], ...]) -> bool:
        """Say whether a node of one of these kinds is still outside every region."""
        return isinstance(node.op, kinds) and node not in self.taken

    def private(self, node: Node, inside: Iterable[Node]) -> bool:
        """Say whether nothing outside `inside` reads `node`."""
        return node not in self.outputs and set(self.graph.users[node]) <= set(inside)

    def add(self, label: str, root: Node, inside: set[Node]) -> None:
        """Close a region."""
        self.regions[root] = RegionNodes(label, frozenset(inside))
        self.taken |= inside

    def grow_down(self, root: Node, inside: set[Node], kinds: tuple[type[Op], ...]) -> Node:
        """Extend a region over the only user of its root while that keeps the shape."""
        while root not in self.outputs and len(self.graph.users[root]) == 1:
            user = self.graph.users[root][0]
            if not self.free(user, kinds) or not keeps_rows(user, root):
                break
            inside.add(user)
            root = user
        return root

    def grow_up(self, inside: set[Node], kinds: tuple[type[Op], ...], rows_of: Node | None) -> None:
        """Absorb producers that nothing else reads; `rows_of` limits them to its shape."""
        waiting = list(inside)
        while waiting:
            for operand in waiting.pop().inputs:
                if operand in inside or not self.free(operand, kinds):
                    continue
                if not self.private(operand, inside):
                    continue
                if rows_of is not None and not keeps_rows(operand, rows_of):
                    continue
                inside.add(operand)
                waiting.append(operand)


def keeps_rows(node: Node, like: Node) -> bool:
    """Say whether `node` has the shape of `like` and reads only values of that shape, vectors
    along its last axis, scalars, and the stored factor of a rotation."""
    if isinstance(node.type, TupleType) or node.tensor.shape != like.tensor.shape:
        return False
    if not (node.tensor.is_float and like.tensor.is_float):
        return False
    last, operands = like.tensor.shape[-1:], node.inputs
    if isinstance(node.op, ops.Hadamard):
        if not isinstance(node.inputs[1].op, ops.Parameter):
            return False
        operands = node.inputs[:1]
    return all(
        i.tensor.is_float and i.tensor.shape in (like.tensor.shape, last, ()) for i in operands
    )


def find_regions(graph: Graph) -> dict[Node, RegionNodes]:
    """Group all nodes."""
    grouping = Grouping(graph)
    for find in (linear_regions, attention_regions, row_regions, element_regions):
        find(grouping)
    return grouping.regions


def linear_regions(grouping: Grouping) -> None:
    """Linears, two of them where they feed one gate, with what follows element by element."""
    for node in grouping.graph.nodes:
        if not grouping.free(node, (ops.Linear,)) or not feeds_on_parameter(node):
            continue
        inside, root = {node}, node
        gate = gated_pair(grouping, node)
        if gate is not None:
            inside, root = {*gate.inputs, gate}, gate
        root = grouping.grow_down(root, inside, ELEMENTWISE)
        grouping.add("linear", root, inside)


def feeds_on_parameter(node: Node) -> bool:
    """Say whether the weight of a linear is a stored one."""
    return isinstance(node.inputs[1].op, ops.Parameter)


def gated_pair(grouping: Grouping, node: Node) -> Node | None:
    """Return the gated activation that reads nothing but `node` and a linear of the same input."""
    users = grouping.graph.users[node]
    if len(users) != 1 or not grouping.free(users[0], (ops.GatedActivation,)):
        return None
    gate = users[0]
    if gate.inputs[0] is gate.inputs[1]:
        return None
    fits = all(
        grouping.free(linear, (ops.Linear,))
        and feeds_on_parameter(linear)
        and grouping.private(linear, {gate})
        and linear.inputs[0] is node.inputs[0]
        for linear in gate.inputs
    )
    return gate if fits else None


def attention_regions(grouping: Grouping) -> None:
    """Attention with the rotation of its queries; cache appends with the rotation of keys."""
    for node in grouping.graph.nodes:
        if grouping.free(node, (ops.Attention, ops.Append)):
            inside = {node}
            rotated = node.inputs[0] if isinstance(node.op, ops.Attention) else node.inputs[1]
            if grouping.free(rotated, (ops.Rope,)) and grouping.private(rotated, {node}):
                inside.add(rotated)
            grouping.add(node.op.name, node, inside)


def row_regions(grouping: Grouping) -> None:
    """Norms, rotations and quantization with the row-local work before and after them."""
    for node in grouping.graph.nodes:
        if not grouping.free(node, WHOLE_ROW):
            continue
        inside = {node}
        grouping.grow_up(inside, ROW_LOCAL, rows_of=node)
        root = node
        if not isinstance(node.op, ops.Quantize):
            root = grouping.grow_down(node, inside, ROW_LOCAL)
        grouping.add("rows", root, inside)


def element_regions(grouping: Grouping) -> None:
    """Everything else: chains of element and index operations; other ops stand alone."""
    for node in reversed(grouping.graph.nodes):
        if node in grouping.taken or isinstance(node.op, UNFUSED):
            continue
        inside = {node}
        kinds = (*ELEMENTWISE, *INDEXING)
        if isinstance(node.op, kinds):
            grouping.grow_up(inside, kinds, rows_of=None)
        grouping.add("elements" if isinstance(node.op, kinds) else node.op.name, node, inside)
