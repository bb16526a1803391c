"""Make past keys and values inputs and outputs of the graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import sympy
import torch

from qc.ir import ops
from qc.ir.graph import Graph, map_nodes
from qc.ir.node import Node, make
from qc.ir.quantized import QuantizedTensor, quantize_activation
from qc.ir.rewrite import with_inputs
from qc.ir.types import ActivationFormat, TensorType, symbol
from qc.passes.pipeline import Context, Pass
from qc.passes.prepare.position_axes import is_positionwise, position_axis
from qc.passes.prepare.trailing_logits import KEEP

PAST = symbol("past")


@dataclass(frozen=True)
class ExplicitCache(Pass):
    """Let every causal attention see the past through inputs, and return what it will need next.

        attention(q, k, v) causal  -->  attention(q, %K, %V) causal
                                        present_key_0 = %K = append(past_key_0, k)
                                        present_value_0 = %V = append(past_value_0, v)
        arange(seq)                -->  arange(seq, start=past)

    The graph stays as it is unless every attention is causal without a mask and nothing else
    mixes positions. Exact in float32 (with past = 0 the same, and then step by step); lossy in
    float16 and bfloat16: rounds keys and values; lossy with a `format`: rounds the keys and the
    values of each head to codes, with a scale for each head of a token. Pope et al. 2022, section
    3; Sheng et al. 2023 (FlexGen), section 5.
    """

    name: ClassVar[str] = "explicit_cache"
    dtype: torch.dtype = torch.float32
    format: ActivationFormat | None = None

    @property
    def exact(self) -> bool:  # type: ignore[override]  # depends on the option
        return self.dtype == torch.float32 and self.format is None

    def run(self, graph: Graph, context: Context) -> Graph:
        seq = causal_length(graph)
        if seq is None or not all(can_continue(node, seq) for node in graph.nodes):
            return graph
        return add_cache(graph, seq, self.dtype, self.format)


CACHES = {
    "f32": ExplicitCache(torch.float32),
    "f16": ExplicitCache(torch.float16),
    "bf16": ExplicitCache(torch.bfloat16),
    "int8": ExplicitCache(format=ActivationFormat(8)),
    "e4m3": ExplicitCache(format=ActivationFormat(8, kind="e4m3")),
}
"""How keys and values are kept, by name."""


def causal_length(graph: Graph) -> sympy.Symbol | None:
    """Return the one symbol that all attentions have as length of queries and keys; None where
    there is no such symbol or one of them sees more than its own past."""
    lengths: set[object] = set()
    for node in graph.nodes:
        if isinstance(node.op, ops.Attention):
            if not node.op.causal or len(node.inputs) != 3:
                return None
            lengths |= {i.tensor.shape[1] for i in node.inputs}
    length = lengths.pop() if len(lengths) == 1 else None
    return length if isinstance(length, sympy.Symbol) else None


def can_continue(node: Node, seq: sympy.Symbol) -> bool:
    """Say whether a node computes new positions from new positions, given the cache."""
    if isinstance(node.op, ops.Attention):
        return [position_axis(i, seq) for i in (node, *node.inputs)] == [1, 1, 1, 1]
    if is_trailing(node.op, seq) or is_positionwise(node, seq):
        return True
    return continued(node.op, node.inputs, seq) is not None


def continued(op: object, inputs: tuple[Node, ...], seq: sympy.Symbol) -> Node | None:
    """Return the positions of this call, or their part of a table, where `op` starts at a
    constant; None for any other op."""
    if isinstance(op, ops.Arange) and op.length == seq and isinstance(op.start, int):
        return make(replace(op, start=op.start + PAST))
    if not isinstance(op, ops.Slice) or position_axis(inputs[0], seq) is not None:
        return None
    if isinstance(op.start, int) and op.stop == op.start + seq and op.step == 1:
        return make(replace(op, start=op.start + PAST, stop=op.stop + PAST), *inputs)
    return None


def is_trailing(op: object, seq: sympy.Symbol) -> bool:
    """Say whether an op takes the last positions of this call."""
    return isinstance(op, ops.Slice) and op.start == seq - KEEP and op.stop == seq


def add_cache(
    graph: Graph, seq: sympy.Symbol, dtype: torch.dtype, format: ActivationFormat | None
) -> Graph:
    """Rebuild the graph with a pair of past inputs and present outputs for every attention."""
    past: list[Node] = []
    present: dict[str, Node] = {}

    def appended(name: str, new: Node) -> Node:
        batch, _, heads, dim = new.tensor.shape
        label = f"{name}_{len(present) // 2}"
        type = TensorType((batch, PAST, heads, dim), dtype, format)
        past.append(make(ops.Input(f"past_{label}", type)))
        present[f"present_{label}"] = make(ops.Append(), past[-1], new)
        return present[f"present_{label}"]

    def transform(node: Node, inputs: tuple[Node, ...]) -> Node:
        if isinstance(node.op, ops.Attention):
            q, k, v = inputs
            seen = (appended("key", k), appended("value", v))
            return make(node.op, q, *seen, origin=node.origin)
        return continued(node.op, inputs, seq) or with_inputs(node, inputs)

    rebuilt = map_nodes(graph, transform)
    return Graph(
        (*rebuilt.inputs, *past),
        (*rebuilt.outputs, *present.values()),
        (*rebuilt.output_names, *present),
    )


def empty_cache(graph: Graph, batch: int) -> dict[str, Any]:
    """Return what the past inputs of `graph` are before the first call, by label."""
    inputs = [n.op for n in graph.inputs if isinstance(n.op, ops.Input)]
    return {
        op.label: no_positions(op.type, batch)
        for op in inputs
        if op.type.rank == 4 and op.type.shape[1] == PAST
    }


def no_positions(type: TensorType, batch: int) -> torch.Tensor | QuantizedTensor:
    """Return a cache that holds nothing."""
    values = torch.zeros(batch, 0, *type.shape[2:], dtype=type.dtype)
    return values if type.format is None else quantize_activation(values, type.format)
