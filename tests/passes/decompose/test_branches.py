"""A branch reads its input whole while the rest reads codes."""

import torch

import qc
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.node import Node
from qc.ir.types import ActivationFormat
from qc.passes.decompose.branches import SplitBranches
from qc.passes.decompose.low_rank import SplitLowRank
from qc.passes.exactness import relative_difference
from qc.passes.pipeline import Pipeline
from qc.passes.prepare.explicit_cache import ExplicitCache
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.round_to_nearest import RoundToNearest
from tests.families import model_of
from tests.passes.calibration.tiny import canonical, context

INT4 = ActivationFormat(4, 16)
SPLIT = (SplitLowRank("rank4", targets=("re:down",)), SplitBranches())
STORE = (RoundToNearest("int4·g16"), QuantizeActivations(INT4))


def test_a_branch_is_a_linear_of_its_own() -> None:
    before, data = canonical(), context()
    after = Pipeline(SPLIT).run(before, data)
    assert relative_difference(before, after) < 2e-6
    added = sum(isinstance(n.op, ops.Linear) for n in after.nodes) - sum(
        isinstance(n.op, ops.Linear) for n in before.nodes
    )
    assert added == 2  # one a layer


def test_the_branch_reads_floats() -> None:
    after = Pipeline((*SPLIT, *STORE)).run(canonical(), context())
    formats = {
        str(n.inputs[1].op.attributes()): n.inputs[0].tensor.format
        for n in after.nodes
        if isinstance(n.op, ops.Linear) and "down" in n.origin.module
    }
    assert formats == {"int4·g16": INT4, "rank4": None}


def test_a_branch_saves_what_coarse_activations_lose() -> None:
    """Full rank: everything goes through the branch, and nothing is left to lose."""
    before, data = canonical(), context()
    only = SplitLowRank("rank32·factors(dense f32)", targets=("re:k_proj",))
    plain = RoundToNearest("int4·g16")
    after = Pipeline((only, SplitBranches(), plain, QuantizeActivations(INT4))).run(before, data)
    values = [first_keys(graph) for graph in (before, after)]
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-3)


def first_keys(graph: Graph) -> torch.Tensor:
    """Return what the first layer's linear of keys computes."""
    found: list[torch.Tensor] = []

    def watch(node: Node, value: torch.Tensor) -> None:
        if node.origin.module.endswith("layers.0.self_attn.k_proj") and value.ndim == 3:
            found.append(value)

    evaluate(graph, {"input_ids": torch.arange(12).unsqueeze(0)}, {"keep": 12}, watch)
    return found[-1]


def test_a_branched_model_compiles() -> None:
    passes = (
        SplitLowRank("rank4"),
        SplitBranches(),
        RoundToNearest("int4·g32·min"),
        ExplicitCache(torch.float16),
        QuantizeActivations(ActivationFormat(8, 32)),
    )
    quantized = qc.trace(model_of("llama")).quantize(Pipeline(passes))
    ids = torch.randint(0, 128, (1, 9))
    expected = quantized(input_ids=ids)["logits"]
    found = quantized.lower("cpu").build()(ids)
    assert float((found - expected).norm() / expected.norm()) < 2e-2
