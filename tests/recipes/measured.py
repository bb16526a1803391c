"""Perplexities of passes on the real model, kept so that a second run computes nothing."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from benchmarks.accuracy import measure, remembered
from qc.compiler import trace
from qc.passes.calibration import Calibration
from qc.passes.pipeline import Pass, Pipeline
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.recipes.rounding import CACHE_16, TABLES_16
from qc.stages import CanonicalModel
from real_model import BUILD, CALIBRATION, MODEL

WINDOWS, SAMPLES = 32, 32
"""More than 16,000 tokens are predicted: the order of two methods is stable."""


@functools.cache
def model() -> CanonicalModel:
    return trace(MODEL).canonicalize()


def result_of(*steps: Pass) -> dict[str, Any]:
    """Return what is known of a pipeline with these passes; the head stays in 16 bits."""
    passes = Pipeline((*TABLES_16, *steps, *CACHE_16, RoundToNearest("f16")))
    facts = {
        "model": MODEL.name, "configuration": repr(passes), "samples": SAMPLES, "windows": WINDOWS,
    }  # fmt: skip
    calibration = Calibration(Path(CALIBRATION), SAMPLES, 512)
    return remembered(
        BUILD / "accuracy", facts, lambda: measure(model(), passes, calibration, WINDOWS)
    )


def perplexity(*steps: Pass) -> float:
    found: float = result_of(*steps)["perplexity"]
    return found


def rtn(format: str) -> Pass:
    return RoundToNearest(format, heads=False)
