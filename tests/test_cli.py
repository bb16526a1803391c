"""The commands on a tiny llama folder, as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qc
from qc.cli import STAGES, main
from qc.passes.recipes.rounding import INT4
from tests.tiny_llama import TEXT, byte_level_tokenizer, llama_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def compiled(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Compile in a process of its own; return the artifact and what was said."""
    place = tmp_path_factory.mktemp("cli") / "llama.qc"
    arguments = ["compile", str(folder), "--target", "cpu-w4", "-o", str(place)]
    done = subprocess.run(
        [sys.executable, "-m", "qc", *arguments], capture_output=True, text=True, check=False
    )
    return place, done


@pytest.fixture(scope="module")
def place(compiled: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return compiled[0]


def say(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that succeeds, and return what it prints."""
    assert main([str(each) for each in arguments]) == 0
    return capsys.readouterr().out


def test_compile_shows_what_became_of_every_layer(
    compiled: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    place, done = compiled
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    q_proj = next(row for row in rows if row and row[0].endswith("q_proj.weight"))
    # 56 columns are two groups, each with two codes of 8 bits; the row has their two float16
    # factors: 4 + 64/56 bits.
    assert "linear" in q_proj
    assert INT4 in q_proj
    assert q_proj[-2:] == ["5.143", "2,016"]
    summary = qc.load(place).report().to_dict()["summary"]
    assert f"{summary['linear_bytes']:,}" in done.stdout
    assert "bits_per_linear_weight" in done.stdout
    assert "nothing stayed on torch" in done.stdout
    assert re.search(rf"{place}: \d+\.\d MB, compiled in \d+\.\d s", done.stdout)


def test_a_quiet_compile_says_nothing(
    capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    arguments = ["compile", str(folder), "--target", "torch-w4", "-o", str(tmp_path / "m")]
    assert main([*arguments, "--quiet"]) == 0
    assert capfd.readouterr().out == ""
    qc.load(tmp_path / "m", verify=True)


def test_a_recipe_may_differ_from_the_targets(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    arguments = ("compile", folder, "--target", "torch-f32", "--recipe", "w8", "-o", tmp_path / "m")
    assert "int8·g32" in say(capsys, *arguments)


def test_run_streams_the_text_that_generate_gives(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    artifact = qc.load(place)
    prompt = "The cat sat on"
    ids = artifact.text.encode(prompt)
    new = artifact.generate(ids, 12)[len(ids) :]
    expected = artifact.text.decode(ids + new)[len(prompt) :]
    assert say(capsys, "run", place, prompt, "-n", 12).removesuffix("\n") == expected


def test_run_draws_by_its_seed(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    options = ("run", place, "The cat", "-n", 8, "--temperature", 1.5, "--top-k", 40)
    first, again, other = (say(capsys, *options, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other


def test_run_chats_with_the_models_template(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    artifact = qc.load(place)
    ids = artifact.text.encode_chat("Where is the cat?")
    expected_prompt = "<|user|>Where is the cat?<|end|><|assistant|>"
    assert artifact.text.decode(ids, special_tokens=True) == expected_prompt
    assert ids == byte_level_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Where is the cat?"}], add_generation_prompt=True
    )["input_ids"]  # fmt: skip
    chat = say(capsys, "run", place, "Where is the cat?", "--chat", "-n", 8)
    assert chat.strip() == "".join(artifact.stream_text("Where is the cat?", 8, chat=True)).strip()
    assert chat != say(capsys, "run", place, "Where is the cat?", "-n", 8)


def test_run_prints_times_on_demand(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    assert main(["run", str(place), "The cat", "-n", "4", "--stats", "--threads", "1"]) == 0
    assert "first text after" in capsys.readouterr().err


def test_eval_compares_with_the_original(
    capsys: pytest.CaptureFixture[str], place: Path, folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3, encoding="utf-8")
    options = ("eval", place, "--text", text, "--window", 32, "--windows", 4, "--quiet")
    whole = say(capsys, *options)
    numbers = {
        line[:22].strip(): float(re.search(r"[\d.]+", line[22:])[0])  # type: ignore[index]
        for line in whole.splitlines()
    }
    assert numbers["perplexity"] == pytest.approx(numbers["perplexity, original"], rel=0.2)
    assert 0 < numbers["KL divergence"] < 0.1
    assert 50 < numbers["same top token"] <= 100
    assert "(124 tokens)" in whole
    assert say(capsys, *options, "--reference", folder) == whole
    alone = say(capsys, *options, "--no-reference")
    assert alone.strip() in whole
    assert "original" not in alone


def test_inspect_shows_the_report(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    assert say(capsys, "inspect", place).strip() == str(qc.load(place).report())


def test_inspect_shows_every_stage(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    shown = {stage: say(capsys, "inspect", place, "--ir", stage) for stage in STAGES}
    assert "aten.linear.default" in shown["captured"]
    assert "rms_norm" in shown["canonical"]
    assert "aten" not in shown["canonical"]
    assert INT4 in shown["quantized"]
    assert "fused" in shown["planned"]
    assert "round_to_nearest" in shown["log"]


def test_inspect_shows_the_plan_and_the_code_of_its_kernels(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    plan = say(capsys, "inspect", place, "--plan")
    kernels = dict.fromkeys(re.findall(r" = (\w+)\(", plan))
    assert len(plan.splitlines()) == len(qc.load(place).manifest.steps)
    assert kernels
    for kernel in kernels:
        assert "@T.prim_func" in say(capsys, "inspect", place, "--source", kernel)


def test_inspect_times_every_kernel_of_the_plan(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    profile = say(capsys, "inspect", place, "--profile")
    plan = say(capsys, "inspect", place, "--plan")
    kernels = set(re.findall(r" = (\w+)\(", plan))
    assert "prefill" in profile
    assert "decode" in profile
    assert {word for word in profile.split() if word in kernels} == kernels


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("compile", "run", "eval", "inspect"))


def test_explain_measures_or_reads(
    folder: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20, encoding="utf-8")
    data = ["--calibration", text, "--max-seq-length", 32, "--num-calibration-samples", 4]
    page, target = tmp_path / "page.html", "torch-w2_rtn"
    options = ["--target", target, *data, "--quiet"]
    measured = json.loads(say(capsys, "explain", folder, *options, "--json", "--html", page))
    assert "<svg" in page.read_text(encoding="utf-8")

    kept = tmp_path / "explained.qc"
    assert say(capsys, "compile", folder, *options, "--explain", "-o", kept) == ""
    figures = json.loads(say(capsys, "explain", kept, "--json"))
    assert figures["layers"] == measured["layers"]
    assert figures["layers"][0]["divergence"] > 0
    assert json.loads(json.dumps(qc.load(kept).explain().to_dict())) == figures
    said = say(capsys, "explain", kept)
    assert "round_to_nearest" in said
    assert "KL from the original" in said

    assert main(["explain", str(place)]) == 1
    assert "--explain" in capsys.readouterr().err
