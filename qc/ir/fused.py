"""Several nodes that become one kernel: the unit of the planned graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from qc.ir.graph import Graph, structure_of
from qc.ir.meaning import evaluate_nodes
from qc.ir.node import Node
from qc.ir.op import Op, Sizes
from qc.ir.ops import Input
from qc.ir.types import ValueType


@dataclass(frozen=True, eq=False)
class Fused(Op):
    """A body with one output, run as one kernel.

    Operand i of the fused node is the body's i-th Input. Parameters stay outside and come in as
    operands, so that layers with equal bodies share a kernel.
    """

    name: ClassVar[str] = "fused"
    label: str
    body: Graph

    def infer(self, *types: ValueType) -> ValueType:
        expected = tuple(node.type for node in self.body.inputs)
        if types != expected:
            raise ValueError(f"{self.label} takes {expected}, got {types}")
        return self.body.outputs[0].type

    def meaning(self, *values: Any, sizes: Sizes) -> Any:
        known = dict(zip(self.body.inputs, values, strict=True))
        return evaluate_nodes(self.body.outputs, {}, sizes, known=known)[0]

    @cached_property
    def structure(self) -> tuple[object, ...]:
        return tuple(structure_of((*self.body.inputs, *self.body.outputs)))

    def attributes(self) -> str:
        inner = [
            n.op.name if str(n.op) == n.op.name or "(" in str(n.op) else str(n.op)
            for n in self.body.nodes
            if not isinstance(n.op, Input)
        ]
        return f"{self.label}: {' '.join(inner)}"


def fuse(label: str, root: Node, inside: frozenset[Node]) -> Node:
    """Return a fused node that computes `root` from the operands of the nodes `inside`.

    `inside` holds `root` and what is computed with it; everything else becomes an operand, in
    order of first use. Scalars are copied into the body.
    """
    operands: dict[Node, Node] = {}
    rebuilt: dict[Node, Node] = {}
    for node in topological_inside(root, inside):
        inputs = []
        for operand in node.inputs:
            if operand in inside or (not operand.inputs and operand.op.name == "scalar"):
                inputs.append(rebuilt.get(operand, operand))
                continue
            if operand not in operands:
                op = Input(str(len(operands)), operand.tensor)
                operands[operand] = Node(op, (), operand.type)
            inputs.append(operands[operand])
        rebuilt[node] = Node(node.op, tuple(inputs), node.type, node.origin)
    body = Graph(tuple(operands.values()), (rebuilt[root],), ("result",))
    return Node(Fused(label, body), tuple(operands), root.type, root.origin)


def topological_inside(root: Node, inside: frozenset[Node]) -> list[Node]:
    """Order the nodes of `inside` that `root` needs, operands first."""
    order: dict[Node, None] = {}
    stack = [(root, False)]
    while stack:
        node, done = stack.pop()
        if node in order or node not in inside:
            continue
        if done:
            order[node] = None
            continue
        stack.append((node, True))
        stack.extend((operand, False) for operand in reversed(node.inputs))
    return list(order)
