"""Rounding to the nearest: error bounds, awkward groups, and which weights are rounded."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from qc.errors import ModelError
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.node import make
from qc.ir.target import Target
from qc.ir.weights import grouped as module
from qc.ir.weights.dense import dense_weight
from qc.ir.weights.grouped import GroupedFormat
from qc.ir.weights.weight import Term
from qc.passes.pipeline import Context, Pipeline
from qc.passes.quantize.round_to_nearest import RoundToNearest
from tests.ir.toys import block_graph, some_ids
from tests.passes.lift.drawing import BATCH, graph, value

OFFSETS = ("symmetric", "zero", "minimum")
HALF = 2.0**-11
"""Relative rounding of a float16."""


def formats() -> st.SearchStrategy[GroupedFormat]:
    groups = st.sampled_from((None, 1, 16, 32, 64, 128))
    return st.builds(GroupedFormat, st.integers(2, 8), groups, st.sampled_from(OFFSETS))


def round_to_nearest(weight: Tensor, format: GroupedFormat) -> Term:
    return format.nearest(weight)


def run(before: Graph, format: GroupedFormat) -> Graph:
    context = Context(Target("any", "any"))
    return Pipeline([RoundToNearest(format)]).run(before, context)


def steps_of(weight: Tensor, format: GroupedFormat) -> Tensor:
    """Return the step of the grid at each weight, from the definition of the scale."""
    steps = torch.empty_like(weight)
    size, levels = format.group_size(weight.shape[1]), 2**format.bits_per_code - 1
    for start in range(0, weight.shape[1], size):
        part = weight[:, start : start + size]
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        if format.offset == "symmetric":
            step = part.abs().amax(1, keepdim=True) / (2 ** (format.bits_per_code - 1) - 1)
        elif format.offset == "zero":
            step = (high.clamp_min(0) - low.clamp_max(0)) / levels
        else:
            step = (high - low) / levels
        steps[:, start : start + size] = step.expand_as(part)
    return steps


@given(formats(), st.sampled_from((1, 7, 33, 127, 129)), st.integers(0, 99), st.floats(-3, 3))
def test_no_weight_moves_further_than_its_grid_allows(
    format: GroupedFormat, cols: int, seed: int, shift: float
) -> None:
    weight = torch.randn(3, cols, generator=torch.Generator().manual_seed(seed)) + shift
    error = (round_to_nearest(weight, format).dense() - weight).abs()
    half_steps = 1.0 if format.offset == "zero" else 0.5  # the zero point is rounded too
    slack = 4 * HALF * weight.abs().max()  # scales and minima are stored in float16
    assert bool((error <= half_steps * steps_of(weight, format) + slack).all())


@given(formats(), st.floats(-4, 4), st.sampled_from((1, 7, 33)))
@example(GroupedFormat(7, None, "zero"), 0.001388731625493765, 1)
def test_a_group_of_equal_weights_is_kept(
    format: GroupedFormat, constant: float, cols: int
) -> None:
    dense = round_to_nearest(torch.full((2, cols), constant), format).dense()
    subnormal = format.top * 2.0**-25  # a float16 scale below 2**-14 is off by up to 2**-25
    assert dense.sub(constant).abs().max() <= 2 * HALF * abs(constant) + subnormal + 1e-6


@pytest.mark.parametrize("offset", OFFSETS)
def test_zeros_stay_zeros(offset: str) -> None:
    format = GroupedFormat(4, 32, offset)  # type: ignore[arg-type]
    assert torch.equal(round_to_nearest(torch.zeros(3, 70), format).dense(), torch.zeros(3, 70))


@pytest.mark.parametrize("offset", ["symmetric", "zero"])
def test_a_zero_among_others_stays_zero(offset: str) -> None:
    """Sparse weights stay sparse."""
    weight = torch.randn(4, 64) + 0.5
    weight[:, ::3] = 0
    dense = round_to_nearest(weight, GroupedFormat(4, 32, offset)).dense()  # type: ignore[arg-type]
    assert torch.equal(dense[:, ::3], torch.zeros_like(dense[:, ::3]))


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_tail_group_has_a_grid_of_its_own(offset: str) -> None:
    format = GroupedFormat(4, 32, offset)  # type: ignore[arg-type]
    weight = torch.randn(2, 40)
    weight[:, 32:] *= 1e-2
    term = round_to_nearest(weight, format)
    alone = round_to_nearest(weight[:, 32:].contiguous(), format)
    assert term.stored["scale"].shape == (2, 2)
    assert torch.equal(term.dense()[:, 32:], alone.dense())


@pytest.mark.parametrize("offset", OFFSETS)
def test_weights_on_the_grid_are_kept(offset: str) -> None:
    format = GroupedFormat(4, 16, offset)  # type: ignore[arg-type]
    once = round_to_nearest(torch.randn(5, 40), format).dense()
    twice = round_to_nearest(once, format).dense()
    assert (twice - once).abs().max() <= 4 * HALF * once.abs().max()


@given(formats().filter(lambda format: format.group != 1))  # one weight a group is always exact
def test_more_bits_do_not_hurt(format: GroupedFormat) -> None:
    weight = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    errors = [
        float((round_to_nearest(weight, GroupedFormat(b, format.group, format.offset)).dense()
               - weight).norm()) for b in (2, 4, 8)
    ]  # fmt: skip
    assert errors == sorted(errors, reverse=True)


def test_wide_matrices_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, format = torch.randn(10, 33), GroupedFormat(4, 16, "minimum")
    whole = round_to_nearest(weight, format)
    monkeypatch.setattr(module, "AT_ONCE", 3 * 33)
    parts = round_to_nearest(weight, format)
    assert all(torch.equal(a, parts.arrays()[name]) for name, a in whole.arrays().items())


# ---------------------------------------------------------------- the pass


def formats_of(after: Graph) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for node in after.parameters:
        assert isinstance(node.op, ops.Parameter)
        found.setdefault(node.op.weight.name, set()).add(str(node.op.weight.format))
    return found


def test_linears_are_rounded_and_nothing_else() -> None:
    found = formats_of(run(block_graph(), GroupedFormat(4, 32)))
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        assert found[f"{name}.weight"] == {"int4·g32"}
    for name in ("norm1", "norm2", "norm3", "frequencies"):
        assert found[f"{name}.weight"] == {"dense f32"}


def test_a_tied_head_is_rounded_and_its_table_is_not() -> None:
    before = block_graph()
    after = run(before, GroupedFormat(4, 32))
    assert formats_of(after)["embed.weight"] == {"int4·g32", "dense f32"}
    table = next(n for n in after.nodes if isinstance(n.op, ops.Embedding)).inputs[1]
    assert table in before.nodes


def test_linears_of_one_weight_share_the_rounded_one() -> None:
    w = make(ops.Parameter(dense_weight("w", torch.randn(8, 8))))
    x = value("x", BATCH, 8)
    twice = make(ops.Linear(), make(ops.Linear(), x, w), w)
    after = run(graph(twice), GroupedFormat(4, 8))
    assert len(after.parameters) == 1


def test_names_origins_and_the_log_say_what_happened() -> None:
    here = Context(Target("any", "any"))
    after = Pipeline([RoundToNearest(GroupedFormat(8, 32))]).run(block_graph(), here)
    linear = next(n for n in after.nodes if isinstance(n.op, ops.Linear))
    assert linear.origin.passes == ("round_to_nearest",)
    assert here.log[0].changed > 0


def test_rounded_weights_are_not_rounded_again() -> None:
    once = run(block_graph(), GroupedFormat(4, 32))
    assert run(once, GroupedFormat(2, 32)).same_as(once)


def test_eight_bits_are_near_the_original() -> None:
    before, inputs = block_graph(), some_ids()
    after = run(before, GroupedFormat(8, 32))
    left, right = (evaluate(g, inputs)["logits"] for g in (before, after))
    assert float((left - right).norm() / left.norm()) < 0.02


def test_biases_are_kept() -> None:
    w = make(ops.Parameter(dense_weight("w", torch.randn(8, 8))))
    b = make(ops.Parameter(dense_weight("b", torch.randn(8))))
    before = graph(make(ops.Linear(), value("x", BATCH, 8), w, b))
    assert run(before, GroupedFormat(4, 8)).outputs[0].inputs[2] is b


def linear_of(weight: Tensor) -> Graph:
    w = make(ops.Parameter(dense_weight("model.head.weight", weight)))
    return graph(make(ops.Linear(), value("x", BATCH, weight.shape[1]), w))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(wrong: float) -> None:
    weight = torch.randn(4, 40)
    weight[1, 3] = weight[2, 39] = wrong
    with pytest.raises(
        ModelError, match=r"'model\.head\.weight' holds 2 values that are NaN or inf"
    ):
        run(linear_of(weight), GroupedFormat(4, 32))


@pytest.mark.parametrize("offset", OFFSETS)
def test_weights_beyond_the_scales_are_refused_by_name(offset: str) -> None:
    weight = torch.randn(4, 40) * 1e9
    with pytest.raises(
        ModelError, match=r"'model\.head\.weight' reaches .*e\+09, which the scales"
    ):
        run(linear_of(weight), GroupedFormat(4, 32, offset))  # type: ignore[arg-type]


def test_tiny_weights_vanish_without_harm() -> None:
    weight = torch.randn(4, 40) * 1e-12
    dense = round_to_nearest(weight, GroupedFormat(4, 32, "minimum")).dense()
    assert float((dense - weight).abs().max()) < 1e-10


def test_weights_put_aside_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    before = block_graph()
    kept = run(before, GroupedFormat(4, 32, "minimum"))
    monkeypatch.setattr("qc.passes.quantize.round_to_nearest.IN_MEMORY", 0)
    assert run(before, GroupedFormat(4, 32, "minimum")).same_as(kept)
