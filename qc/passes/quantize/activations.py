"""Dynamic quantization of activations in front of linears with few-bit weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.ir.types import ActivationFormat
from qc.passes.pipeline import Context, Pass
from qc.passes.stage import QUANTIZED, Stage

INT8_GROUPS = ActivationFormat(8, 32)


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Let linears with weights below 16 bits read int8 activations, quantized at run time.

        linear(%x, int4)  -->  linear(quantize(%x), int4)

    Lossy: rounds each group of `format.group` channels of a token to its own scale. Linears that
    share an input share the quantized value. Dettmers et al. 2022 (LLM.int8), section 2, with
    groups in place of rows.
    """

    name: ClassVar[str] = "quantize_activations"
    requires: ClassVar[Stage] = QUANTIZED
    ensures: ClassVar[Stage] = QUANTIZED
    exact: ClassVar[bool] = False
    format: ActivationFormat = INT8_GROUPS

    def run(self, graph: Graph, context: Context) -> Graph:
        quantized: dict[Node, Node] = {}
        replacements: dict[Node, Node] = {}
        for node in graph.nodes:
            if not (isinstance(node.op, ops.Linear) and stored_in_few_bits(node.inputs[1])):
                continue
            x = node.inputs[0]
            if x.tensor.format is not None or not self.format.takes(x.tensor.shape[-1]):
                continue
            if x not in quantized:
                origin = x.origin.touched_by(self.name)
                quantized[x] = make(ops.Quantize(self.format), x, origin=origin)
            replacements[node] = make(
                node.op, quantized[x], *node.inputs[1:], origin=node.origin.touched_by(self.name)
            )
        return substitute(graph, replacements)


def stored_in_few_bits(parameter: Node) -> bool:
    """Say whether a linear's weight takes fewer than 16 bits an element, some of them codes: a
    branch of low rank in float16 is short, but reads its input as it is."""
    if not isinstance(parameter.op, ops.Parameter):
        return False
    weight = parameter.op.weight
    has_codes = any(not array.is_floating_point() for array in weight.arrays().values())
    return has_codes and weight.bits_per_element < 16
