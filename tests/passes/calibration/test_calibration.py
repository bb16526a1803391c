"""Statistics are what a plain evaluation of the whole graph gives, on any number of threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qc
from qc.errors import InputError, RecipeError
from qc.ir import ops, threads
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.node import Node
from qc.ir.weights.dense import dense_weight
from qc.ir.weights.weight import Weight
from qc.passes.calibration import (
    AbsMax,
    Calibration,
    Hessian,
    LinearGroup,
    Moments,
    Samples,
    Values,
    select_linears,
)
from qc.passes.calibration.calibration import inputs_of
from qc.passes.calibration.schedule import plan_steps
from qc.passes.pipeline import Pipeline
from qc.passes.quantize.gptq import Gptq
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.recipes.rounding import STORE_16
from tests.families import DECODERS
from tests.passes.calibration.tiny import LENGTH, calibration, canonical, linears, token_sequences


def values_at(graph: Graph, node: Node) -> Tensor:
    """Evaluate a graph as it is and return a value, for all sequences: the slow way."""
    seen: list[Tensor] = []
    for ids in token_sequences():
        batch = inputs_of(graph, ids.unsqueeze(0))
        evaluate(
            graph,
            batch,
            {"keep": LENGTH},
            lambda n, value: seen.append(value) if n is node else None,
        )
    return torch.cat(seen).flatten(0, -2)


@pytest.mark.parametrize("family", DECODERS)
def test_statistics_are_those_of_a_plain_evaluation(family: str) -> None:
    graph = canonical(family)
    found = calibration()
    for linear in linears(graph)[-3:]:
        x = linear.inputs[0]
        plain = values_at(graph, x).double()
        known = found.measure(graph, {x: (AbsMax(), Moments(), Hessian())})
        torch.testing.assert_close(known[x, AbsMax()].double(), plain.abs().amax(0))
        moments = known[x, Moments()]
        assert moments.tokens == len(plain)
        torch.testing.assert_close(moments.mean, plain.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.square, plain.square().mean(0), rtol=1e-4, atol=1e-8)
        expected = 2 / len(plain) * plain.T @ plain
        torch.testing.assert_close(known[x, Hessian()], expected, rtol=1e-4, atol=1e-6)


def test_samples_are_the_same_tokens_everywhere() -> None:
    graph = canonical()
    x = linears(graph)[0].inputs[0]
    found = calibration().measure(graph, {x: (Samples(2), Values(1))})
    plain = values_at(graph, x).view(-1, LENGTH, x.tensor.shape[-1])
    torch.testing.assert_close(found[x, Samples(2)], plain[:, [6, 18]].flatten(0, 1))
    (first,) = found[x, Values(1)]
    torch.testing.assert_close(first, plain[: len(first)])


def test_a_statistic_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = canonical()
    x = linears(graph)[0].inputs[0]
    found = calibration()
    first = found.measured(graph, x, Hessian())
    monkeypatch.setattr(Calibration, "batches", None)  # nothing is evaluated any more
    assert found.measured(graph, x, Hessian()) is first


def test_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = canonical()
    x = linears(graph)[-1].inputs[0]

    def measured(cpus: int, torch_threads: int) -> Tensor:
        monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(cpus)))
        torch.set_num_threads(torch_threads)
        found: Tensor = calibration().measured(graph, x, Hessian())
        return found

    before = torch.get_num_threads()
    try:
        results = [measured(1, 1), measured(3, 2), measured(2, 1)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], each) for each in results[1:])


@pytest.mark.parametrize("family", DECODERS)
def test_every_node_is_computed_once_and_little_is_kept(family: str) -> None:
    graph = canonical(family)
    steps = plan_steps([each.inputs[0]] for each in linears(graph))
    computed = [node for step in steps for node in step.nodes]
    assert len(computed) == len(set(computed))
    channels = [
        sum(n.tensor.shape[-1] for n in step.live if n.tensor.is_float and n.tensor.rank == 3)
        for step in steps[:-1]
    ]
    assert max(channels) <= 12 * 64  # one block's values, however many blocks there are


def test_a_sequential_visit_sees_earlier_errors_and_an_independent_one_does_not() -> None:
    graph = canonical()

    def visited(sequencing: Any) -> dict[Node, Tensor]:
        seen: dict[Node, Tensor] = {}

        def visit(group: LinearGroup, known: Any) -> dict[Node, Weight]:
            seen[group.x] = known[group.x, Hessian()]
            return {p: halved(p) for p in group.parameters}

        calibration().visit(graph, linears(graph), (Hessian(),), visit, sequencing)
        return seen

    plain, sequential = visited("independent"), visited("sequential")
    first, last = next(iter(plain)), list(plain)[-1]
    torch.testing.assert_close(plain[first], sequential[first])
    assert not torch.allclose(plain[last], sequential[last], rtol=0.1)
    expected = 2 * values_at(graph, last).T @ values_at(graph, last) / (12 * LENGTH)
    torch.testing.assert_close(plain[last].float(), expected, rtol=1e-3, atol=1e-6)


def halved(parameter: Node) -> Weight:
    """Return half a weight."""
    weight = parameter.op.weight  # type: ignore[attr-defined]
    return dense_weight(weight.name, weight.dense() / 2)


def test_gradients_are_those_of_autograd() -> None:
    graph = canonical()
    parameters = [each.inputs[1] for each in linears(graph)]
    found = calibration().gradients(graph, parameters, samples=6)
    module = graph.to_fx()
    held = dict(module.named_parameters())
    squares = {p: torch.zeros(p.tensor.shape) for p in parameters}
    for ids in token_sequences()[:6]:
        module.zero_grad()
        logits = module(**inputs_of(graph, ids.unsqueeze(0)), keep=LENGTH)["logits"][0]
        torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()
        for p in parameters:
            squares[p] += held[p.op.weight.name].grad.square() / 6  # type: ignore[attr-defined]
    for p in parameters:
        torch.testing.assert_close(found[p].square, squares[p], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_files_and_texts_give_the_same_sequences(tmp_path: Path, suffix: str) -> None:
    texts = ["one two three four", "five six seven", "eight nine"]
    file = tmp_path / f"data{suffix}"
    lines = "\n".join(json.dumps({"text": each}) for each in texts)
    file.write_text("\n\n".join(texts) if suffix == ".txt" else lines)

    def read(data: Any) -> list[list[int]]:
        one = Calibration(data, 3, 8).bound(canonical(), lambda t: [ord(c) for c in t], None)
        return [each.tolist() for each in one.sequences()]

    assert read(texts) == read(file) == read(str(file)) == read({"text": "\n\n".join(texts)})
    assert [len(each) for each in read(texts)] == [8, 8, 8]


def test_token_ids_are_taken_as_they_are() -> None:
    sequences = token_sequences(3, 10)
    for data in (sequences, [each.tolist() for each in sequences], torch.stack(sequences),
                 [{"input_ids": each} for each in sequences]):  # fmt: skip
        found = Calibration(data, 2, 7).sequences()
        assert [each.tolist() for each in found] == [each[:7].tolist() for each in sequences[:2]]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("missing.txt", "no such file"),
        ([], "holds no text and no tokens"),
        ([{"label": 3}], "not a record with label"),
        ([0.5], "not float '0.5'"),
    ],
)
def test_data_that_is_none_is_refused(data: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Calibration(data).sequences()


def test_the_model_writes_its_own_text() -> None:
    graph = canonical()
    texts = [
        Calibration(num_calibration_samples=5, max_seq_length=16, seed=seed)
        .bound(graph, None, 1)
        .sequences()
        for seed in (0, 0, 1)
    ]
    assert [tuple(each.shape) for each in texts[0]] == [(16,)] * 5
    assert all(int(each[0]) == 1 for each in texts[0])
    assert torch.equal(torch.stack(texts[0]), torch.stack(texts[1]))
    assert not torch.equal(torch.stack(texts[0]), torch.stack(texts[2]))


def test_text_of_the_model_follows_its_distribution() -> None:
    """Many second tokens: as often as the model says, five standard deviations at most."""
    graph = canonical()
    count = 600
    drawn = Calibration(num_calibration_samples=count, max_seq_length=2).bound(graph, None, 3)
    second = torch.stack(drawn.sequences())[:, 1]
    shares = torch.softmax(
        evaluate(graph, {"input_ids": torch.tensor([[3]])}, {"keep": 1})["logits"][0, 0], 0
    )
    frequency = torch.bincount(second, minlength=len(shares)) / count
    deviation = (shares * (1 - shares) / count).sqrt()
    assert bool(((frequency - shares).abs() < 5 * deviation + 1e-3).all())


def test_an_encoder_writes_no_text() -> None:
    with pytest.raises(InputError, match="writes no text"):
        Calibration().bound(canonical("bert"), None, 1).sequences()


def test_selectors() -> None:
    graph = canonical()
    everything = [*linears(graph), graph.output("logits")]

    def names(targets: tuple[str, ...], ignore: tuple[str, ...] = ()) -> set[str]:
        found = select_linears(graph, targets, ignore, everything)
        return {each.origin.module.split(".")[-1] for each in found}

    assert names(("linears",), ("head",)) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert names(("re:(up|down)_proj$",)) == {"up_proj", "down_proj"}
    assert names(("model.layers.*.mlp.up_proj",)) == names(("up_proj",)) == {"up_proj"}
    assert names(("mlp",), ("re:gate",)) == {"up_proj", "down_proj"}
    assert names(("cached",)) == {"k_proj", "v_proj"}
    assert len(select_linears(graph, ("ends:1",), (), everything)) == 14  # of two blocks, both
    for wrong in ("model.layers.0.self_attn.q_pro", "re:nothing"):
        with pytest.raises(RecipeError, match="matches none of the 15 linears"):
            names((wrong,))
        with pytest.raises(RecipeError, match="matches none"):
            names(("linears",), (wrong,))
    with pytest.raises(RecipeError, match="wants a number of blocks"):
        names(("ends:none",))


@pytest.mark.parametrize(
    ("family", "names"),
    [("gpt2", {"c_attn"}), ("bert", {"key", "value"}), ("mistral", {"k_proj", "v_proj"})],
)
def test_what_makes_keys_and_values_is_found_by_structure(family: str, names: set[str]) -> None:
    graph = canonical(family)
    found = select_linears(graph, ("cached",), (), linears(graph))
    assert {each.origin.module.split(".")[-1] for each in found} == names
    layers = sum(isinstance(node.op, ops.Attention) for node in graph.nodes)
    assert len({each.origin.module for each in found}) == layers * len(names)
    wide = Gptq("int2·g8·min", exceptions=(("ends:1", "int3·g8·min"),)).in_graph(graph)
    assert {str(wide.planned_format(each)) for each in wide.parameters(graph)} == {"int3·g8·min"}


class Conditioned(torch.nn.Module):
    """A model of several inputs, none of which is a sequence of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(5, 16)
        self.wide, self.out = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

    def forward(self, values: Tensor, label: Tensor) -> Tensor:
        mixed: Tensor = torch.nn.functional.gelu(self.wide(values + self.table(label)[:, None]))
        return torch.einsum("nhwc->nchw", self.out(mixed).unflatten(1, (2, 3)))


def records(*rows: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"values": torch.randn(n, 6, 16, generator=generator), "label": torch.arange(n) % 5}
        for n in rows
    ]


def test_inputs_by_name_calibrate_a_model_that_reads_no_tokens() -> None:
    torch.manual_seed(0)
    model = Conditioned()
    traced = qc.trace(model, records(2)[0]).canonicalize()
    assert not [n for n in traced.graph.nodes if isinstance(n.op, ops.Torch)]
    assert [str(n.type) for n in traced.graph.inputs] == ["f32[batch, 6, 16]", "i64[batch]"]
    data = records(4, 3, 5)
    passes = Pipeline((*STORE_16, Gptq("int3·g16·zero", ignore=()), RoundToNearest("f16")))
    found = traced.quantize(passes, calibration=Calibration(data, num_calibration_samples=6))
    assert {each.tokens for each in found.coverage.values()} == {6}  # rows: 4, and 2 of the next
    rounded = traced.quantize(Pipeline((*STORE_16, RoundToNearest("int3·g16·zero"))))
    asked = data[2]
    with torch.no_grad():
        expected = model(**asked)
    gptq, nearest = (each(**asked)["output"] for each in (found, rounded))
    assert gptq.shape == expected.shape == (5, 16, 2, 3)
    assert float((gptq - expected).norm()) < float((nearest - expected).norm())


def test_inputs_by_name_that_do_not_fit_are_refused() -> None:
    traced = qc.trace(Conditioned(), records(2)[0]).canonicalize()
    (given,) = records(4)

    def calibrate(data: Any) -> None:
        traced.quantize(
            Pipeline((Gptq("int3·g16·zero", ignore=()),)), calibration=Calibration(data)
        )

    with pytest.raises(InputError, match=r"input label .* is missing in .* record of values"):
        calibrate([{"values": given["values"]}])
    with pytest.raises(InputError, match=r"of one size, not of 4 \(values\), 2 \(label\)"):
        calibrate([{**given, "label": given["label"][:2]}])
    with pytest.raises(InputError, match=r"does not fit the model: input values has shape"):
        calibrate([{**given, "values": given["values"][:, :5]}])
    with pytest.raises(InputError, match="sequences of tokens"):
        Calibration([given]).sequences()
