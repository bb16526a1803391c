"""Print a graph, one node a line, as golden files and error messages show it."""

from __future__ import annotations

from collections.abc import Mapping

from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.ops import FakeQuantize, Parameter, Quantize, Scalar


def operand_text(node: Node, names: Mapping[Node, str]) -> str:
    """Print a node as an operand: scalars in place, everything else by name."""
    if isinstance(node.op, Scalar):
        return repr(node.op.value)
    return names[node]


def node_names(graph: Graph) -> dict[Node, str]:
    """Name every node: %0, %1, ... in topological order; weights are %w0, %w1, ..."""
    names: dict[Node, str] = {}
    values = weights = 0
    for node in graph.nodes:
        if isinstance(node.op, Parameter):
            names[node], weights = f"%w{weights}", weights + 1
        elif not isinstance(node.op, Scalar):
            names[node], values = f"%{values}", values + 1
    return names


def node_text(node: Node, names: Mapping[Node, str]) -> str:
    """Print one node: `%y = linear(%q, %w8) : f32[batch, seq, 576]   # origin`."""
    operands = ", ".join(operand_text(i, names) for i in node.inputs)
    if isinstance(node.op, Parameter):
        weight = node.op.weight
        left = f"{names[node]} = weight {weight.format}"
        right = f"{list(weight.shape)} {weight.bits_per_element:.2f} bits"
        return annotate(f"{left:<44} : {right}", weight.name)
    attributes = node.op.attributes()
    if isinstance(node.op, Quantize | FakeQuantize):
        call = f"{node.op.name}({operands}) {attributes}"
    elif str(node.op) != node.op.name and "(" not in str(node.op):
        call = f"{node.op}({operands})"
    else:
        call = f"{node.op.name}({', '.join(part for part in (operands, attributes) if part)})"
    return annotate(f"{names[node] + ' = ' + call:<44} : {node.type}", str(node.origin))


def annotate(line: str, comment: str) -> str:
    """Append a comment in a column of its own."""
    return f"{line:<72} # {comment}" if comment else line


def graph_text(graph: Graph) -> str:
    """Print the whole graph."""
    names = node_names(graph)
    lines = [node_text(node, names) for node in graph.nodes if node in names]
    pairs = zip(graph.output_names, graph.outputs, strict=True)
    returned = ", ".join(f"{name}={operand_text(node, names)}" for name, node in pairs)
    return "\n".join([*lines, f"return {returned}"])


def excerpt(graph: Graph, node: Node, around: int = 2) -> str:
    """Print the lines around `node`, with a caret under it."""
    names = node_names(graph)
    listed = [n for n in graph.nodes if n in names]
    at = listed.index(node)
    lines = []
    for other in listed[max(0, at - around) : at + around + 1]:
        line = node_text(other, names)
        lines.append(line)
        if other is node:
            lines.append("^" * len(line.split(" : ")[0].rstrip()))
    return "\n".join(lines)
