"""The 135M model says the same on ARM as here: token by token, on every instruction set."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import qc
from qc.compiler import build
from qc.runtime import Artifact
from tests.backends.device.cross import emulator
from tests.needs import needs

pytestmark = [pytest.mark.slow, needs("model")]

TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "Dear Sir or Madam,",
    "The three most important inventions of the nineteenth century were",
    "Question: What is photosynthesis?\nAnswer:",
    "1, 1, 2, 3, 5, 8,",
    "Il était une fois",
    "In this paper we show that quantized neural networks",
)


@cache
def place_of(base: Path, model: Path, target: str) -> Path:
    """Build a package once a process."""
    place = base / target.replace(":", "_")
    build(model, target, place)
    return place


@pytest.fixture(scope="module")
def artifact(offgrid_model: Path) -> Artifact:
    return qc.compile(offgrid_model, "cpu-w4")


def continuation(artifact: Artifact, ids: list[int]) -> list[int]:
    """Return the greedy tokens of the artifact, up to the end of text."""
    session = artifact.session()
    logits, found = session.prefill(ids), []
    ends = set(artifact.manifest.generate.eos) if artifact.manifest.generate else set()
    while len(found) < TOKENS:
        token = int(np.argmax(logits[0]))
        if token in ends:
            break
        found.append(token)
        logits = session.step(token)
    return found


def run_package(place: Path, ids: list[int], command: list[str]) -> list[int]:
    """Return the greedy tokens of a package's runner."""
    words = [str(place / "runner"), str(place / "weights.qcw"), " ".join(map(str, ids)), "--ids"]
    words += ["-n", str(TOKENS), "--context", "256", "--threads", "2"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def different(place: Path, artifact: Artifact, command: list[str]) -> list[str]:
    """Return the prompts that a package continues in another way."""
    found = []
    for prompt in PROMPTS:
        ids = artifact.text.encode(prompt)
        expected, got = continuation(artifact, ids), run_package(place, ids, command)
        if got != expected:
            same = next(
                (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b),
                min(len(got), len(expected)),
            )
            found.append(f"{prompt!r} after {same} tokens")
    return found


@needs("qemu", "arm compiler")
@pytest.mark.parametrize("name", ["arm64", "arm64-dotprod", "arm64-i8mm"])
def test_ten_prompts_on_arm(
    name: str,
    artifact: Artifact,
    offgrid_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    place = place_of(tmp_path_factory.getbasetemp(), offgrid_model, f"{name}-w4")
    assert not different(place, artifact, emulator())


@needs("avx512")
def test_ten_prompts_on_narrower_vectors(
    artifact: Artifact, offgrid_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = place_of(tmp_path_factory.getbasetemp(), offgrid_model, "cpu:x86_64-v3-w4")
    assert not different(place, artifact, [])
