"""Activations in codes that a GPU does not multiply become floats where they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import substitute
from qc.passes.pipeline import Context, Pass
from qc.passes.stage import QUANTIZED, Stage


@dataclass(frozen=True)
class WidenActivations(Pass):
    """Round activations without storing codes where their codes would be multiplied as floats.

        linear(quantize(%x), %w)  -->  linear(fake_quantize(%x), %w)

    Exact.
    """

    name: ClassVar[str] = "widen_activations"
    requires: ClassVar[Stage] = QUANTIZED
    ensures: ClassVar[Stage] = QUANTIZED

    def run(self, graph: Graph, context: Context) -> Graph:
        gpu = context.target.gpu
        if gpu is None:
            return graph
        replacements: dict[Node, Node] = {}
        for codes in graph.nodes:
            if not isinstance(codes.op, ops.Quantize):
                continue
            format, channels = codes.op.format, int(codes.tensor.shape[-1])
            if gpu.multiplies(format, channels):
                continue
            origin = codes.origin.touched_by(self.name)
            floats = make(ops.FakeQuantize(format), *codes.inputs, origin=origin)
            for linear in graph.users[codes]:
                if isinstance(linear.op, ops.Linear):
                    origin = linear.origin.touched_by(self.name)
                    replacements[linear] = make(
                        linear.op, floats, *linear.inputs[1:], origin=origin
                    )
        return substitute(graph, replacements)
