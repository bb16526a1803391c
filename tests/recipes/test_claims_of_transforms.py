"""What AWQ, SmoothQuant+, LoRC, GWQ and SVDQuant claim, on the real model: orders, not numbers.

32 windows of 512 tokens, calibrated on 32 sequences, as in test_claims_of_rounding.
"""

from __future__ import annotations

import pytest

from qc.ir.types import ActivationFormat
from qc.passes.decompose.branches import SplitBranches
from qc.passes.decompose.low_rank import CompensateError, SplitLowRank
from qc.passes.decompose.outliers import SplitOutliers
from qc.passes.pipeline import Pass
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.gptq import Gptq
from qc.passes.transform.awq import AwqScales
from qc.passes.transform.clip_weights import ClipWeights
from qc.passes.transform.fold_scales import FoldScales
from qc.passes.transform.migrate_outliers import MigrateOutliers
from qc.passes.transform.smooth_activations import SearchSmoothing
from tests.needs import needs
from tests.recipes.measured import perplexity, result_of, rtn

pytestmark = [needs("model"), pytest.mark.slow]

INT3 = "int3·g64·zero"
SCALED = (AwqScales(INT3), FoldScales())


def test_awq_is_better_than_rounding_and_clipping_helps() -> None:
    scaled = perplexity(*SCALED, rtn(INT3))
    assert scaled < perplexity(rtn(INT3))
    assert perplexity(*SCALED, ClipWeights(INT3), rtn(INT3)) < scaled


def test_awq_in_front_of_gptq_is_better_than_either() -> None:
    both = perplexity(*SCALED, Gptq(INT3))
    assert both < perplexity(Gptq(INT3))
    assert both < perplexity(*SCALED, ClipWeights(INT3), rtn(INT3))


def test_one_alpha_for_the_model_is_not_worse_than_none() -> None:
    assert perplexity(SearchSmoothing(INT3), FoldScales(), rtn(INT3)) <= perplexity(rtn(INT3))


def test_more_directions_of_the_error_help_more() -> None:
    found = [perplexity(CompensateError(rtn(INT3), f"rank{r}")) for r in (32, 8)]
    assert found[0] < found[1] < perplexity(rtn(INT3))


def test_large_gradients_are_better_outliers_than_chance() -> None:
    gradient, random = (
        perplexity(SplitOutliers(criterion), rtn(INT3)) for criterion in ("gradient", "random")
    )
    assert gradient < random


def four_bits(*in_front: Pass) -> float:
    """Return the perplexity with weights and activations of 4 bits, groups of 64."""
    codes = QuantizeActivations(ActivationFormat(4, 64))
    return perplexity(*in_front, rtn("int4·g64"), codes)


def test_svdquant_makes_four_bit_activations_bearable() -> None:
    branch = (SplitLowRank("rank32"), SplitBranches())
    smooth = (MigrateOutliers("int4·g64", 0, ActivationFormat(4, 64), grid=10), FoldScales())
    search = MigrateOutliers("int4·g64", 32, ActivationFormat(4, 64), grid=10)
    whole = four_bits(search, FoldScales(), *branch)
    assert whole < four_bits(*smooth) < four_bits()
    assert whole < four_bits(*branch)


def test_stored_bits_are_those_of_the_formats() -> None:
    assert result_of(rtn(INT3))["bits"]["blocks"] == 3 + 24 / 64
    assert result_of(*SCALED, rtn(INT3))["bits"]["blocks"] == 3 + 24 / 64  # all scales are folded
