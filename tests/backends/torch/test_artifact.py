"""The reference backend behind the one `Artifact`: runs, generates, saves, loads, refuses."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qc
from qc.errors import ArtifactError, ContextLengthError, InputError, UnsupportedError
from qc.runtime import Artifact
from qc.runtime import load as load_native
from tests.families import DECODERS, FAMILIES, build

PROMPT = [5, 9, 17, 3, 44]
RECIPES = ("f32", "w8", "w4", "w4a16")


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return build("llama")


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def compiled(llama: nn.Module, recipe: str) -> Artifact:
    return qc.compile(llama, f"torch-{recipe}")


@pytest.fixture(scope="module")
def exact(llama: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return qc.compile(llama, "torch-f32", output=tmp_path_factory.mktemp("exact") / "model.qc")


def greedy(logits: Callable[[Tensor], Tensor], prompt: list[int], count: int) -> list[int]:
    """Continue a prompt without any cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids


# ---------------------------------------------------------------- running


def test_logits_are_those_of_the_quantized_graph(
    llama: nn.Module, compiled: Artifact, recipe: str
) -> None:
    ids = torch.randint(0, 128, (2, 13))
    reference = qc.trace(llama).quantize(recipe)(input_ids=ids)["logits"]
    torch.testing.assert_close(compiled(ids), reference, rtol=1e-5, atol=1e-5)


def test_generation_follows_the_logits_of_whole_prompts(
    llama: nn.Module, compiled: Artifact, recipe: str
) -> None:
    quantized = qc.trace(llama).quantize(recipe)
    expected = greedy(lambda ids: quantized(input_ids=ids)["logits"], PROMPT, 10)
    assert compiled.generate(PROMPT, 10) == expected
    assert list(compiled.stream(PROMPT, 10)) == expected[len(PROMPT) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_transformers_computes(family: str) -> None:
    model = build(family)
    artifact = qc.compile(model, "torch-f32")
    label = artifact.manifest.inputs[0]
    given = torch.randn(2, 3, 32, 32) if family == "vit" else torch.randint(3, 128, (2, 21))
    with torch.no_grad():
        expected = model(**{label: given})
    reference = expected.logits if family in DECODERS else expected[0]
    found = artifact(given)
    assert float((found - reference).norm() / reference.norm()) < 1e-4
    if family in DECODERS:
        with torch.no_grad():
            ids = greedy(lambda ids: model(input_ids=ids).logits, PROMPT, 12)
        assert artifact.generate(PROMPT, 12, stop_tokens=()) == upto_end(ids, artifact)


def upto_end(ids: list[int], artifact: Artifact) -> list[int]:
    """Cut after the first end mark that is not in the prompt."""
    assert artifact.manifest.generate is not None
    for at in range(len(PROMPT), len(ids)):
        if ids[at] in artifact.manifest.generate.eos:
            return ids[: at + 1]
    return ids


def test_sessions_prefill_step_and_rewind(exact: Artifact) -> None:
    session = exact.session()
    first = session.prefill(PROMPT)
    whole = exact(torch.tensor([PROMPT]))[0]
    np.testing.assert_allclose(first[0], whole[-1].numpy(), rtol=1e-5, atol=1e-5)
    after = session.step(7).copy()
    session.rewind(len(PROMPT))
    np.testing.assert_array_equal(session.step(7), after)
    session.rewind(2)
    again = session.prefill(PROMPT[2:])
    np.testing.assert_allclose(again, first, rtol=1e-5, atol=1e-5)


def test_chunks_of_a_prompt_make_no_difference(exact: Artifact) -> None:
    whole = exact.generate(PROMPT, 6)
    assert exact.generate(PROMPT, 6, chunk=2) == whole


def test_rows_of_a_batch_are_independent(exact: Artifact) -> None:
    other = [1, 2, 3, 4, 6]
    both = exact.generate([PROMPT, other], 5)
    assert both == [exact.generate(PROMPT, 5), exact.generate(other, 5)]


def test_sampling_follows_the_seed(exact: Artifact) -> None:
    one, same, other = (exact.generate(PROMPT, 12, temperature=1.5, seed=s) for s in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: a([999]), InputError, "holds 999; it takes 0 to 127"),
        (lambda a: a.generate(PROMPT, 1000), ContextLengthError, "holds 64"),
        (lambda a: a(pixels=[1]), InputError, "'pixels' is unknown"),
        (lambda a: a.source("linear"), InputError, "no kernel source"),
        (lambda a: a.ir("plan"), InputError, "no stage 'plan'"),
    ],
)
def test_wrong_calls_are_answered(
    exact: Artifact, call: Callable[[Artifact], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(exact)


def test_the_report_and_the_stages_are_there(exact: Artifact) -> None:
    assert "model.layers.0.self_attn.q_proj.weight" in str(exact.report())
    assert {"captured", "canonical", "quantized", "log"} <= set(exact.stages)
    assert "attention" in exact.ir("quantized")
    profile = str(exact.profile(new_tokens=2))
    assert "prefill" in profile
    assert "linear" in profile


# ---------------------------------------------------------------- models of other kinds


class Best(nn.Module):
    """Something that no pass understands."""

    def forward(self, x: Tensor) -> Tensor:
        values, index = torch.topk(torch.special.erfcx(x.abs()), 3)
        return values.cumprod(-1) + index


class Scores(nn.Module):
    """A model with half-precision results."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).to(torch.bfloat16)


def test_calls_that_nothing_understands_run_and_are_reported(tmp_path: Path) -> None:
    x = torch.randn(4, 7)
    artifact = qc.compile(Best(), "torch-f32", example_inputs={"x": x}, output=tmp_path / "best.qc")
    torch.testing.assert_close(artifact(x), Best()(x))
    assert any("topk" in each["op"] for each in artifact.manifest.report["on_torch"])
    torch.testing.assert_close(qc.load(tmp_path / "best.qc")(x[:2]), Best()(x[:2]))
    with pytest.raises(UnsupportedError, match="does not generate"):
        artifact.generate([1])


def test_bfloat16_results_come_as_float32() -> None:
    model, x = Scores(), torch.randn(4, 8)
    found = qc.compile(model, "torch-f32", example_inputs={"x": x})(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model(x).float(), rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------- files


def test_a_saved_artifact_is_the_same(compiled: Artifact, tmp_path: Path) -> None:
    loaded = qc.load(compiled.save(tmp_path / "copy.qc"), verify=True)
    assert loaded.generate(PROMPT, 8) == compiled.generate(PROMPT, 8)
    ids = torch.tensor([PROMPT])
    assert torch.equal(loaded(ids), compiled(ids))
    assert loaded.manifest == compiled.manifest


def test_weights_are_stored_in_their_formats(llama: nn.Module, tmp_path: Path) -> None:
    sizes = {}
    for recipe in RECIPES:
        path = tmp_path / recipe
        qc.compile(llama, f"torch-{recipe}", output=path)
        sizes[recipe] = (path / "weights.safetensors").stat().st_size
    assert sizes["w4"] == sizes["w4a16"] < sizes["w8"] < sizes["f32"]


def test_the_runtime_alone_names_what_loads_it(exact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"runs on torch: load it with qc\.load"):
        load_native(exact.path)


Edit = Callable[[Path], object]


def edit_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Edit:
    """Change a JSON file; the manifest's sizes follow."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        edit(content)
        raw = json.dumps(content).encode()
        (folder / name).write_bytes(raw)
        if name != "manifest.json":
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["files"][name]["bytes"] = len(raw)
            (folder / "manifest.json").write_text(json.dumps(manifest))

    return apply


EDITS: dict[str, tuple[Edit, str]] = {
    "no graph": (lambda f: (f / "graph.json").unlink(), "has no file graph.json"),
    "cut": (lambda f: (f / "graph.json").write_bytes(b"{"), "is corrupt: it has 1 bytes"),
    "unlisted": (edit_json("manifest.json", lambda m: m["files"].pop("graph.json")),
                 "lists no graph.json"),
    "no weights": (edit_json("manifest.json", lambda m: m["files"].pop("weights.safetensors")),
                   "lists no weights.safetensors"),
    "executor": (edit_json("manifest.json", lambda m: m.update(executor="vulkan")),
                 "needs the executor 'vulkan'"),
    "steps": (edit_json("manifest.json", lambda m: m["steps"].append(
        {"kernel": "k", "args": [], "reads": [], "writes": []})), "takes no steps"),
    "native": (edit_json("manifest.json", lambda m: m.update(executor="native")),
               "no step writes the output 'logits'"),
    "values": (edit_json("manifest.json", lambda m: m["values"][0].update(below=5)),
               "does not describe the model of graph.json"),
    "newer": (edit_json("graph.json", lambda g: g.update(version=7)), "has version 7"),
    "cycle": (edit_json("graph.json", lambda g: g["nodes"][5].update(inputs=[9999])),
              "does not stand before it"),
    "operator": (edit_json("graph.json", lambda g: g["nodes"].append(
        {"op": {"is": "Torch", "overload": "prim.exec.default", "args": []}})), "may not call"),
    "weights": (lambda f: (f / "weights.safetensors").write_bytes(b"x" * 9), "is corrupt"),
    "empty": (lambda f: (f / "manifest.json").write_bytes(b""), "is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_damaged_artifacts_are_refused_in_one_sentence(
    exact: Artifact, tmp_path: Path, edit: Edit, message: str
) -> None:
    folder = exact.save(tmp_path / "damaged.qc")
    edit(folder)
    with pytest.raises(ArtifactError, match=re.escape(message)) as caught:
        qc.load(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        qc.load(tmp_path / "nowhere")


def test_nothing_is_left_where_writing_fails(llama: nn.Module, tmp_path: Path) -> None:
    def interrupt(step: str, fraction: float) -> None:
        if step == "write weights":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qc.compile(llama, "torch-f32", output=tmp_path / "model.qc", progress=interrupt)
    assert not list(tmp_path.iterdir())
