"""What a compilation did to each weight: the rows that `report()` and the command line show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.passes.calibration.coverage import Coverage


def compile_report(
    graph: Graph, source: str, target: str, coverage: Mapping[str, Coverage] | None = None
) -> dict[str, Any]:
    """Describe every stored matrix of a quantized graph, and the totals, as plain JSON.

    Weights that were stored by data also have the calibration tokens that they saw, and the share
    of their output that is lost on these.
    """
    rows = [describe_weight(node, graph) for node in graph.parameters if is_matrix(node)]
    for row in rows:
        seen = (coverage or {}).get(row["name"])
        if seen is not None and row["kind"] == "linear":
            row |= {"tokens": seen.tokens, "output_error": seen.error}
    linears = [row for row in rows if row["kind"] == "linear"]
    small = [node for node in graph.parameters if not is_matrix(node)]
    return {
        "source": source,
        "target": target,
        "rows": rows,
        "summary": {
            "linears": len(linears),
            "bits_per_linear_weight": weighted_bits(linears),
            "linear_bytes": sum(row["bytes"] for row in linears),
            "table_bytes": sum(row["bytes"] for row in rows if row["kind"] == "table"),
            "other_bytes": sum(weight_of(node).bits // 8 for node in small)
            + sum(row["bytes"] for row in rows if row["kind"] == "other"),
            "parameters": sum(weight_of(node).elements for node in graph.parameters),
        },
    }


def is_matrix(node: Node) -> bool:
    """Say whether a parameter is a matrix rather than a vector or an image kernel."""
    return node.tensor.rank == 2


def weight_of(node: Node) -> Any:
    """Return the weight of a parameter node."""
    assert isinstance(node.op, ops.Parameter)
    return node.op.weight


def describe_weight(node: Node, graph: Graph) -> dict[str, Any]:
    """Return one row of the report."""
    weight = weight_of(node)
    return {
        "name": weight.name,
        "kind": kind_of(node, graph),
        "shape": list(weight.shape),
        "format": str(weight.format),
        "bits_per_weight": round(weight.bits_per_element, 4),
        "bytes": weight.bits // 8,
    }


def kind_of(node: Node, graph: Graph) -> str:
    """Say what reads a matrix: a linear, an embedding, or something else."""
    users = [user.op for user in graph.users[node]]
    if any(isinstance(op, ops.Linear) for op in users):
        return "linear"
    return "table" if any(isinstance(op, ops.Embedding) for op in users) else "other"


def weighted_bits(rows: list[dict[str, Any]]) -> float:
    """Return stored bits per weight over several matrices, everything included."""
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    return round(sum(8 * row["bytes"] for row in rows) / weights, 4) if weights else 0.0
