"""GPTQ as a pass: which linears, which formats, and what it is worth on every layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qc.errors import FormatError, RecipeError
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.weights.weight import Weight
from qc.passes.calibration import Calibration, Hessian
from qc.passes.pipeline import Context, Pass
from qc.passes.quantize.error_feedback import output_error
from qc.passes.quantize.gptq import Gptq, repairing
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.transform.linears import values_of
from qc.stages import resolve_recipe
from tests.passes.calibration.tiny import calibration, canonical, context, linears

FORMAT = "int3·g16·zero"


def stored(graph: Graph, one: Pass, found: Calibration | None = None) -> dict[str, Weight]:
    """Run a pass; return the weights of the linears by name."""
    after = one.run(graph, context(found))
    held = (n.inputs[1].op for n in after.nodes if isinstance(n.op, ops.Linear))
    return {op.weight.name: op.weight for op in held if isinstance(op, ops.Parameter)}


def errors(graph: Graph, weights: dict[str, Weight]) -> dict[str, float]:
    """Return tr(E H E^T) of every linear of the blocks, H of the original activations."""
    known = calibration().measure(graph, {n.inputs[0]: (Hessian(),) for n in linears(graph)})
    found = {}
    for linear in linears(graph):
        name = linear.inputs[1].op.weight.name  # type: ignore[attr-defined]
        difference = (values_of(linear) - weights[name].dense()).float()
        found[name] = output_error(difference.T, known[linear.inputs[0], Hessian()].float())
    return found


def test_every_layer_loses_less_than_by_rounding() -> None:
    graph = canonical()
    nearest = errors(graph, stored(graph, RoundToNearest(FORMAT)))
    found = errors(graph, stored(graph, Gptq(FORMAT, sequencing="independent")))
    assert len(found) == 14
    assert all(found[name] < nearest[name] for name in found)


def test_the_head_stays_and_the_rest_is_stored() -> None:
    graph = canonical()
    weights = stored(graph, Gptq(FORMAT))
    formats = {name: str(weight.format) for name, weight in weights.items()}
    assert formats.pop("lm_head.weight") == "dense f32"
    assert set(formats.values()) == {FORMAT}
    weights = stored(graph, Gptq(FORMAT, targets=("mlp",), ignore=("re:down",)))
    assert {n.split(".")[-2] for n, w in weights.items() if str(w.format) == FORMAT} == {
        "gate_proj", "up_proj"
    }  # fmt: skip
    with pytest.raises(RecipeError, match="matches none of the 15 linears"):
        stored(graph, Gptq(FORMAT, targets=("re:attn.qkv",)))


def test_exceptions_have_formats_of_their_own() -> None:
    graph = canonical()
    one = Gptq(FORMAT, exceptions=(("v_proj", "int5·g16·zero"), ("re:layers.1.*down", "int4·row")))
    weights = stored(graph, one)
    found = {name.removesuffix(".weight"): str(w.format) for name, w in weights.items()}
    assert found["model.layers.0.self_attn.v_proj"] == "int5·g16·zero"
    assert found["model.layers.1.mlp.down_proj"] == "int4·row"
    assert found["model.layers.0.mlp.down_proj"] == FORMAT
    with pytest.raises(RecipeError, match="'w_proj' matches none"):
        Gptq(FORMAT, exceptions=(("w_proj", "int4·row"),)).preview(graph)


def test_coverage_and_errors_are_reported() -> None:
    graph, data = canonical(), calibration()
    stored(graph, Gptq(FORMAT), data)
    assert len(data.coverage) == 14
    assert all(each.tokens == data.tokens() for each in data.coverage.values())
    assert all(0 < (each.error or 0) < 0.2 for each in data.coverage.values())


@pytest.mark.parametrize(
    "text",
    ["int3·g16·min + sparse1%", "int3·g16 + rank4", "rank4 + int2·g16·min", "lookup3·row",
     "int3·o16·zero", "int4·tensor", "int3·g24·min"],
)  # fmt: skip
def test_any_sum_with_a_term_that_rounds_by_columns(text: str) -> None:
    graph = canonical()
    one = Gptq(text)
    weights = stored(graph, one)
    nearest = errors(graph, stored(graph, RoundToNearest(text)))
    found = errors(graph, stored(graph, Gptq(text, sequencing="independent")))
    for name in found:
        assert str(weights[name].format) == one.format
    assert sum(found.values()) < sum(nearest.values())
    planned = one.preview(graph)
    assert planned is not None
    assert planned.same_as(one.run(graph, context()))


def test_formats_without_columns_are_refused() -> None:
    with pytest.raises(FormatError, match="no term that GPTQ can round"):
        Gptq("rank4")
    with pytest.raises(FormatError, match="act_order needs static_groups"):
        stored(canonical(), Gptq(FORMAT, static_groups=False))
    with pytest.raises(FormatError, match="cannot be stored as"):
        Gptq("int3·g16 + rank4000").run(canonical(), context())


def test_groups_fitted_as_they_come_store_no_index() -> None:
    graph = canonical()
    for one in (Gptq(FORMAT, act_order=False, static_groups=False), Gptq(FORMAT)):
        weight = stored(graph, one)["model.layers.0.mlp.down_proj.weight"]
        assert set(weight.arrays()) == {"0.codes", "0.scale", "0.zero"}


def test_a_pass_without_data_says_so() -> None:
    from qc.ir.target import Target

    with pytest.raises(RecipeError, match="pass gptq looks at data"):
        Gptq(FORMAT).run(canonical(), Context(Target("any", "any")))


def test_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from qc.ir import threads

    def result(cpus: int, torch_threads: int) -> dict[str, Weight]:
        monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(cpus)))
        torch.set_num_threads(torch_threads)
        return stored(canonical(), Gptq(FORMAT, ranges="mse", refinements=1))

    before = torch.get_num_threads()
    try:
        first, second = result(1, 1), result(3, 2)
    finally:
        torch.set_num_threads(before)
    for name, weight in first.items():
        for array, values in weight.arrays().items():
            assert torch.equal(values, second[name].arrays()[array]), (name, array)


def test_recipes_take_sizes_and_formats() -> None:
    def format_of(**options: Any) -> str:
        passes = resolve_recipe("gptq", **options).passes
        return next(one.format for one in passes if isinstance(one, Gptq))

    assert format_of() == "int4·g128·zero"
    assert format_of(bits=3, group_size=64) == "int3·g64·zero"
    assert format_of(weights="int2·g32·min + rank8", bits=3) == "int3·g32·min + rank8"
    with pytest.raises(RecipeError, match="stores no codes"):
        resolve_recipe("f32", bits=3)


def test_sequential_repairs_what_independent_leaves() -> None:
    """On the outputs of the whole model, against the original: the point of seeing errors."""
    from qc.ir.meaning import evaluate
    from qc.passes.calibration.calibration import inputs_of
    from tests.passes.calibration.tiny import LENGTH, token_sequences

    graph = canonical()
    batch = inputs_of(graph, torch.stack(token_sequences()))
    expected = evaluate(graph, batch, {"keep": LENGTH})["logits"]

    def distance(**options: Any) -> float:
        after = Gptq("int2·g16·min", **options).run(graph, context())
        found = evaluate(after, batch, {"keep": LENGTH})["logits"]
        return float((found - expected).norm() / expected.norm())

    independent, sequential, repaired = (
        distance(sequencing="independent"), distance(), distance(repair=0.5, damping=0.05)
    )  # fmt: skip
    assert repaired < sequential < independent


def test_without_drift_there_is_nothing_to_repair() -> None:
    """The first group sees the inputs of the original: its weights are stored as without repair."""
    graph = canonical()
    plain, repaired = (stored(graph, Gptq(FORMAT, repair=r)) for r in (0.0, 1.0))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(plain[name].dense(), repaired[name].dense())
    later = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(plain[later].dense(), repaired[later].dense())


def test_repairing_solves_for_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=generator, dtype=torch.float64)
    mix = torch.eye(8) + 0.2 * torch.randn(8, 8, generator=generator, dtype=torch.float64)
    y, w = x @ mix, torch.randn(5, 8, generator=generator, dtype=torch.float64)
    change = repairing(2 / 300 * x.T @ x, 2 / 300 * (y - x).T @ x, 0.0)
    torch.testing.assert_close(x @ (w + w @ change).T, y @ w.T)
