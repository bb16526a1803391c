"""Graphs as FX modules: the same values, gradients, printable and compilable code."""

import pytest
import torch

from qc.frontends.torch_export import capture
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.node import make
from qc.ir.target import parse_machine
from qc.ir.types import ActivationFormat, TensorType, TupleType, symbol
from qc.ir.weights.grouped import GroupedFormat
from qc.passes.lift import LIFT
from qc.passes.pipeline import Context, Pipeline
from qc.passes.plan import plan
from qc.passes.plan.fuse import Fuse
from qc.passes.prepare import PREPARE
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.round_to_nearest import RoundToNearest
from tests.families import build
from tests.ir.toys import block_graph, some_ids
from tests.passes.lift.drawing import BATCH, SEQ, graph, value

QUANTIZE = (RoundToNearest(GroupedFormat(4, 32)), QuantizeActivations(ActivationFormat(8, 32)))


GPU = parse_machine("cuda:sm_90")


def run(before: Graph, *passes: object) -> Graph:
    return Pipeline(passes).run(before, Context(GPU))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "passes", [(), QUANTIZE, (*QUANTIZE, Fuse()), (*QUANTIZE, *plan(GPU).passes)], ids=len
)
def test_the_module_computes_what_the_graph_means(passes: tuple[object, ...]) -> None:
    toy = run(block_graph(), *passes)
    module, inputs = toy.to_fx(), some_ids()
    expected = evaluate(toy, inputs)["logits"]
    assert torch.equal(module(**inputs)["logits"], expected)
    module.graph.lint()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_family_keeps_its_meaning(family: str) -> None:
    model = build(family)
    lifted = run(capture(model), *PREPARE, *LIFT)
    ids = torch.randint(0, 128, (2, 21))
    module = lifted.to_fx()
    sizes = {"keep": 21} if "keep" in {n.target for n in module.graph.nodes} else {}
    with torch.no_grad():
        torch.testing.assert_close(
            module(ids, **sizes)["logits"], model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_gradients_flow_to_dense_weights_and_leave_the_graph_alone() -> None:
    toy = block_graph()
    module, inputs = toy.to_fx(), some_ids()
    before = evaluate(toy, inputs)["logits"]
    module(**inputs)["logits"].square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    assert len(gradients) == len(toy.parameters)
    assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients.values())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(evaluate(toy, inputs)["logits"], before)


def test_coded_weights_are_buffers() -> None:
    toy = run(block_graph(), QUANTIZE[0])
    module = toy.to_fx()
    buffers = {name for name, _ in module.named_buffers()}
    assert {"q.weight", "down.weight"} <= buffers
    assert "norm1.weight" in dict(module.named_parameters())
    assert "embed.weight" in dict(module.named_parameters())
    assert "embed.weight_2" in buffers  # the head's own, coded copy of the tied table


def test_the_code_is_readable() -> None:
    code = run(block_graph(), *QUANTIZE).to_fx().code
    assert "rms_norm(" in code
    assert "quantize(" in code
    assert "bits = 8, group = 32" in code
    assert "causal = True" in code
    assert "size = ids.size(0)" in code


def test_calls_results_and_sizes() -> None:
    keep = symbol("keep")
    x = value("x", BATCH, SEQ)
    types = TupleType((TensorType((BATCH, 2)), TensorType((BATCH, 2), torch.int64)))
    best = make(ops.Torch("aten.topk.default", (ops.Operand(0), 2), (), types), x)
    flat = make(ops.Reshape((BATCH * SEQ,)), x)
    last = make(ops.Slice(1, SEQ - keep, SEQ), x)
    whole = graph(make(ops.Item(1), best), flat, last, names=("best", "flat", "last"))
    module, values = whole.to_fx(), torch.randn(3, 5)
    found = module(values, 2)
    expected = evaluate(whole, {"x": values}, {"keep": 2})
    assert all(torch.equal(found[name], expected[name]) for name in whole.output_names)
    assert [n.target for n in module.graph.nodes if n.op == "placeholder"] == ["x", "keep"]


def test_origins_are_kept_as_meta() -> None:
    origins = {n.meta.get("origin") for n in block_graph().to_fx().graph.nodes}
    assert {"q", "gate", "head"} <= origins


def test_torch_compile_takes_it_whole() -> None:
    toy = block_graph()
    compiled = torch.compile(toy.to_fx(), backend="eager", fullgraph=True)
    inputs = some_ids()
    torch.testing.assert_close(compiled(**inputs)["logits"], evaluate(toy, inputs)["logits"])
