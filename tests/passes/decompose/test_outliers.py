"""Outliers are kept whole beside what is rounded."""

import pytest
import torch

from qc.ir.graph import Graph
from qc.ir.weights.notation import parse_term
from qc.passes.decompose.low_rank import SplitLowRank
from qc.passes.decompose.outliers import SplitOutliers, outlier_format, outlier_term
from qc.passes.decompose.replacing import chosen_linears, weight_of
from qc.passes.exactness import relative_difference
from qc.passes.pipeline import Pipeline
from qc.passes.preview import preview
from qc.passes.quantize.round_to_nearest import RoundToNearest
from tests.passes.calibration.tiny import canonical, context

INT3 = RoundToNearest("int3·g16·min")
SHAPES = {
    "elements": "sparse5%",
    "rows": "kept5%·g64(dense f16)",
    "columns": "columns5%(dense f16)",
}


@pytest.mark.parametrize("criterion", ["magnitude", "hessian", "fisher", "gradient", "random"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_criterion_and_shape(criterion: str, shape: str) -> None:
    before, data = canonical(), context()
    split = SplitOutliers(criterion, "5%", shape, targets=("re:q_proj",))  # type: ignore[arg-type]
    after = split.run(before, data)
    assert relative_difference(before, after) < 1e-3  # float16
    stored = Pipeline((split, INT3)).run(before, data)
    found = {str(weight_of(n).format) for n in stored.nodes
             if n.op.name == "linear" and "q_proj" in n.origin.module}  # fmt: skip
    assert found == {f"int3·g16·min + {SHAPES[shape]}"}
    planned = preview(Pipeline((split, INT3)), before).graph
    assert planned is not None
    assert planned.same_as(stored)


def test_the_largest_scores_are_kept() -> None:
    values = torch.randn(6, 10)
    scores = torch.rand(6, 10)
    for shape in SHAPES:
        format = outlier_format("20%", shape, 10)  # type: ignore[arg-type]
        term, left = outlier_term(format, values, scores)
        torch.testing.assert_close(term.dense() + left, values, atol=1e-3, rtol=1e-3)
        kept = left == 0
        assert int(kept.sum()) == {"elements": 12, "rows": 20, "columns": 12}[shape]
        if shape == "elements":
            assert float(scores[kept].min()) > float(scores[~kept].max())
        else:
            axis = 1 if shape == "rows" else 0
            totals = scores.sum(axis)
            whole = kept.all(axis)
            assert float(totals[whole].min()) > float(totals[~whole].max())


def test_everything_kept_is_the_matrix_and_outliers_help() -> None:
    before, data = canonical(), context()
    found = []
    for passes in ((INT3,), (SplitOutliers("random"), INT3), (SplitOutliers("magnitude"), INT3)):
        found.append(weight_error(before, Pipeline(passes).run(before, data)))
    assert found[2] < found[1] < found[0] * 1.001
    values = torch.randn(4, 8).half().float()
    term, left = outlier_term(parse_term("sparse100%"), values, values.abs())
    assert torch.equal(term.dense(), values)
    assert not left.any()


def weight_error(before: Graph, after: Graph) -> float:
    stored = {weight_of(n).name: weight_of(n).dense() for n in after.nodes if n.op.name == "linear"}
    return sum(
        float((stored[weight_of(n).name] - weight_of(n).dense()).square().sum())
        for n in chosen_linears(before, ("linears",))
    )


def test_the_scale_of_the_loss_does_not_choose() -> None:
    scores = torch.rand(5, 9)
    format = outlier_format("10%", "elements", 9)
    chosen = [outlier_term(format, torch.ones(5, 9), scores * scale)[1] for scale in (1.0, 1e-3)]
    assert torch.equal(*chosen)


def test_low_rank_and_outliers_go_together() -> None:
    before, data = canonical(), context()
    passes = (SplitLowRank("rank4"), SplitOutliers(), INT3)
    after = Pipeline(passes).run(before, data)
    formats = {str(weight_of(n).format) for n in after.nodes if n.op.name == "linear"}
    assert "int3·g16·min + rank4 + sparse1%" in formats
