"""Every figure of an explanation, against the same figure computed another way."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import pytest
import torch
from rich.console import Console

from qc.errors import ArtifactError
from qc.explaining.divergence import divergence_of
from qc.explaining.explain import ExplainOptions, explain
from qc.explaining.layers import layers_of
from qc.explaining.page import explanation_page
from qc.explaining.suggest import alternatives, rounding_error, storable, suggest
from qc.explaining.terminal import show
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.node import make
from qc.ir.rewrite import substitute
from qc.passes.calibration import Hessian
from qc.passes.decompose.branches import SplitBranches
from qc.passes.decompose.low_rank import SplitLowRank
from qc.passes.pipeline import Pass, Pipeline
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.transform.awq import AwqScales
from qc.passes.transform.clip_weights import ClipWeights
from qc.passes.transform.fold_scales import FoldScales
from qc.passes.transform.rotate_stream import RotateStream
from qc.runtime.explanation import Explanation, read_explanation
from tests.passes.calibration.tiny import canonical, context

INT2 = RoundToNearest("int2·g16·min", heads=False)
OPTIONS = ExplainOptions(sequences=12, divergence_tokens=20, suggestions=2)


def explained(*passes: Pass, options: ExplainOptions = OPTIONS) -> tuple[Graph, Explanation]:
    return explain(canonical(), Pipeline(passes), context(), options)


@pytest.fixture(scope="module")
def rounded() -> tuple[Graph, Explanation]:
    return explained(INT2)


def test_layers_are_those_that_changed_the_worst_first(rounded: tuple[Graph, Explanation]) -> None:
    _, found = rounded
    assert len(found.layers) == 14  # seven in each of two blocks; the head stays
    losses = [layer.divergence for layer in found.layers]
    assert losses == sorted(losses, key=lambda loss: -(loss or 0.0))
    names = [layer.name for layer in found.in_order()]
    assert names[0] == "model.layers.0.self_attn.q_proj.weight"
    assert all(layer.bits_before == 32 for layer in found.layers)
    assert found.bits == pytest.approx(2 + 32 / 16)


def test_errors_are_what_they_say(rounded: tuple[Graph, Explanation]) -> None:
    after, found = rounded
    before, stored = layers_of(canonical()), layers_of(after)
    data = context().calibration
    assert data is not None
    for layer in found.layers:
        values = before[layer.name].values()
        error = stored[layer.name].values() - values
        assert layer.weight_error == pytest.approx(float(error.norm() / values.norm()), rel=1e-5)
        hessian = data.measured(canonical(), before[layer.name].x, Hessian()).float()
        squares = [float((e @ hessian * e).sum()) for e in (error, values)]
        expected = (squares[0] / squares[1]) ** 0.5
        assert layer.output_error == pytest.approx(expected, rel=1e-3)


def test_a_divergence_is_of_one_layer_alone(rounded: tuple[Graph, Explanation]) -> None:
    """Replace one weight in the graph, evaluate all of it, and compare."""
    after, found = rounded
    before, stored = layers_of(canonical()), layers_of(after)
    data = context().calibration
    assert data is not None
    ids = {"input_ids": data.sequences()[0][:20].unsqueeze(0)}
    reference = evaluate(canonical(), ids, {"keep": 20})["logits"]
    for layer in (found.layers[0], found.layers[-1]):
        (linear,) = before[layer.name].linears
        (quantized,) = stored[layer.name].linears
        changed = make(linear.op, linear.inputs[0], quantized.inputs[1])
        alone = substitute(canonical(), {linear: changed})
        expected = divergence_of(reference, evaluate(alone, ids, {"keep": 20})["logits"])
        assert layer.divergence == pytest.approx(expected, rel=1e-3, abs=1e-9)
    whole = evaluate(after, ids, {"keep": 20})["logits"]
    assert found.divergence == pytest.approx(divergence_of(reference, whole), rel=1e-4)


def test_weights_are_compared_in_the_basis_in_which_they_are_stored() -> None:
    """A rotation in front changes every weight, and costs nothing."""
    _, rotated = explained(RotateStream(), INT2)
    assert all(layer.weight_error < 0.5 for layer in rotated.layers)
    _, late = explained(ClipWeights("int2·g16·min"), RotateStream(), INT2)
    assert all(layer.weight_error < 0.6 for layer in late.layers)


def test_every_pass_that_loses_something_is_a_step() -> None:
    format = "int2·g16·min"
    _, found = explained(AwqScales(format, grid=3), FoldScales(), ClipWeights(format), INT2)
    steps = {layer.name: [step.name for step in layer.steps] for layer in found.layers}
    for name, passes in steps.items():
        is_clipped = not name.endswith(("q_proj.weight", "k_proj.weight"))
        assert passes == ["clip_weights"] * is_clipped + ["round_to_nearest"]
    by_pass = found.by_pass()
    assert [row["pass"] for row in by_pass] == ["clip_weights", "round_to_nearest"]
    assert by_pass[0]["bits"] == 32
    assert by_pass[1]["output error"] > by_pass[0]["output error"] > 0


def test_branches_belong_to_their_layer() -> None:
    graph, found = explained(SplitLowRank("rank4"), SplitBranches(), INT2)
    assert len(found.layers) == 14
    assert {layer.stored for layer in found.layers} == {"int2·g16·min + rank4"}
    (first, second) = layers_of(graph)[found.layers[0].name].linears
    assert isinstance(first.op, ops.Linear)
    assert second.inputs[1] is not first.inputs[1]
    plain = {layer.name: layer for layer in explained(INT2)[1].layers}
    better = [layer.weight_error < plain[layer.name].weight_error for layer in found.layers]
    assert all(better)


def test_divergences_can_be_left_out() -> None:
    _, found = explained(INT2, options=ExplainOptions(divergence_tokens=0, suggestions=0))
    assert found.divergence is None
    errors = [layer.output_error for layer in found.layers]
    assert errors == sorted(errors, reverse=True)
    assert not any(layer.suggestion for layer in found.layers)


def test_nothing_lost_is_nothing_explained() -> None:
    _, found = explained(RotateStream())
    assert found.layers == ()
    assert "No layer" in explanation_page(found)


def test_a_suggestion_is_the_most_for_its_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    values, x = torch.randn(32, 64, generator=generator), torch.randn(96, 64, generator=generator)
    values[3, 5] = values[17, 40] = 60.0  # two outliers spoil two groups
    text = suggest(values, x, "int3·g64·min")
    words, factor = text.split(": error x")
    chosen = dict(alternatives("int3·g64·min"))[words]
    known, other = (storable(each, values) for each in ("int3·g64·min", chosen))
    assert known is not None
    assert other is not None
    ratio = rounding_error(values, x, other) / rounding_error(values, x, known)
    assert float(factor.split()[0]) == pytest.approx(ratio, abs=0.006)
    assert ratio < 0.97
    assert suggest(torch.zeros(4, 64), x, "int3·g64·min") == ""
    assert suggest(values, x, "no format") == ""


def test_only_the_worst_get_suggestions(rounded: tuple[Graph, Explanation]) -> None:
    _, found = rounded
    assert all(layer.suggestion for layer in found.layers[:2])
    assert not any(layer.suggestion for layer in found.layers[2:])


def test_json_round_trip(rounded: tuple[Graph, Explanation]) -> None:
    _, found = rounded
    content = json.loads(json.dumps(found.to_dict()))
    assert read_explanation(content) == found
    for damage in ({"layers": None}, {"tokens": "many"}, {"layers": [{"name": "x"}]}):
        with pytest.raises(ArtifactError, match="damaged"):
            read_explanation({**content, **damage})
    del content["recipe"]
    with pytest.raises(ArtifactError, match="damaged"):
        read_explanation(content)


class Page(HTMLParser):
    """Count tags; collect everything that would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "line", "wbr"):
            self.open.append(tag)
        self.loaded += [str(v) for name, v in attrs if name in ("src", "href", "srcset", "data")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(rounded: tuple[Graph, Explanation]) -> None:
    _, found = rounded
    text = explanation_page(found)
    page = Page(text)
    assert page.open == []
    assert page.loaded == []
    assert "http" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert page.tags.count("svg") == 4
    assert page.tags.count("rect") == 3 * 14 + 1
    assert page.tags.count("tr") == 15
    assert found.layers[0].name in text


def test_the_page_has_a_column_for_every_pass_that_loses_something() -> None:
    format = "int2·g16·min"
    _, found = explained(ClipWeights(format), INT2)
    text = explanation_page(found)
    assert '<th class="number">output error, clip_weights</th>' in text
    assert '<th class="number">output error, round_to_nearest</th>' in text
    steps = next(layer.steps for layer in found.layers if len(layer.steps) == 2)
    cells = [f'<td class="number">{step.output_error:.4g}</td>' for step in steps]
    assert "".join(cells) in text


def test_the_page_escapes_names(rounded: tuple[Graph, Explanation]) -> None:
    _, found = rounded
    named = replace(found.layers[0], name="<script>alert(1)</script>")
    text = explanation_page(replace(found, layers=(named,), source="<b>"))
    assert "<script>" not in text
    assert "<b>" not in text


def test_the_terminal_shows_the_worst(rounded: tuple[Graph, Explanation]) -> None:
    _, found = rounded
    screen = Console(record=True, width=200, file=StringIO())
    show(found, screen, limit=3)
    text = screen.export_text()
    assert found.layers[0].name in text
    assert found.layers[5].name not in text
    assert "11 layers that lose less" in text
    assert "round_to_nearest" in text
    assert found.headline().splitlines()[0] in text
    assert found.layers[0].name in str(found)
