"""Recipes that look at data go from the command line to generated kernels on a tiny llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import qc
from qc.cli import main
from qc.errors import FormatError
from qc.passes.calibration import Calibration
from qc.stages import CapturedModel, QuantizedModel
from tests.backends.triton.test_artifact import check_machine_code, lowering_of
from tests.backends.triton.test_kernels import MODEL, interpret
from tests.comparison import assert_close
from tests.families import model_of
from tests.passes.calibration.tiny import LENGTH, token_sequences
from tests.tiny_llama import TEXT, llama_folder

SIZES = {
    "gptq": {"bits": 3, "group_size": 8},
    "spqr": {},
    "squeezellm": {"bits": 3},
    "claq": {"bits": 2},
    "adadim": {"group_size": 8},
    "awq": {"bits": 3, "group_size": 8},
    "gwq": {"bits": 3, "group_size": 8},
    "lorc": {"bits": 3, "group_size": 8},
    "smoothquant_plus": {"group_size": 8},
    "w4a16": {"group_size": 8},
    "w4": {},
    "w3": {},
    "w2": {},
}

EIGHT_BITS = ("w4", "w3", "w2")
"""Recipes whose activations are codes of 8 bits on the way between kernels."""
CODES = 2e-2
"""A code on the other side of a border is off by one in 127: decision 008."""


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> CapturedModel:
    return qc.trace(llama_folder(tmp_path_factory.getbasetemp()))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SIZES)
def test_the_artifact_computes_what_the_quantized_graph_means(
    captured: CapturedModel, recipe: str
) -> None:
    data = Calibration(TEXT, num_calibration_samples=4, max_seq_length=32)
    quantized = captured.quantize(recipe, calibration=data, **SIZES[recipe])
    artifact = quantized.lower("cpu").build()
    ids = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    assert_close(quantized(input_ids=ids)["logits"], torch.as_tensor(artifact(ids)))
    summary = artifact.report().to_dict()["summary"]
    stored = sum(weight_bytes(p) for p in quantized.graph.parameters if p.tensor.rank == 2)
    assert summary["linear_bytes"] + summary["table_bytes"] == stored


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SIZES)
def test_the_gpu_form_computes_what_the_quantized_graph_means(
    tmp_path_factory: pytest.TempPathFactory, recipe: str
) -> None:
    """In Triton's interpreter: every kernel on known inputs, a prompt, tokens one by one."""
    folder = llama_folder(tmp_path_factory.getbasetemp())
    found = interpret("calibrated", recipe, str(folder), json.dumps(SIZES[recipe]))
    golden = {name: error for name, error in found.items() if name.startswith("golden")}
    assert len(golden) > 15
    assert {name: error for name, error in golden.items() if not error <= 1} == {}
    assert max(found["prompt"], found["steps"]) <= (CODES if recipe in EIGHT_BITS else MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SIZES)
def test_the_gpu_form_is_machine_code(captured: CapturedModel, recipe: str, tmp_path: Path) -> None:
    """Shared memory that the GPU has, parameters as they are passed, no spills."""
    data = Calibration(TEXT, num_calibration_samples=4, max_seq_length=32)
    quantized = captured.quantize(recipe, calibration=data, **SIZES[recipe])
    check_machine_code(lowering_of(quantized.graph, "cuda:sm_90"), "sm_90", tmp_path)


def test_data_changes_what_w4_does(captured: CapturedModel) -> None:
    """Without it rounds to the nearest, in seconds; the storage is the same."""
    data = Calibration(TEXT, num_calibration_samples=4, max_seq_length=32)
    alone, given = captured.quantize("w4"), captured.quantize("w4", calibration=data)
    assert not alone.coverage
    assert given.coverage
    assert formats(alone) == formats(given)
    asked = captured.quantize("w4", calibration=data, weights="trellis2·w10")
    assert not asked.coverage  # another format is rounded to, whatever the recipe does


def formats(model: QuantizedModel) -> list[str]:
    return [str(p.op.weight.format) for p in model.graph.parameters]  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["svdquant", "svdquant_a16"])
def test_branches_of_rank_32_compile(recipe: str) -> None:
    """On a model whose least matrix has so many rows: the one above has 28."""
    data = Calibration(token_sequences(), max_seq_length=LENGTH)
    model = qc.trace(model_of("llama"))
    quantized = model.quantize(recipe, calibration=data, group_size=16)
    ids = torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(0))
    artifact = quantized.lower("cpu").build()
    assert_close(quantized(input_ids=ids)["logits"], torch.as_tensor(artifact(ids)))


def test_a_rank_that_does_not_fit_is_refused(captured: CapturedModel) -> None:
    with pytest.raises(FormatError, match=r"rank 32 is more than 28 x 56 has.*rank28"):
        captured.quantize("svdquant_a16", calibration=Calibration(TEXT, 2, 16))


def weight_bytes(parameter: object) -> int:
    weight = parameter.op.weight  # type: ignore[attr-defined]
    return sum(a.numel() * a.element_size() for a in weight.arrays().values())


def test_the_command_line_calibrates(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama_folder(tmp_path_factory.getbasetemp())
    text = tmp_path / "data.txt"
    text.write_text(TEXT, encoding="utf-8")
    options = ["--recipe", "gptq", "--bits", "3", "--group-size", "8", "--calibration", str(text),
               "--num-calibration-samples", "4", "--max-seq-length", "32"]  # fmt: skip
    place = tmp_path / "llama.qc"
    command = ["compile", str(model), "--target", "torch-w4", "-o", str(place), *options]
    assert main(command) == 0
    assert "int3·g8·zero" in capsys.readouterr().out
    rows = qc.load(place).report().to_dict()["rows"]
    covered = [row for row in rows if row.get("tokens")]
    assert {row["format"] for row in covered} == {"int3·g8·zero"}
    assert all(0 < row["output_error"] < 1 for row in covered)
    first = (place / "weights.safetensors").read_bytes()
    assert not list(tmp_path.glob(".llama.qc.unfinished*"))
    assert main([*command, "--resume"]) == 0  # nothing is left to resume: it begins anew
    assert (place / "weights.safetensors").read_bytes() == first
    missing = [*options[:6], "--calibration", str(tmp_path / "no.txt"), *options[8:]]
    assert main(["compile", str(model), "--target", "torch-w4", "-o", str(place), *missing]) == 1
    assert "no.txt" in capsys.readouterr().err
