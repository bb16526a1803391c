"""Bad input is answered by one clear sentence, before any long work, and never by a traceback."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qc
from qc.cli import main
from qc.errors import ContextLengthError, InputError, ModelError, QcError
from tests.tiny_llama import CONTEXT, llama_artifact, llama_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_artifact(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def artifact(place: Path) -> qc.Artifact:
    return qc.load(place)


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the model to damage."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an export fail: what is wrong with a source is said before."""

    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("the model was exported before its source was checked")

    monkeypatch.setattr("qc.frontends.torch_export.export", never)


def one_sentence(error: QcError) -> None:
    """Hold a message to what the house promises: one line, short enough to be read."""
    text = str(error)
    assert text.strip()
    assert "\n" not in text
    assert len(text) < 400


# ---------------------------------------------------------------- sources


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def scramble_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def misspell_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))


def widen_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))


def deepen_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**6}))


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (break_config, r"config\.json is no valid JSON"),
        (misspell_type, r'unknown model_type \'lama\' \(did you mean .*"llama"'),
        (deepen_config, r"announces 1000000 layers, but holds \d+ tensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no weights: expected model"),
        (truncate_weights, r"model\.safetensors is no intact safetensors file"),
        (scramble_header, r"model\.safetensors is no intact safetensors file"),
        (pickle_weights, r"pickle files, which can run any code"),
        (widen_config, r"transformers cannot load .*model"),
    ],
)
def test_a_damaged_folder_is_named(
    damaged: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    damage(damaged)
    with pytest.raises(ModelError, match=sentence) as caught:
        qc.trace(damaged)
    one_sentence(caught.value)
    with pytest.raises(ModelError, match=str(damaged)):
        qc.trace(str(damaged))


GGUF_HEADER = b"GGUF" + struct.pack("<IQQ", 3, 2, 1)


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"PK\x03\x04 not a model", GGUF_HEADER, GGUF_HEADER + b"\xff" * 64]
)
def test_a_gguf_file_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.gguf") as caught:
        qc.trace(file)
    one_sentence(caught.value)


@pytest.mark.usefixtures("no_export")
def test_missing_sources_are_named(tmp_path: Path) -> None:
    for source, sentence in [
        (tmp_path / "absent.gguf", r"absent\.gguf"),
        (str(tmp_path / "absent"), "there is no folder .*absent"),
        ("nobody/no-such-model", "neither a folder nor in the local cache"),
    ]:
        with pytest.raises(ModelError, match=sentence) as caught:
            qc.trace(source)
        one_sentence(caught.value)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match="is a file; a model is a folder"):
        qc.trace(tmp_path / "notes.txt")
    with pytest.raises(ModelError, match="not 7"):
        qc.trace(7)
    with pytest.raises(ModelError, match="Linear is no transformers model: give example inputs"):
        qc.trace(nn.Linear(2, 2))


def test_weights_that_are_no_numbers_are_named() -> None:
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    model[0].weight.data[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"'0\.weight' holds 1 values that are NaN"):
        qc.trace(model, (torch.zeros(2, 32),)).quantize("w4")


# ---------------------------------------------------------------- calls


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ([0.5, 1.5], r"input_ids"),
        (np.zeros((2, 3, 4), np.int64), r"input_ids"),
        ([[]], r"input_ids"),
        ([10**6], r"input_ids.*1000000"),
        ([-1], r"input_ids.*-1"),
        (["a"], r"input_ids"),
        (None, r"input_ids"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    artifact: qc.Artifact, inputs: Any, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        artifact(inputs)
    one_sentence(caught.value)
    assert artifact([5, 6, 7]).shape[0] == 3  # and the artifact is none the worse


def test_wrong_arguments_are_named(artifact: qc.Artifact) -> None:
    with pytest.raises(InputError, match=r'unknown \(did you mean "input_ids"\?\)'):
        artifact(input_idz=[1])
    with pytest.raises(InputError, match="2 inputs came; the model takes input_ids"):
        artifact([1], [1])
    with pytest.raises(InputError, match="'input_ids' is missing"):
        artifact()
    with pytest.raises(InputError, match="max_new_tokens must be 0 or more, not -1"):
        artifact.generate([1], -1)
    with pytest.raises(InputError, match="temperature"):
        artifact.generate([1], 1, temperature=-1.0)


def test_the_context_holds_so_many_tokens_and_no_more(artifact: qc.Artifact) -> None:
    assert artifact(np.zeros((1, CONTEXT), np.int64)).shape[1] == CONTEXT
    with pytest.raises(ContextLengthError, match=str(CONTEXT)):
        artifact(np.zeros((1, CONTEXT + 1), np.int64))
    assert len(artifact.generate([5] * (CONTEXT - 2), 2)) <= CONTEXT
    with pytest.raises(ContextLengthError, match=f"126 tokens of prompt and 3 new .*{CONTEXT}"):
        artifact.generate([5] * (CONTEXT - 2), 3)


# ---------------------------------------------------------------- the command line


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail, and return its one line."""
    assert main([str(each) for each in arguments]) == 1
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("qc: ")
    assert said.out.strip() == ""
    return lines[0]


def test_commands_answer_wrong_names(
    capsys: pytest.CaptureFixture[str], folder: Path, place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m"
    assert '"cpu-w4"' in answer(capsys, "compile", folder, "--target", "cpu-w44", "-o", out)
    assert "unknown recipe 'w5'" in answer(capsys, "compile", folder, "--recipe", "w5", "-o", out)
    assert "absent" in answer(capsys, "compile", tmp_path / "absent", "-o", out)
    assert '"quantized"' in answer(capsys, "inspect", place, "--ir", "quantised")
    assert "kernel source 'nothing'" in answer(capsys, "inspect", place, "--source", "nothing")
    assert "does not exist" in answer(capsys, "run", tmp_path / "absent", "x")
    assert "is not an artifact" in answer(capsys, "inspect", folder)
    assert not out.exists()


def test_compile_refuses_places_that_it_may_not_write(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    said = answer(capsys, "compile", folder, "-o", tmp_path / "file" / "m")
    assert "cannot write" in said
    assert "it is not overwritten" in answer(capsys, "compile", folder, "-o", folder)


def test_eval_refuses_texts_it_cannot_use(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path
) -> None:
    short, latin = tmp_path / "short.txt", tmp_path / "latin.txt"
    short.write_text("The cat sat.")
    latin.write_bytes("Überall schläft die Katze".encode("latin-1"))
    assert "less than one window of 512" in answer(capsys, "eval", place, "--text", short)
    assert "is not UTF-8 text" in answer(capsys, "eval", place, "--text", latin)
    absent = tmp_path / "absent.txt"
    assert "No such file" in answer(capsys, "eval", place, "--text", absent)
    assert "window" in answer(capsys, "eval", place, "--text", short, "--window", "-3")


def test_eval_refuses_windows_longer_than_the_context(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path
) -> None:
    text = tmp_path / "long.txt"
    text.write_text("The cat sat on the mat. " * 200)
    said = answer(capsys, "eval", place, "--text", text, "--no-reference", "--quiet")
    assert str(CONTEXT) in said


def test_run_refuses_prompts_beyond_the_context(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    assert str(CONTEXT) in answer(capsys, "run", place, "x" * 1000)
    assert "max_new_tokens" in answer(capsys, "run", place, "x", "-n", "-5")


def test_an_interrupt_is_said_in_a_sentence(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qc.loading.load", interrupt)
    assert main(["inspect", str(place)]) == 130
    assert "interrupted" in capsys.readouterr().err
