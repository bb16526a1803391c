"""From a model to an artifact: the same numbers, whole or not at all, the same bytes again."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qc
from qc.errors import ArtifactError, RecipeError, TargetError, UnsupportedError
from qc.passes.exactness import distance
from qc.stages import CapturedModel
from tests.comparison import assert_close, assert_equal_up_to_flips
from tests.families import DECODERS, FAMILIES, WINDOW, build, first_output, inputs
from tests.test_packaging import BLOCK_IMPORTS
from tests.tiny_llama import llama_artifact, llama_folder

RAGGED = {
    "hidden_size": 56, "n_embd": 56, "word_embed_proj_dim": 56,
    "intermediate_size": 72, "n_inner": 72, "ffn_dim": 72,
}  # fmt: skip
"""No multiple of 32, so that every matrix has a tail group, and every vector loop a tail."""

LENGTHS = (5, 2 * WINDOW + 5)
PROMPT, NEW = WINDOW - 2, 2 * WINDOW  # starts within a sliding window, ends beyond two of them
QUICK = {"llama", "gpt2", "gemma2", "gpt_neox", "bert", "vit"}
"""Of the quantized families; the others differ from these in little and are marked slow."""

FLOAT_TOLERANCE = 1e-4  # the issue's; measured: 5e-7


def sorted_by_cost(families: dict[str, Any]) -> list[Any]:
    """Mark as slow what the quick families cover."""
    slow = pytest.mark.slow
    return [pytest.param(f, marks=() if f in QUICK else slow) for f in families]


@functools.cache
def ragged_model(family: str) -> nn.Module:
    """Build a random model that never ends a text by itself."""
    sizes = {name: size for name, size in RAGGED.items() if name in FAMILIES[family]}
    if family == "gpt2":  # its configuration has a default for the width of the MLP
        sizes["n_inner"] = RAGGED["n_inner"]
    model: nn.Module = build(family, **sizes)
    model.config.eos_token_id = None
    if family in DECODERS:
        model.generation_config.eos_token_id = None
    return model


@functools.cache
def captured_family(family: str) -> CapturedModel:
    return qc.trace(ragged_model(family))


def assert_computes_the_model(artifact: qc.Artifact, family: str) -> None:
    for batch in (1, 2):
        for length in LENGTHS:
            values = inputs(family, batch, length)
            expected = first_output(ragged_model(family), values)
            assert distance(expected, artifact(**values)) < FLOAT_TOLERANCE, (batch, length)


def assert_generates_as_transformers(artifact: qc.Artifact, family: str) -> None:
    """Compare token by token, up to a draw between the two likeliest tokens."""
    ids = inputs(family, 2, PROMPT)["input_ids"]
    generated = artifact.generate(ids, NEW)
    model: Any = ragged_model(family)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
        output_logits=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    assert generated.shape == (2, PROMPT + NEW)
    for row, wanted in enumerate(expected.sequences):
        for step in range(NEW):
            if generated[row, PROMPT + step] != wanted[PROMPT + step]:
                best, second = expected.logits[step][row].topk(2).values
                assert best - second < 1e-5, f"row {row} differs from token {step} on"
                break
    assert torch.equal(generated[:, : PROMPT + 1], expected.sequences[:, : PROMPT + 1])


# ---------------------------------------------------------------- families


@pytest.mark.parametrize("family", FAMILIES)
def test_cpu_code_computes_what_transformers_computes(family: str) -> None:
    artifact = captured_family(family).quantize("f32").lower("cpu").build()
    assert artifact.report().to_dict()["on_torch"] == []
    assert_computes_the_model(artifact, family)
    assert (artifact.manifest.generate is not None) == (family in DECODERS)
    if family in DECODERS:
        assert_generates_as_transformers(artifact, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_torch_target_computes_what_transformers_computes(family: str) -> None:
    artifact = captured_family(family).quantize("f32").lower("torch").build()
    assert_computes_the_model(artifact, family)
    if family in DECODERS:
        assert_generates_as_transformers(artifact, family)


@pytest.mark.parametrize(
    ("recipe", "compare"),
    [
        pytest.param("w4", assert_equal_up_to_flips, id="w4"),
        pytest.param("w4a16", assert_close, id="w4a16"),
    ],
)
@pytest.mark.parametrize("family", sorted_by_cost(FAMILIES))
def test_cpu_code_computes_what_the_quantized_graph_means(
    family: str, recipe: str, compare: Callable[[Tensor, Tensor], None]
) -> None:
    quantized = captured_family(family).quantize(recipe)
    artifact = quantized.lower("cpu").build()
    report = artifact.report().to_dict()
    assert report["on_torch"] == []
    assert report["summary"]["linears"] > 0
    for length in LENGTHS:
        values = inputs(family, 8, length)
        expected = next(iter(quantized(**values).values()))
        compare(expected, artifact(**values))
    if family in DECODERS:  # token by token, with caches, is the same function
        session, ids = artifact.session(batch=8), values["input_ids"]
        last = session.prefill(ids[:, :PROMPT].numpy())
        for tokens in ids[:, PROMPT:].T.tolist():
            last = session.step(tokens)
        compare(expected[:, -1], torch.as_tensor(last))


def test_quantized_weights_change_the_numbers() -> None:
    """What the tests above compare is not the float model by another name."""
    values = inputs("llama", 1, 9)
    expected = first_output(ragged_model("llama"), values)
    assert distance(expected, captured_family("llama").quantize("w4")(**values)["logits"]) > 0.01


# ---------------------------------------------------------------- ops that qc does not know


class Pick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values, places = torch.topk(x, 5)
        return values + places.to(x.dtype)


class PickInTheMiddle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.pick, self.down = nn.Linear(24, 40), Pick(), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.up(x)
        return self.down(self.pick(y)), y


class Unchanged(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs()


@pytest.mark.parametrize("target", ["cpu-f32", "torch-f32"])
def test_an_unknown_op_runs_on_torch_and_the_report_names_it(target: str) -> None:
    model = PickInTheMiddle().eval()
    artifact = qc.compile(model, target, example_inputs=(torch.randn(3, 24),))
    x = torch.randn(4, 24)
    assert distance(model(x)[0].detach(), artifact(x)) < FLOAT_TOLERANCE
    named = {"op": "aten.topk.default", "origin": "pick"}
    assert artifact.report().to_dict()["on_torch"] == [named]
    assert "aten.topk.default" in str(artifact.report())


def test_an_unknown_op_runs_between_quantized_linears() -> None:
    model = PickInTheMiddle().eval()
    quantized = qc.trace(model, (torch.randn(3, 24),)).quantize("w4")
    artifact = quantized.lower("cpu").build()
    x = torch.randn(4, 24)
    assert_equal_up_to_flips(quantized(x=x)["output"], artifact(x))


def test_an_output_may_be_an_input() -> None:
    artifact = qc.compile(Unchanged(), "cpu-f32", example_inputs=(torch.randn(3, 16),))
    x = torch.randn(2, 16)
    assert torch.equal(artifact(x), x)


def test_complex_numbers_are_refused_with_their_origin() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Spectrum())
    with pytest.raises(
        UnsupportedError, match=r"values of torch.complex64 cannot be captured"
    ) as caught:
        qc.trace(model, (torch.randn(3, 16),))
    assert caught.value.origin == "1"


# ---------------------------------------------------------------- whole or not at all


class Interrupt(BaseException):
    """An interruption that nothing but a test catches."""


def interrupt_at(step: str, error: type[BaseException]) -> Callable[[str, float], None]:
    """Return a progress function that raises when a step begins."""

    def progress(name: str, fraction: float) -> None:
        if name.startswith(step):
            raise error(step)

    return progress


@pytest.fixture
def small() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8)).eval()


EXAMPLE = {"example_inputs": (torch.zeros(3, 24),)}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interrupt])
@pytest.mark.parametrize("step", ["capture", "round_to_nearest", "quantize", "write weights"])
def test_an_interrupted_compile_leaves_nothing_new(
    small: nn.Module, tmp_path: Path, step: str, error: type[BaseException]
) -> None:
    earlier = qc.compile(small, "torch-f32", output=tmp_path / "m", **EXAMPLE)
    x = torch.randn(2, 24)
    expected = earlier(x)
    for place in ("m", "absent"):
        with pytest.raises(error):
            qc.compile(
                small, "torch-w4", output=tmp_path / place, progress=interrupt_at(step, error),
                **EXAMPLE,
            )  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    assert torch.equal(qc.load(tmp_path / "m", verify=True)(x), expected)


@pytest.mark.parametrize("step", ["compile kernels", "write weights"])
def test_an_interrupted_native_compile_leaves_nothing(
    small: nn.Module, tmp_path: Path, step: str
) -> None:
    progress = interrupt_at(step, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        qc.compile(small, "cpu-w4", output=tmp_path / "m", progress=progress, **EXAMPLE)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys, torch, qc

def progress(step, fraction):
    if step == "write weights":
        os.kill(os.getpid(), signal.SIGKILL)

model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8)).eval()
example = (torch.zeros(3, 24),)
qc.compile(model, "torch-w8", output=sys.argv[1], progress=progress, example_inputs=example)
"""


def test_a_killed_compile_leaves_the_earlier_artifact(small: nn.Module, tmp_path: Path) -> None:
    earlier = qc.compile(small, "torch-f32", output=tmp_path / "m", **EXAMPLE)
    x = torch.randn(2, 24)
    for place in ("m", "absent"):
        command = [sys.executable, "-c", KILLED, str(tmp_path / place)]
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "absent").exists()
    assert torch.equal(qc.load(tmp_path / "m", verify=True)(x), earlier(x))


def never(*arguments: Any, **named: Any) -> Any:
    raise AssertionError("the model was captured before the arguments were checked")


@pytest.fixture
def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any capture fail: what these tests refuse is refused before."""
    monkeypatch.setattr("qc.compiler.open_model", never)


@pytest.mark.usefixtures("no_capture")
def test_foreign_folders_are_refused_before_the_model_is_captured(
    small: nn.Module, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(ArtifactError, match="is not an artifact; it is not overwritten"):
        qc.compile(small, "cpu-w4", output=tmp_path / "photos", **EXAMPLE)
    with pytest.raises(ArtifactError, match="is not a folder"):
        qc.compile(small, "cpu-w4", output=tmp_path / "photos" / "cat.jpg", **EXAMPLE)
    with pytest.raises(ArtifactError, match="cannot write"):
        qc.compile(small, "cpu-w4", output=tmp_path / "photos" / "cat.jpg" / "m", **EXAMPLE)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"


@pytest.mark.usefixtures("no_capture")
def test_unknown_names_are_answered_before_the_model_is_captured(small: nn.Module) -> None:
    with pytest.raises(TargetError, match=r'did you mean .*"cpu-w4"'):
        qc.compile(small, "cpuw4", **EXAMPLE)
    with pytest.raises(RecipeError, match=r'did you mean .*"w4a16"'):
        qc.compile(small, "cpu-w4", recipe="w4a61", **EXAMPLE)


# ---------------------------------------------------------------- what is on disk


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact of the tiny llama for cpu-w4."""
    return llama_artifact(tmp_path_factory.getbasetemp())


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file of a folder, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_saving_keeps_every_bit(llama: Path, tmp_path: Path) -> None:
    once = qc.load(llama).save(tmp_path / "once")
    twice = qc.load(once, verify=True).save(tmp_path / "twice")
    assert contents(llama) == contents(once) == contents(twice)


def test_a_built_artifact_survives_its_temporary_folder(small: nn.Module, tmp_path: Path) -> None:
    artifact = qc.compile(small, "torch-w4", **EXAMPLE)
    x = torch.randn(2, 24)
    expected, place = artifact(x), artifact.path
    artifact.save(tmp_path / "kept")
    del artifact
    assert not place.exists()
    assert torch.equal(qc.load(tmp_path / "kept")(x), expected)


@pytest.mark.fast_rules  # the other process has them
def test_compiling_again_gives_the_same_bytes(
    llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In another process, so that no order of a hash table can agree by luck."""
    base = tmp_path_factory.getbasetemp()
    again = base / "again.qc"
    code = "import qc, sys; qc.compile(sys.argv[1], 'cpu-w4', output=sys.argv[2])"
    command = [sys.executable, "-c", code, str(llama_folder(base)), str(again)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    first, second = contents(llama), contents(again)
    differing = [name for name in first if first[name] != second.get(name)]
    assert not differing
    assert first.keys() == second.keys()


RUN_BLOCKED = """
import json
import qc
artifact = qc.load(PLACE)
print(json.dumps([artifact.generate([5, 6, 7], 12, stop_tokens=()), artifact([5, 6, 7]).tolist()]))
"""


def test_an_artifact_runs_where_no_compiler_is_installed(llama: Path) -> None:
    libraries = ["torch", "transformers", "tvm", "tvm_ffi", "triton", "networkx", "gguf", "sympy"]
    code = f"BLOCKED = {libraries}\nPLACE = {str(llama)!r}\n{BLOCK_IMPORTS}\n{RUN_BLOCKED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    artifact = qc.load(llama)
    expected = [artifact.generate([5, 6, 7], 12), artifact([5, 6, 7]).tolist()]
    assert json.loads(done.stdout) == expected


def test_code_for_another_machine_is_refused(llama: Path, tmp_path: Path) -> None:
    place = qc.load(llama).save(tmp_path / "m")
    manifest = json.loads((place / "manifest.json").read_text())

    def with_target(**facts: object) -> None:
        changed = {**manifest, "target": {**manifest["target"], **facts}}
        (place / "manifest.json").write_text(json.dumps(changed))

    with_target(features=[*manifest["target"]["features"], "amx_fp99"])
    with pytest.raises(ArtifactError, match="built for a CPU with amx_fp99; this machine has not"):
        qc.load(place)
    with_target(arch="s390x")
    with pytest.raises(ArtifactError, match="built for s390x; this machine is"):
        qc.load(place)


def test_two_artifacts_and_many_threads_do_not_disturb_each_other(
    llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp()
    artifacts = [qc.load(llama), qc.load(llama_artifact(base, "cpu-f32"))]
    prompts = [[5, 6, 7], list(range(3, 40))]
    jobs = [(artifact, prompt) for artifact in artifacts for prompt in prompts]
    expected = [artifact.generate(prompt, 16) for artifact, prompt in jobs]
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        artifact, prompt = jobs[number % len(jobs)]
        found[number] = artifact.generate(prompt, 16)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3 * len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(threads))] == expected * 3
    assert expected[0] != expected[2] or expected[1] != expected[3]  # they are two models


def test_the_models_end_mark_ends_a_text() -> None:
    model = build("llama")
    model.generation_config.eos_token_id = None
    free = qc.compile(model, "torch-f32").generate([5, 6, 7], 8)
    model.generation_config.eos_token_id = free[5]
    ended = qc.compile(model, "torch-f32").generate([5, 6, 7], 8)
    assert ended == free[: 1 + free.index(free[5], 3)]
