"""Transforms that look at data: exact before quantization, and less lossy behind it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qc.errors import RecipeError
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.weights.notation import parse_term
from qc.passes.calibration import Hessian
from qc.passes.calibration.walk import Walk
from qc.passes.exactness import relative_difference
from qc.passes.pipeline import Pass
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.transform.awq import AwqScales, output_error, power_scales, search_scales
from qc.passes.transform.calibrated import changeable_groups, linears_of
from qc.passes.transform.clip_weights import (
    ClipWeights,
    clamped,
    group_errors,
    matched_by_attention,
    search_clipping,
)
from qc.passes.transform.fold_scales import FoldScales
from qc.passes.transform.migrate_outliers import MigrateOutliers
from qc.passes.transform.smooth_activations import (
    SearchSmoothing,
    SmoothActivations,
    migration_scales,
)
from tests.families import DECODERS
from tests.passes.calibration.tiny import SEQUENCES, calibration, canonical, context
from tests.passes.lift.drawing import apply

FORMAT = "int3·g16·zero"


def rounded(values: Tensor, format: str = FORMAT) -> Tensor:
    return parse_term(format).nearest(values).dense()


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("one", [AwqScales(FORMAT, grid=4), SmoothActivations()], ids=repr)
def test_calibrated_transforms_are_exact_for_every_family(one: Pass, family: str) -> None:
    before, data = canonical(family), context()
    after = one.run(before, data)
    folded = FoldScales().run(after, data)
    left = 2 if family in NOT_HOMOGENEOUS else 0
    assert products(folded) - products(before) == left
    assert relative_difference(before, after) < 3e-6  # measured: 7e-7
    assert relative_difference(before, folded) < 3e-6


NOT_HOMOGENEOUS = ("gpt2", "gpt_neox")
"""Families with a plain gelu, which no factor passes: one product a layer stays."""


def products(graph: Graph) -> int:
    return sum(node.op == ops.Binary("mul") for node in graph.nodes)


def test_what_is_known_of_inputs_stays_known() -> None:
    """Instead of running the model again after each exact change."""
    data = context()
    after = FoldScales().run(AwqScales(FORMAT, grid=4).run(canonical(), data), data)
    kept = calibration_of(data).measure(after, inputs_of(after))
    again = calibration().measure(after, inputs_of(after))
    assert kept.keys() == again.keys()
    for key, found in kept.items():
        torch.testing.assert_close(found, again[key], rtol=1e-4, atol=1e-5 * float(found.max()))


def calibration_of(data: object) -> object:
    return data.calibration  # type: ignore[attr-defined]


def inputs_of(graph: Graph) -> dict[Node, tuple[Hessian]]:
    return {group.x: (Hessian(),) for group in changeable_groups(graph, ("linears",))}


def test_power_scales_are_centred_and_survive_dead_channels() -> None:
    scales = power_scales(torch.tensor([0.0, 1.0, 4.0]), 0.5)
    assert bool((scales > 0).all())
    torch.testing.assert_close(scales.max() * scales.min(), torch.tensor(1.0).double())
    torch.testing.assert_close(scales[2] / scales[1], torch.tensor(2.0).double())
    assert bool((power_scales(torch.rand(5), 0.0) == 1).all())


def outlier_problem() -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs of which one channel in eight is 20 times larger."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator)
    x[:, ::8] *= 20
    return torch.randn(24, 32, generator=generator), (2 / 256 * x.T @ x).double()


def test_the_search_never_loses_against_no_scales() -> None:
    weight, hessian = outlier_problem()
    magnitude = hessian.diagonal().sqrt()
    candidates = [power_scales(magnitude, r / 10) for r in range(10)]
    best, errors = search_scales([weight], hessian, candidates, rounded)
    assert errors[best] == min(errors)
    plain = output_error(rounded(weight) - weight, hessian.float())
    assert errors[0] == pytest.approx(plain, rel=1e-4)
    assert errors[best] < 0.6 * plain  # measured: 0.38
    by_weight = [power_scales(weight.abs().mean(0), r / 10) for r in range(10)]
    assert errors[best] < min(search_scales([weight], hessian, by_weight, rounded)[1])


def test_clipping_minimises_the_error_of_groups() -> None:
    weight, hessian = outlier_problem()
    weight[::3, ::5] *= 4
    clipped = search_clipping(weight, hessian, 16, rounded)
    errors = [group_errors(rounded(w) - weight, hessian.float(), 16) for w in (weight, clipped)]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
    assert float(errors[1].sum()) < 0.9 * float(errors[0].sum())
    assert bool((clipped.abs() <= weight.abs()).all())


def test_limits_hold_for_ragged_groups() -> None:
    values = torch.arange(-5.0, 5.0).view(2, 5)
    limits = torch.tensor([[1.0, 2.0, 3.0], [0.5, 1.0, 0.0]])
    expected = torch.tensor([[-1.0, -1.0, -2.0, -2.0, -1.0], [0.0, 0.5, 1.0, 1.0, 0.0]])
    assert torch.equal(clamped(values, limits, 2), expected)


def test_queries_and_keys_are_not_clipped() -> None:
    before, data = canonical("qwen3"), context()  # with norms between linears and attention
    names = {n.origin.module.rsplit(".", 1)[1] for n in matched_by_attention(before)}
    assert names == {"q_proj", "k_proj"}
    after = ClipWeights(FORMAT).run(before, data)
    changed = {old.origin.module.rsplit(".", 1)[1]
               for old, new in zip(linears_of(before), linears_of(after), strict=True)
               if old.inputs[1] is not new.inputs[1]}  # fmt: skip
    assert changed == {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_migration_scales_are_those_of_the_paper() -> None:
    activations, weight = torch.tensor([4.0, 0.0, 9.0]), torch.tensor([[1.0, 1.0, -4.0]])
    found = migration_scales(activations, [weight], 0.5)
    torch.testing.assert_close(found, torch.tensor([2.0, 1.0, 1.5]))


def test_one_alpha_for_the_whole_model() -> None:
    before, data = canonical(), context()
    search = SearchSmoothing(FORMAT, steps=4, samples=4)
    after = search.run(before, data)
    assert relative_difference(before, after) < 3e-6
    reference = search_outputs(before, search)
    losses = {alpha: search.loss(smooth(before, alpha), first(search), reference)
              for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)}  # fmt: skip
    plain = search.loss(before, first(search), reference)
    chosen = search.loss(after, first(search), reference)
    assert chosen == pytest.approx(min(plain, *losses.values()), rel=1e-3)


@pytest.mark.parametrize(
    "passes",
    [
        (SearchSmoothing(FORMAT, steps=4, samples=2), FoldScales()),
        (AwqScales(FORMAT, grid=4), FoldScales(), ClipWeights(FORMAT)),
        (MigrateOutliers("int4·g16", 4, grid=3), FoldScales()),
    ],
    ids=lambda passes: passes[0].name,
)
def test_the_model_runs_over_all_data_once(
    passes: tuple[Pass, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many candidates a search compares: a walk takes minutes."""
    walked: list[int] = []
    plain = Walk.__init__

    def counting(self: Walk, graph: Graph, batches: list[object], *rest: object) -> None:
        walked.append(sum(next(iter(b.values())).shape[0] for b in batches))  # type: ignore[attr-defined]
        plain(self, graph, batches, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Walk, "__init__", counting)
    graph, data = canonical(), context()
    for one in passes:
        graph = one.run(graph, data)
    assert walked.count(SEQUENCES) == 1


def search_outputs(graph: Graph, search: SearchSmoothing) -> list[Tensor]:
    from qc.passes.transform.smooth_activations import outputs_of

    return outputs_of(graph, first(search), search.targets)


def first(search: SearchSmoothing) -> object:
    from qc.passes.transform.calibrated import first_sequences

    return first_sequences(calibration(), search.samples)


def smooth(graph: Graph, alpha: float) -> Graph:
    return SmoothActivations(alpha).run(graph, context())


def test_a_head_stays_and_targets_choose() -> None:
    before, data = canonical(), context()
    after = SmoothActivations(targets=("re:down",)).run(before, data)
    added = [n for n in after.nodes if n.op == ops.Binary("mul") and n not in before.nodes]
    smoothed = [n.origin.module for n in linears_of(after) if n.inputs[0] in added]
    assert len(smoothed) == 2
    assert all("down_proj" in name for name in smoothed)
    with pytest.raises(RecipeError, match="matches none"):
        SmoothActivations(targets=("re:sideways",)).run(before, data)


@pytest.mark.parametrize(
    "one", [AwqScales(), ClipWeights(), SmoothActivations(), SearchSmoothing()]
)
def test_without_data_they_say_so(one: Pass) -> None:
    with pytest.raises(RecipeError, match="looks at data"):
        apply(one, canonical())


def test_awq_rounds_better_on_data() -> None:
    """What the search promises, on a model: less error at every group of linears."""
    before = canonical()
    data = context()
    scaled = AwqScales(FORMAT).run(before, data)
    losses = [total_error(before, one, data) for one in (before, scaled)]
    assert losses[1] <= losses[0]


def total_error(reference: Graph, graph: Graph, data: object) -> float:
    stored = RoundToNearest(FORMAT).run(graph, data)  # type: ignore[arg-type]
    known = calibration_of(data).measure(graph, inputs_of(graph))  # type: ignore[attr-defined]
    total = 0.0
    for old, new in zip(linears_of(graph), linears_of(stored), strict=True):
        if (old.inputs[0], Hessian()) in known:
            difference = values(new) - values(old)
            total += output_error(difference, known[old.inputs[0], Hessian()].float())
    return total


def values(linear: Node) -> Tensor:
    parameter = linear.inputs[1].op
    assert isinstance(parameter, ops.Parameter)
    return parameter.weight.dense()
