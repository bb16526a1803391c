"""A compilation that stops goes on where it was, with the same bytes, or is refused."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qc
from qc.errors import ArtifactError, InputError
from qc.ir.weights.weight import Weight
from qc.passes.calibration import Calibration, Checkpoint
from qc.passes.quantize.calibrated import StoreByData
from qc.passes.quantize.gptq import Gptq
from qc.passes.quantize.sensitive_tables import SensitiveTables
from tests.passes.calibration.tiny import LENGTH, calibration, canonical, token_sequences
from tests.passes.quantize.test_gptq import stored
from tests.tiny_llama import llama_folder

PASSES = (Gptq("int3·g16·min + sparse1%"), SensitiveTables("lookup3·row + sparse1%", samples=2))


class Stopped(Exception):
    """In place of a signal."""


def kept_in(folder: Path, resume: bool) -> Calibration:
    return replace(calibration(), checkpoint=Checkpoint(folder / "kept", resume))


def same(first: dict[str, Weight], second: dict[str, Weight]) -> bool:
    return first.keys() == second.keys() and all(
        str(first[name].format) == str(second[name].format)
        and all(torch.equal(a, second[name].arrays()[k]) for k, a in first[name].arrays().items())
        for name in first
    )


@pytest.mark.parametrize("one", PASSES)
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_what_stops_goes_on(
    one: StoreByData, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = canonical()
    expected = stored(graph, one)
    calls = 0
    write = Checkpoint.write

    def write_some(self: Checkpoint, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise Stopped
        write(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "write", write_some)
        with pytest.raises(Stopped):
            stored(graph, one, kept_in(tmp_path, False))
    finished = list((tmp_path / "kept").rglob("*.weights"))
    assert len(finished) == stop
    before = {file: file.stat().st_mtime_ns for file in finished}
    whole, resumed = calibration(), kept_in(tmp_path, True)
    stored(graph, one, whole)
    assert same(expected, stored(graph, one, resumed))
    assert resumed.coverage == whole.coverage
    assert {file: file.stat().st_mtime_ns for file in finished} == before  # used, not made again


def test_all_finished_is_read_without_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, one = canonical(), PASSES[0]
    expected = stored(graph, one, kept_in(tmp_path, False))
    monkeypatch.setattr("qc.passes.calibration.walk.Walk.each_batch", None)
    assert same(expected, stored(graph, one, kept_in(tmp_path, True)))


def test_another_compilation_is_refused(tmp_path: Path) -> None:
    graph, one = canonical(), Gptq("int3·g16·min")
    stored(graph, one, kept_in(tmp_path, False))
    other = Calibration(token_sequences(seed=1), max_seq_length=LENGTH)
    other = replace(other, checkpoint=Checkpoint(tmp_path / "kept", True))
    with pytest.raises(ArtifactError, match="begun with another calibration data"):
        stored(graph, one, other)
    with pytest.raises(ArtifactError, match="begun with another model"):
        stored(canonical("mistral"), one, kept_in(tmp_path, True))
    # Another pass has a place of its own; and without --resume everything begins anew.
    expected = stored(graph, Gptq("int4·g16·min"))
    assert same(expected, stored(graph, Gptq("int4·g16·min"), kept_in(tmp_path, True)))
    stored(graph, one, replace(other, checkpoint=Checkpoint(tmp_path / "kept", False)))


def test_a_half_written_file_is_not_read(tmp_path: Path) -> None:
    graph, one = canonical(), PASSES[0]
    expected = stored(graph, one, kept_in(tmp_path, False))
    victims = sorted((tmp_path / "kept").rglob("*.weights"))
    for victim in victims[1:]:
        victim.replace(victim.with_suffix(".unfinished"))
        victim.with_suffix(".unfinished").write_bytes(b"torn")
    assert same(expected, stored(graph, one, kept_in(tmp_path, True)))


def test_only_a_compilation_with_a_place_is_resumed() -> None:
    with pytest.raises(InputError, match="with an output folder"):
        qc.compile("anything", resume=True)


SCRIPT = """
import sys
import qc
model, output, resume = sys.argv[1:]
texts = ["the cat sat on the mat and looked at the moon " * 40]
qc.compile(model, "torch-w4", recipe="gptq", bits=3, group_size=8, calibration=texts,
           num_calibration_samples=16, max_seq_length=32, output=output, resume=resume == "resume")
"""


def compile_apart(model: Path, output: Path, resume: bool) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(model), str(output), "resume" if resume else "anew"],
        cwd=Path(__file__).parents[3], env={**os.environ, "PYTHONPATH": "."},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_kill_9_leaves_nothing_half_and_resuming_gives_the_same_bytes(tmp_path: Path) -> None:
    model = llama_folder(tmp_path)
    start = time.monotonic()
    process = compile_apart(model, tmp_path / "whole.qc", False)
    assert process.wait() == 0, process.stderr and process.stderr.read()
    seconds = time.monotonic() - start

    def content(folder: Path) -> dict[str, bytes]:
        files = (file for file in folder.rglob("*") if file.is_file())
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    expected = content(tmp_path / "whole.qc")
    moments = random.Random(0)
    for number in range(10):
        output = tmp_path / f"{number}.qc"
        process = compile_apart(model, output, False)
        time.sleep(moments.uniform(0.3, 1.0) * seconds)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():  # there whole, or not at all
            assert content(output) == expected
            continue
        process = compile_apart(model, output, True)
        assert process.wait() == 0, process.stderr and process.stderr.read()
        assert content(output) == expected
        assert not list(tmp_path.glob(f".{number}.qc.unfinished"))
