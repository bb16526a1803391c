"""What GPTQ, SpQR, SqueezeLLM, CLAQ and AdaDim claim, on the real model: orders, not numbers.

32 windows of 512 tokens, calibrated on 32 sequences; results are kept under build/accuracy, so that
a second run compares and computes nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qc.passes.calibration import Calibration
from qc.passes.pipeline import Pipeline
from qc.passes.quantize.adaptive_axis import AdaptiveAxis
from qc.passes.quantize.column_codebooks import ColumnCodebooks
from qc.passes.quantize.gptq import Gptq
from qc.passes.quantize.sensitive_tables import SensitiveTables
from qc.passes.quantize.spqr import Spqr
from real_model import CALIBRATION
from tests.needs import needs
from tests.recipes.measured import model, perplexity, rtn

pytestmark = [needs("model"), pytest.mark.slow]


def test_gptq_is_better_than_rounding_and_more_so_with_fewer_bits() -> None:
    three = perplexity(rtn("int3·g64·zero")), perplexity(Gptq("int3·g64·zero"))
    four = perplexity(rtn("int4·g64·zero")), perplexity(Gptq("int4·g64·zero"))
    assert three[1] < three[0]
    assert four[1] < four[0]
    assert three[0] / three[1] > four[0] / four[1]


def test_act_order_is_not_worse_than_none() -> None:
    plain = Gptq("int3·g64·zero", act_order=False, static_groups=False)
    assert perplexity(Gptq("int3·g64·zero")) < perplexity(plain) * 1.02


def test_spqr_is_better_than_groups_of_32_and_outliers_help() -> None:
    found = perplexity(Spqr())
    assert found < perplexity(Gptq("int3·g32·zero"))
    assert found < perplexity(Spqr(tau=1e9))


def test_sensitive_tables_are_better_than_plain_ones_and_sparse_helps() -> None:
    weighted, plain = (
        perplexity(SensitiveTables("lookup3·row", weighted=w)) for w in (True, False)
    )
    assert weighted < plain < perplexity(rtn("int3·row·zero"))
    assert perplexity(SensitiveTables("lookup3·row + sparse0.45%")) < weighted


def test_column_tables_are_better_than_rows_and_adapting_them_helps() -> None:
    tables = perplexity(ColumnCodebooks())
    assert tables < perplexity(Gptq("int3·row·zero"))
    adapted = ColumnCodebooks(wide_per_million=50_000, outliers=True)
    assert perplexity(adapted) < tables


def test_axes_are_chosen_both_ways() -> None:
    after = Pipeline((AdaptiveAxis("int3·g64·zero", values="nearest"),))
    data = Calibration(Path(CALIBRATION), 8, 512)
    graph = model().quantize(after, calibration=data).graph
    formats = [str(p.op.weight.format) for p in graph.parameters]  # type: ignore[attr-defined]
    across = sum("·o64·" in each for each in formats)
    along = sum("·g64·" in each for each in formats)
    assert across > 0
    assert along > 0
