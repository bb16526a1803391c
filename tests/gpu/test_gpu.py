"""What needs a GPU: artifacts that were compiled here, run on it, against the reference graph.

`make test-gpu` runs these; where there is no GPU they are skipped and say so. Before a driver and
after the stub of tests/runtime, nothing here is simulated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qc
from qc.runtime import Artifact
from tests import families
from tests.needs import needs
from tests.tiny_llama import llama_folder

pytestmark = [needs("cuda"), pytest.mark.slow]


def relative(found: Any, expected: torch.Tensor) -> float:
    """Return the error, relative in the Frobenius norm."""
    wanted = expected.double().numpy()
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


class Pair:
    """A model compiled for this GPU, and its graph."""

    def __init__(self, model: Any, recipe: str, place: Path) -> None:
        self.artifact: Artifact = qc.compile(model, f"cuda-{recipe}", output=place)
        self.graph = qc.trace(model).quantize(recipe)

    def expected(self, ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self.graph(input_ids=torch.tensor([ids]))["logits"]
        return logits[0]


@pytest.fixture(scope="module", params=["w4a16", "w4", "w8a16", "f32"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    place = tmp_path_factory.mktemp("gpu")
    return Pair(llama_folder(place), request.param, place / "tiny.qc")


def bound(pair: Pair) -> float:
    """Return what a float16 model is off by; int8 codes on a border are off by one besides."""
    return 3e-2 if pair.artifact.manifest.target.name.endswith("-w4") else 3e-3


def test_every_kernel_computes_its_golden_output(pair: Pair) -> None:
    assert not pair.artifact.verify().wrong, str(pair.artifact.verify())


def test_prompts(pair: Pair) -> None:
    ids = torch.randint(0, 300, (100,)).tolist()
    assert relative(pair.artifact(ids), pair.expected(ids)) <= bound(pair)


def test_tokens_one_by_one(pair: Pair) -> None:
    ids = torch.randint(0, 300, (60,)).tolist()
    session = pair.artifact.session()
    found = [session.prefill(ids[:20])[0], *(session.step(i)[0] for i in ids[20:])]
    assert relative(np.stack(found), pair.expected(ids)[19:]) <= bound(pair)


def test_rows_of_a_batch_do_not_mix(pair: Pair) -> None:
    rows = torch.randint(0, 300, (3, 12)).tolist()
    session = pair.artifact.session(batch=3)
    session.prefill([row[:9] for row in rows])
    for at in range(9, 12):
        found = session.step([row[at] for row in rows])
    for line, row in zip(found, rows, strict=True):
        assert relative(line, pair.expected(row)[-1]) <= bound(pair)


def test_runs_repeat_to_the_bit(pair: Pair) -> None:
    ids = torch.randint(0, 300, (30,)).tolist()
    np.testing.assert_array_equal(pair.artifact(ids), pair.artifact(ids))


@pytest.mark.parametrize("family", [name for name in families.DECODERS if name != "llama"])
def test_families(family: str, tmp_path: Path) -> None:
    model = families.build(family)
    pair = Pair(model, "w8a16", tmp_path / "model.qc")
    ids = torch.randint(0, families.VOCABULARY, (20,)).tolist()
    assert relative(pair.artifact(ids), pair.expected(ids)) <= 5e-3


@pytest.mark.parametrize("family", families.ENCODERS)
def test_encoders(family: str, tmp_path: Path) -> None:
    """Whole inputs in one call: attention without a cache, the convolution in front of images."""
    model = families.build(family)
    artifact = qc.compile(model, "cuda-w8a16", output=tmp_path / "model.qc")
    given = families.inputs(family, 2, 21)
    expected = next(iter(qc.trace(model).quantize("w8a16")(**given).values()))
    assert not artifact.verify().wrong, str(artifact.verify())
    assert relative(artifact(**given), expected) <= 5e-3
