"""Script your own passes: a pipeline is ordinary Python over frozen dataclasses.

    python examples/pipeline.py

Builds a small random Llama, quantizes attention-sized matrices to 4 bits and the wide ones to 8,
looks at the result, and compiles it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qc
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import rewrite
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import Weight
from qc.passes.pipeline import Context
from qc.passes.prepare.explicit_cache import ExplicitCache
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.round_to_nearest import round_to_nearest
from qc.passes.stage import CANONICAL, QUANTIZED, Stage


@dataclass(frozen=True)
class BitsByWidth(qc.Pass):
    """Store linears with more than `wide` inputs in 8 bits, the others in 4.

        linear(%x, dense f32)  -->  linear(%x, int4·g32·min)

    Lossy: minimises the error of each weight by itself.
    """

    name: ClassVar[str] = "bits_by_width"
    requires: ClassVar[Stage] = CANONICAL
    ensures: ClassVar[Stage] = QUANTIZED
    exact: ClassVar[bool] = False
    wide: int = 64

    def run(self, graph: Graph, context: Context) -> Graph:
        return rewrite(graph, [self.rule()], self.name)

    def rule(self) -> Callable[[Node], Node | None]:
        def store(node: Node) -> Node | None:
            if not isinstance(node.op, ops.Linear) or not isinstance(
                node.inputs[1].op, ops.Parameter
            ):
                return None
            weight = node.inputs[1].op.weight
            if weight.bits_per_element < 16:
                return None
            format = parse_weights("int8·g32" if weight.shape[1] > self.wide else "int4·g32")
            terms = round_to_nearest(weight.dense(), format)
            stored = make(ops.Parameter(Weight(weight.name, weight.shape, terms)))
            return make(node.op, node.inputs[0], stored, *node.inputs[2:], origin=node.origin)

        return store


def main() -> None:
    """Run the stages one by one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    pipeline = qc.Pipeline(
        [ExplicitCache(torch.float16), BitsByWidth(wide=64), QuantizeActivations()]
    )

    captured = qc.trace(model)
    quantized = captured.quantize(pipeline)
    print("\n".join(str(quantized).splitlines()[:16]), "\n...\n")
    artifact = quantized.lower("cpu").build()
    print(artifact.report(), "\n")

    ids = torch.randint(0, 128, (1, 12))
    reference = quantized(input_ids=ids)["logits"]
    error = (artifact(ids) - reference).norm() / reference.norm()
    print(f"compiled code against the reference interpreter: relative error {error:.1e}")


if __name__ == "__main__":
    main()
