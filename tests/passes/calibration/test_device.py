"""Calibration elsewhere: nothing is left behind on the CPU, and the numbers are the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qc.errors import InputError
from qc.explaining.explain import explain
from qc.ir.device import CPU, computing_on, here, parse_device
from qc.ir.meaning import evaluate
from qc.ir.threads import side_by_side
from qc.passes.calibration import AbsMax, Calibration, Drift, Hessian, Moments, Samples
from qc.passes.calibration.calibration import inputs_of
from qc.passes.calibration.walk import sizes_of
from qc.passes.pipeline import Pipeline
from qc.passes.quantize import calibrated
from qc.passes.quantize.calibrated import weight_of
from qc.passes.recipes import PUBLISHED, Recipe
from qc.stages import resized
from tests.elsewhere import ELSEWHERE, Elsewhere
from tests.passes.calibration.tiny import calibration, canonical, context, linears


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let calibrations compute elsewhere, matrices of any size too; with one thread, as here each
    of several computes for itself."""
    monkeypatch.setattr(Calibration, "place", ELSEWHERE)
    monkeypatch.setattr(calibrated, "LARGE", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(recipe: Recipe) -> Pipeline:
    """Fit a recipe to tiny matrices."""
    passes = recipe.pipeline
    if "rank32" in repr(passes):
        pytest.skip("no matrix of the tiny model has a rank of 32; the passes are tried below")
    return passes if recipe.name in ("spqr", "squeezellm", "claq") else resized(passes, None, 16)


QUICK = ("gptq", "gwq", "lorc")


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(each, id=each.name, marks=() if each.name in QUICK else pytest.mark.slow)
        for each in PUBLISHED
    ],
)
@pytest.mark.usefixtures("elsewhere")
def test_recipes_compute_elsewhere_what_they_compute_here(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = small(recipe)
    with Elsewhere():
        found = passes.run(canonical(), context())
    monkeypatch.undo()
    expected = passes.run(canonical(), context())
    for one, other in zip(found.parameters, expected.parameters, strict=True):
        assert all(array.device == CPU for array in weight_of(one).arrays().values())
        values, wanted = weight_of(one).dense().float(), weight_of(other).dense().float()
        # sums are taken in another order, so a few codes fall to the other side
        assert (values - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.usefixtures("elsewhere")
def test_statistics_text_and_gradients_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = canonical()
    chosen = linears(graph)
    wanted = (AbsMax(), Moments(), Hessian(), Samples(), Drift())
    weights = [each.inputs[1] for each in chosen[:3]]

    def everything() -> list[torch.Tensor]:
        data = calibration()
        known = data.measure(graph, {each.inputs[0]: wanted for each in chosen})
        written = Calibration(num_calibration_samples=3, max_seq_length=6).bound(graph, None, 1)
        found = [each for each in known.values() if isinstance(each, torch.Tensor)]
        found += [known[each.inputs[0], Moments()].square for each in chosen]
        felt = data.gradients(graph, weights, 3)
        return [*found, *written.sequences(), *(felt[p].square for p in weights)]

    with Elsewhere():
        found = everything()
    monkeypatch.undo()
    for one, other in zip(found, everything(), strict=True):
        assert one.device == CPU
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_explanations_compute_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = small(next(recipe for recipe in PUBLISHED if recipe.name == "gptq"))
    with Elsewhere():
        _, found = explain(canonical(), passes, context())
    monkeypatch.undo()
    expected = explain(canonical(), passes, context())[1]
    assert found.divergence == pytest.approx(expected.divergence, rel=0.1)
    assert len(found.layers) == len(expected.layers)


def test_a_graph_is_evaluated_where_its_inputs_lie() -> None:
    graph = canonical()
    inputs = inputs_of(graph, torch.arange(12).view(2, 6))
    expected = evaluate(graph, inputs, sizes_of(graph, inputs))
    with Elsewhere():
        there = {label: value.to(ELSEWHERE) for label, value in inputs.items()}
        found = evaluate(graph, there, sizes_of(graph, there))
    for name, value in expected.items():
        assert found[name].device == ELSEWHERE
        torch.testing.assert_close(found[name].to(CPU), value, rtol=1e-4, atol=1e-5)


def test_a_tensor_left_behind_is_noticed() -> None:
    with Elsewhere(), pytest.raises(AssertionError, match="beside those elsewhere"):
        torch.ones(3, device=ELSEWHERE) + torch.ones(3)


def test_work_for_another_device_is_done_in_this_thread() -> None:
    def made(number: int) -> tuple[torch.device, torch.device]:
        return torch.zeros(number).device, here()

    with Elsewhere():
        assert [found for _, found in side_by_side(made, [1, 2], ELSEWHERE)] == [
            (ELSEWHERE, ELSEWHERE)
        ] * 2
        with computing_on(ELSEWHERE), computing_on(CPU):
            assert torch.zeros(1).device == CPU
    assert here() == CPU


@pytest.mark.parametrize("name", ["gpu", "cuda:7", "meta", "nothing at all"])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"expected .*cpu"):
        parse_device(name)


def test_auto_is_a_gpu_where_there_is_one() -> None:
    assert parse_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert parse_device("cpu") == CPU
