"""Recipes that are calibrated on a GPU give what they give on the CPU, up to a few codes."""

from __future__ import annotations

import pytest
import torch

from qc.passes.calibration import Calibration
from qc.passes.recipes import COMPOSED, PUBLISHED, Recipe
from qc.stages import resized, resolve_recipe
from tests.needs import needs
from tests.passes.calibration.tiny import LENGTH, canonical, context, token_sequences

pytestmark = [needs("cuda"), pytest.mark.slow]

OWN_SIZES = ("spqr", "squeezellm", "claq", "w2", "w3")
CHOSEN = [each for each in (*PUBLISHED, *COMPOSED) if "rank32" not in repr(each.passes)]


def weights(recipe: Recipe, device: str) -> list[torch.Tensor]:
    """Quantize the tiny model; return all matrices as they are read."""
    passes = resolve_recipe(recipe, calibrated=True)
    passes = passes if recipe.name in OWN_SIZES else resized(passes, None, 16)
    data = Calibration(token_sequences(), max_seq_length=LENGTH, device=device)
    graph = passes.run(canonical(), context(data))
    return [p.op.weight.dense().float() for p in graph.parameters]  # type: ignore[attr-defined]


@pytest.mark.parametrize("recipe", CHOSEN, ids=lambda recipe: recipe.name)
def test_a_gpu_finds_the_same_weights(recipe: Recipe) -> None:
    for found, expected in zip(weights(recipe, "cuda"), weights(recipe, "cpu"), strict=True):
        assert found.device.type == "cpu"
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_a_gpu_gives_the_same_bits_twice() -> None:
    recipe = next(each for each in CHOSEN if each.name == "w3")
    for first, second in zip(weights(recipe, "cuda"), weights(recipe, "cuda"), strict=True):
        assert torch.equal(first, second)
