"""SVDQuant on a small diffusion transformer, with its own outliers and with planted ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qc
from qc.passes.calibration import Calibration
from qc.passes.decompose.branches import SplitBranches
from qc.passes.decompose.low_rank import SplitLowRank
from qc.passes.pipeline import Pipeline
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.recipes import RECIPES
from qc.passes.recipes.rounding import STORE_16
from qc.passes.recipes.svdquant import FORMAT, INT4
from qc.passes.transform.migrate_outliers import MigrateOutliers
from qc.stages import CanonicalModel, QuantizedModel
from tests.backends.triton.test_artifact import check_machine_code, lowering_of
from tests.backends.triton.test_kernels import interpret
from tests.needs import needs
from tests.recipes.diffusion import SMALL, WHOLE, Shape, noised, planted, taught

ROUNDED = Pipeline(
    (*STORE_16, RoundToNearest(FORMAT, heads=False), RoundToNearest("f16"),
     QuantizeActivations(INT4))
)  # fmt: skip


def with_rank(rank: int) -> Pipeline:
    """Return SVDQuant with branches of another rank; 0 for smoothing alone."""
    passes = []
    for each in RECIPES["svdquant"].passes:
        if isinstance(each, MigrateOutliers):
            each = replace(each, rank=rank)
        if isinstance(each, SplitLowRank):
            each = replace(each, format=f"rank{rank}")
        if rank or not isinstance(each, SplitLowRank | SplitBranches):
            passes.append(each)
    return Pipeline(tuple(passes))


def canonical(model: Any, shape: Shape = WHOLE) -> CanonicalModel:
    return qc.trace(model, noised(2, 1, shape)[0]).canonicalize()


def quantized(traced: CanonicalModel, passes: Pipeline, shape: Shape = WHOLE) -> QuantizedModel:
    data = Calibration([noised(4, 100 + n, shape)[0] for n in range(16)])
    return traced.quantize(passes, calibration=data)


@needs("diffusers")
@pytest.mark.slow
@pytest.mark.parametrize("model", [taught, planted])
def test_svdquant_loses_less_than_smoothing_and_smoothing_than_rounding(model: Any) -> None:
    """Weights and activations of 4 bits; more rank loses less. Li et al. 2024, section 5."""
    given, _ = noised(16, 999)
    traced = canonical(model())
    assert not [node for node in traced.graph.nodes if str(node).startswith("torch(")]
    with torch.no_grad():
        expected = model()(**given).sample

    def error(passes: Pipeline) -> float:
        found = quantized(traced, passes)(**given)["sample"]
        return float((found - expected).norm() / expected.norm())

    rank32, rank8 = error(with_rank(32)), error(with_rank(8))
    assert rank32 < rank8 < error(with_rank(0)) < error(ROUNDED)


@needs("diffusers")
@pytest.mark.slow
def test_the_artifact_computes_what_the_graph_means() -> None:
    given, _ = noised(16, 999)
    found = quantized(canonical(planted()), with_rank(32))
    artifact = found.lower("cpu").build()
    expected = found(**given)["sample"]
    output = torch.as_tensor(artifact(**{name: value.numpy() for name, value in given.items()}))
    # A code of 4 bits on the other side of a border moves some values: decision 008.
    assert float((output - expected).norm() / expected.norm()) < 1e-3


@needs("diffusers")
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["svdquant", "svdquant_a16"])
def test_the_gpu_form_computes_what_the_graph_means(recipe: str) -> None:
    """In Triton's interpreter: every kernel on known inputs, then the whole model."""
    found = interpret("diffusion", recipe)
    sample = found.pop("sample")
    assert len(found) > 10
    assert {name: error for name, error in found.items() if not error <= 1} == {}
    # Values between kernels are float16; more codes of 4 bits than of 8 are on a border.
    assert sample <= (2e-2 if recipe == "svdquant" else 3e-3)


@needs("diffusers")
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["svdquant", "svdquant_a16"])
def test_the_gpu_form_is_machine_code(recipe: str, tmp_path: Path) -> None:
    """Shared memory that the GPU has, parameters as they are passed, no spills for one row."""
    traced = canonical(planted(SMALL), SMALL)
    found = quantized(traced, Pipeline(RECIPES[recipe].passes), SMALL)
    check_machine_code(lowering_of(found.graph, "cuda:sm_90"), "sm_90", tmp_path)
