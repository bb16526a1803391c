"""Leading directions: of weights in front of rounding, of errors behind it."""

import pytest
import torch
from torch import Tensor

from qc.errors import FormatError
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.passes.decompose.low_rank import CompensateError, SplitLowRank, whitened_factors
from qc.passes.decompose.replacing import chosen_linears, weight_of
from qc.passes.exactness import relative_difference
from qc.passes.pipeline import Pipeline
from qc.passes.preview import preview
from qc.passes.quantize.round_to_nearest import RoundToNearest
from tests.passes.calibration.tiny import canonical, context

INT2 = RoundToNearest("int2·g16·min")
EVERY = ("linears",)


def errors(before: Graph, after: Graph) -> list[float]:
    """Return |W - W'| of the linears of the blocks."""
    stored = {weight_of(n).name: weight_of(n).dense() for n in all_linears(after)}
    return [
        float((stored[weight_of(n).name] - weight_of(n).dense()).norm())
        for n in chosen_linears(before, EVERY)
    ]


def all_linears(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op.name == "linear"]


def test_the_error_falls_with_the_rank() -> None:
    before, data = canonical(), context()
    found = [sum(errors(before, INT2.run(before, data)))]
    for rank in (1, 4, 16, 32):
        after = CompensateError(INT2, f"rank{rank}").run(before, data)
        found.append(sum(errors(before, after)))
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.4 * found[0]


def test_full_rank_leaves_the_rounding_of_the_factors() -> None:
    before, data = canonical(), context()
    only = ("re:k_proj",)  # [32, 64]
    after = CompensateError(INT2, "rank32·factors(dense f32)", targets=only).run(before, data)
    pairs = {weight_of(n).name: weight_of(n) for n in all_linears(after)}
    for linear in chosen_linears(before, only):
        stored = pairs[weight_of(linear).name]
        torch.testing.assert_close(
            stored.dense(), weight_of(linear).dense(), rtol=1e-4, atol=1e-5
        )  # fmt: skip
        assert str(stored.format) == "int2·g16·min + rank32·factors(dense f32)"


def test_the_truncation_is_the_best_there_is() -> None:
    """|W - L| is the tail of the singular values; with data, of those of W H^(1/2)."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(12, 20, generator=generator), torch.randn(64, 20, generator=generator)
    x[:, :3] *= 10
    hessian = (x.T @ x).double()
    up, down = whitened_factors(weight, 4, None)
    tail = torch.linalg.svdvals(weight)[4:]
    torch.testing.assert_close((weight - up @ down).norm(), tail.norm(), rtol=1e-4, atol=0)
    up, down = whitened_factors(weight, 4, hessian)
    tail = torch.linalg.svdvals(x.double() @ weight.double().T)[4:]
    left = x @ (weight - up @ down).T
    torch.testing.assert_close(left.norm().double(), tail.norm(), rtol=1e-3, atol=0)


def test_a_dead_channel_does_not_divide_by_zero() -> None:
    hessian = torch.diag(torch.tensor([1.0, 0.0, 2.0, 3.0])).double()
    up, down = whitened_factors(torch.randn(5, 4), 2, hessian)
    assert bool(torch.isfinite(up @ down).all())


def test_on_data_the_outputs_lose_less() -> None:
    before, data = canonical(), context()
    found = [
        output_error(before, CompensateError(INT2, "rank4", whiten=w).run(before, data), data)
        for w in (False, True)
    ]
    assert found[1] < found[0]


def output_error(before: Graph, after: Graph, data: object) -> float:
    from qc.passes.calibration import Hessian

    known = data.calibration  # type: ignore[attr-defined]
    stored = {weight_of(n).name: weight_of(n).dense() for n in all_linears(after)}
    total = 0.0
    for linear in chosen_linears(before, EVERY):
        error: Tensor = (stored[weight_of(linear).name] - weight_of(linear).dense()).double()
        hessian = known.measured(before, linear.inputs[0], Hessian())
        total += float((error @ hessian * error).sum())
    return total


@pytest.mark.parametrize("whiten", [False, True])
def test_a_split_is_exact_and_rounds_finer(whiten: bool) -> None:
    before, data = canonical(), context()
    split = SplitLowRank("rank8", whiten)
    assert relative_difference(before, split.run(before, data)) < 2e-6
    after = Pipeline((split, INT2)).run(before, data)
    formats = {str(weight_of(n).format) for n in all_linears(after)}
    assert formats == {"int2·g16·min + rank8", "int2·g16·min"}  # the head is not split
    if not whiten:
        assert sum(errors(before, after)) < sum(errors(before, INT2.run(before, data)))


def test_previews_say_what_will_be_stored() -> None:
    before = canonical()
    for passes in ((SplitLowRank("rank8"), INT2), (CompensateError(INT2, "rank8"),)):
        found = preview(Pipeline(passes), before).graph
        assert found is not None
        after = Pipeline(passes).run(before, context())
        assert found.same_as(after)


def test_a_rank_that_is_too_much_is_refused() -> None:
    before = canonical()
    (first, *_) = SplitLowRank("rank40").refusals(before)
    assert "rank32" in first.instead
    assert CompensateError(INT2, "rank40").refusals(before)
    with pytest.raises(FormatError, match="no low rank"):
        SplitLowRank("int4·g32").run(before, context())
