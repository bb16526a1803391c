"""Keys and values that are kept as codes, on a GPU, against the reference graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qc
from qc.stages import caching, resolve_recipe
from tests.needs import needs
from tests.tiny_llama import llama_folder

pytestmark = [needs("cuda"), pytest.mark.slow]

BOUNDS = {"f16": 3e-3, "int8": 1e-2, "e4m3": 3e-2}
"""A code on the other side of a border is off by 1/127 of a head's largest value, or by 1/16."""


def relative(found: Any, expected: torch.Tensor) -> float:
    """Return the error, relative in the Frobenius norm."""
    wanted = expected.double().numpy()
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("cache", BOUNDS)
def test_prompts_and_steps(cache: str, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path)
    artifact = qc.compile(folder, "cuda-w4a16", cache=cache, output=tmp_path / "tiny.qc")
    assert not artifact.verify().wrong, str(artifact.verify())
    graph = qc.trace(folder).quantize(caching(resolve_recipe("w4a16"), cache))
    ids = torch.randint(0, 300, (90,)).tolist()
    expected = graph(input_ids=torch.tensor([ids]))["logits"][0]
    assert relative(artifact(ids), expected) <= BOUNDS[cache]
    session = artifact.session()
    found = [session.prefill(ids[:70]), *(session.step(i) for i in ids[70:])]
    assert relative(np.concatenate(found), expected[69:]) <= BOUNDS[cache]
