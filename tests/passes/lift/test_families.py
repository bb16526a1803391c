"""Every family is lifted whole, keeps its meaning, and generates step by step."""

import json
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.target import Target
from qc.passes.exactness import distance
from qc.passes.lift import LIFT
from qc.passes.pipeline import Context, Pipeline
from qc.passes.prepare import PREPARE
from qc.passes.prepare.explicit_cache import ExplicitCache, empty_cache
from qc.passes.prepare.trailing_logits import TrailingLogits
from tests.families import DECODERS, FAMILIES, WINDOW, captured

LENGTH = 2 * WINDOW + 5
STEPS = (WINDOW + 2, 1, 1, 4, LENGTH - WINDOW - 8)


def run(graph: Graph, *passes: object) -> Graph:
    return Pipeline(passes).run(graph, Context(Target("any", "any")))  # type: ignore[arg-type]


class Family:
    """One family: its captured and its lifted graph."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.captured = captured(name)
        self.lifted = run(self.captured, *PREPARE, *LIFT)

    def inputs(self) -> dict[str, Tensor]:
        if self.name == "vit":
            return {"pixel_values": torch.randn(2, 3, 32, 32)}
        return {"input_ids": torch.randint(0, 128, (2, LENGTH))}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


def counts(graph: Graph) -> dict[str, int]:
    """Count computing nodes by op; attention with what it hides."""
    leaves = (ops.Input, ops.Parameter, ops.Scalar)
    named = [n.op for n in graph.nodes if not isinstance(n.op, leaves)]
    whole = (ops.Attention, ops.Unary, ops.Binary, ops.GatedActivation, ops.Torch)
    return dict(sorted(Counter(str(op) if isinstance(op, whole) else op.name
                               for op in named).items()))  # fmt: skip


def test_lifted_counts(family: Family, golden: Callable[[str, str], None]) -> None:
    text = json.dumps(counts(family.lifted), indent=2)
    golden(f"lifted/{family.name}.json", text + "\n")


def test_lifting_keeps_the_meaning(family: Family) -> None:
    inputs = family.inputs()
    before, after = (evaluate(graph, inputs) for graph in (family.captured, family.lifted))
    assert max(distance(before[name], after[name]) for name in before) < 1e-5


def test_attention_reads_projections(family: Family) -> None:
    """No permute is left between the linears of a decoder, and no ATen call anywhere."""
    found = counts(family.lifted)
    assert not any(name.startswith("torch") for name in found)
    assert family.name == "vit" or "permute" not in found
    for node in family.lifted.nodes:
        for operand in node.inputs if isinstance(node.op, ops.Attention) else ():
            while isinstance(operand.op, ops.Rope | ops.RMSNorm):
                operand = operand.inputs[0]
            assert isinstance(operand.op, ops.Reshape)
            scaled = operand.inputs[0]
            source = scaled.inputs[0] if isinstance(scaled.op, ops.Binary) else scaled
            assert isinstance(source.op, ops.Linear)


def test_a_second_lifting_changes_nothing(family: Family) -> None:
    assert run(family.lifted, *LIFT).same_as(family.lifted)


def test_steps_give_what_the_whole_gives(family: Family) -> None:
    cached = run(family.lifted, TrailingLogits(), ExplicitCache())
    if family.name not in DECODERS:
        assert cached is family.lifted
        return
    ids = family.inputs()["input_ids"]
    expected = evaluate(family.captured, {"input_ids": ids})["logits"]
    past, done = empty_cache(cached, len(ids)), 0
    for length in STEPS:
        done += length
        results = evaluate(
            cached, {"input_ids": ids[:, done - length : done], **past}, {"keep": min(3, length)}
        )
        wanted = results.pop("logits")
        assert distance(expected[:, done - wanted.shape[1] : done], wanted) < 1e-5
        past = {name.replace("present", "past"): cache for name, cache in results.items()}
    assert done == LENGTH


def test_the_last_layer_ends_with_few_positions(family: Family) -> None:
    """Behind the last attention only the wanted positions are left, up to the logits."""
    if family.name not in DECODERS:
        return
    graph = run(family.lifted, TrailingLogits())
    attentions = [n for n in graph.nodes if isinstance(n.op, ops.Attention)]
    behind = {attentions[-1]}
    for node in graph.nodes:
        if any(operand in behind for operand in node.inputs):
            behind.add(node)
    keeping = [n for n in behind if isinstance(n.op, ops.Linear)]
    assert len(keeping) >= 2  # the output projection and the head, whatever lies between
    assert all(str(n.tensor.shape[1]) == "keep" for n in keeping)
