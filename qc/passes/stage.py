"""Stages: what a graph must look like between passes, and the checker that says where it is not.

captured -> canonical -> quantized -> planned. A spec lists what may not occur any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qc.errors import StageError
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.text import excerpt


@dataclass(frozen=True)
class Stage:
    """A named set of laws; each returns what is wrong with a node, or None."""

    name: str
    laws: tuple[Callable[[Node], str | None], ...] = ()

    def check(self, graph: Graph) -> None:
        """Raise StageError at the first node that breaks a law, with graph around it."""
        for node in graph.nodes:
            for law in self.laws:
                wrong = law(node)
                if wrong is not None:
                    where = f" at {node.origin}" if node.origin.module else ""
                    raise StageError(
                        f"not a {self.name} graph: {wrong}{where}\n{excerpt(graph, node)}"
                    )

    def __str__(self) -> str:
        return self.name


def types_are_inferred(node: Node) -> str | None:
    """A node's type is what its op infers from its inputs."""
    try:
        inferred = node.op.infer(*(i.type for i in node.inputs))
    except (ValueError, TypeError) as error:
        return f"{node.op} does not accept its inputs: {error}"
    return None if inferred == node.type else f"{node.op} gives {inferred}, not {node.type}"


def linears_read_weights(node: Node) -> str | None:
    """The weight of a linear is a stored one, not a computed one."""
    if isinstance(node.op, ops.Linear) and not isinstance(node.inputs[1].op, ops.Parameter):
        return "the weight of a linear is computed, so it cannot be quantized"
    return None


def quantized_values_feed_linears(node: Node) -> str | None:
    """Only linears read quantized activations, besides appends to caches and attention to them."""
    if isinstance(node.op, ops.Linear):
        return None
    caches = {ops.Append: slice(0, 1), ops.Attention: slice(1, 3)}.get(type(node.op))
    others = [i for i in node.inputs if caches is None or i not in node.inputs[caches]]
    if any(getattr(i.type, "format", None) is not None for i in others):
        return f"{node.op.name} reads a quantized activation"
    return None


CAPTURED = Stage("captured", (types_are_inferred,))
CANONICAL = Stage("canonical", (types_are_inferred, linears_read_weights))
QUANTIZED = Stage(
    "quantized", (types_are_inferred, linears_read_weights, quantized_values_feed_linears)
)
