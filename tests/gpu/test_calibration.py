"""Recipes that are calibrated on a GPU lose as much as they lose on the CPU.

Their weights may differ: what one flipped code has lost is made up for by all that follow, so noise
of 1e-6 in the Hessians moves the weights of w3 by up to 0.3 of their norm, and the error of the
logits by 0.03 of itself, in every recipe.
"""

from __future__ import annotations

import pytest
import torch

from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.passes.calibration import Calibration
from qc.passes.recipes import COMPOSED, PUBLISHED, Recipe
from qc.stages import resized, resolve_recipe
from tests.needs import needs
from tests.passes.calibration.tiny import LENGTH, calibration, canonical, context, token_sequences

pytestmark = [needs("cuda"), pytest.mark.slow]

OWN_SIZES = ("spqr", "squeezellm", "claq", "w2", "w3")
CHOSEN = [each for each in (*PUBLISHED, *COMPOSED) if "rank32" not in repr(each.passes)]
TOLERANCE = 0.1


def quantized(recipe: Recipe, device: str) -> Graph:
    """Quantize the tiny model."""
    passes = resolve_recipe(recipe, calibrated=True)
    passes = passes if recipe.name in OWN_SIZES else resized(passes, None, 16)
    data = Calibration(token_sequences(), max_seq_length=LENGTH, device=device)
    return passes.run(canonical(), context(data))


def weights(graph: Graph) -> list[torch.Tensor]:
    """Return all matrices as they are read."""
    return [p.op.weight.dense() for p in graph.parameters]  # type: ignore[attr-defined]


def logits(graph: Graph) -> torch.Tensor:
    """Return what a model says to the calibration data."""
    batch = next(iter(calibration().batches(graph)))
    found: torch.Tensor = evaluate(graph, batch, {"keep": LENGTH})["logits"]
    return found


def error(graph: Graph) -> float:
    """Return the distance of the logits from those of the model in float32, relative."""
    expected = logits(canonical())
    return float((logits(graph) - expected).norm() / expected.norm())


@pytest.mark.parametrize("recipe", CHOSEN, ids=lambda recipe: recipe.name)
def test_a_gpu_loses_as_much_as_the_cpu(recipe: Recipe) -> None:
    found, expected = quantized(recipe, "cuda"), quantized(recipe, "cpu")
    assert {each.device.type for each in weights(found)} == {"cpu"}
    assert error(found) == pytest.approx(error(expected), rel=TOLERANCE)


def test_a_gpu_gives_the_same_bits_twice() -> None:
    recipe = next(each for each in CHOSEN if each.name == "w3")
    first, second = (weights(quantized(recipe, "cuda")) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
