"""The engine behind GPTQ and its family, on matrices: equations that must hold exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qc.errors import ModelError
from qc.ir.weights.notation import parse_term
from qc.ir.weights.rounding import Rounding
from qc.passes.quantize import error_feedback
from qc.passes.quantize.error_feedback import (
    Curvature,
    descend,
    feed_back,
    inverse_factor,
    output_error,
    prepare,
)
from qc.passes.quantize.gptq import gptq

ROWS, COLS = 24, 70
FORMATS = (
    "int3·g16·zero", "int3·g16·min", "int4·g32", "int2·row·min", "int3·o8·zero", "int4·tensor",
    "int3·g16·min·scale(int3·o16·min)·minimum(int3·o16·min)", "lookup3·row", "lookup2·col",
)  # fmt: skip


def weights(rows: int = ROWS, cols: int = COLS, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def hessian(cols: int = COLS, seed: int = 1) -> Tensor:
    """Return H of inputs that depend on each other, some large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, cols, generator=generator)
    x = x @ (torch.eye(cols) + 0.3 * torch.randn(cols, cols, generator=generator))
    x *= 1 + 4 * torch.rand(cols, generator=generator)
    return 2 / 400 * x.double().T @ x.double()


def rounding_of(text: str, ranges: str = "extremes") -> Rounding:
    found = parse_term(text).rounding((ROWS, COLS), ranges)  # type: ignore[arg-type]
    assert found is not None
    return found


def round_all(text: str, curvature: Curvature) -> tuple[Tensor, float, Rounding]:
    """Round the matrix; groups of one column are fitted when they come."""
    rounding = rounding_of(text)
    columns = weights().T.contiguous()
    fitted = rounding.group > 1
    if fitted:
        rounding.fit(0, columns, curvature.importance)
    result, loss = feed_back(columns, curvature, rounding, fitted=fitted)
    return result, loss, rounding


def test_the_factor_is_of_the_inverse() -> None:
    h = hessian()
    factor = inverse_factor(h)
    assert factor is not None
    torch.testing.assert_close(factor.triu(), factor)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(h))


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("sort", [False, True])
def test_the_loss_is_the_damped_objective(text: str, sort: bool) -> None:
    """Sum of (w - q)^2 / U_ii^2 == tr(E (H + damping) E^T): nothing of the feedback is lost."""
    curvature = prepare(hessian(), 0.01, sort)
    result, loss, _ = round_all(text, curvature)
    expected = output_error(weights().T - result, curvature.hessian)
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("text", FORMATS)
def test_the_term_holds_what_was_chosen(text: str) -> None:
    result, _, rounding = round_all(text, prepare(hessian(), 0.01, sort=False))
    torch.testing.assert_close(rounding.term().dense().float().T, result, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rounding.values(), result, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("text", [f for f in FORMATS if "scale(" not in f])
def test_independent_inputs_give_round_to_nearest(text: str) -> None:
    """With H = 1 there is nothing to feed back: bit for bit what `nearest` stores."""
    _, _, rounding = round_all(text, prepare(torch.eye(COLS), 0.0, sort=False))
    expected = parse_term(text).nearest(weights())
    stored = rounding.term().arrays()
    assert stored.keys() == expected.arrays().keys()
    for name, array in expected.arrays().items():
        assert torch.equal(stored[name], array), name


@pytest.mark.parametrize("text", FORMATS)
def test_it_loses_less_than_round_to_nearest(text: str) -> None:
    curvature = prepare(hessian(), 0.01, sort=True)
    result, _, _ = round_all(text, curvature)
    nearest = parse_term(text).nearest(weights()).dense().float()
    lost, before = (
        output_error(weights().T - found, curvature.hessian) for found in (result, nearest.T)
    )
    assert lost < before


@pytest.mark.parametrize("lazy", [1, 7, 32, 200])
@pytest.mark.parametrize("fitted", [False, True])
def test_blocks_are_only_an_order_of_summation(
    lazy: int, fitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups smaller than a block are fitted to compensated values, not to stale ones."""
    curvature = prepare(hessian(), 0.01, sort=False)

    def result(block: int) -> Tensor:
        monkeypatch.setattr(error_feedback, "LAZY", block)
        rounding = rounding_of("int3·g16·zero")
        columns = weights().T.contiguous()
        if fitted:
            rounding.fit(0, columns, curvature.importance)
        found: Tensor = feed_back(columns, curvature, rounding, fitted=fitted)[0]
        return found

    # A value halfway between two codes may fall either way; there are few.
    same = torch.isclose(result(lazy), result(128), rtol=1e-4, atol=1e-4)
    assert float(same.float().mean()) > 0.98


def test_dead_inputs_are_zero_and_cost_nothing() -> None:
    h = hessian()
    h[5], h[:, 5] = 0, 0
    curvature = prepare(h, 0.01, sort=True)
    result, _, _ = round_all("int4·g16·zero", curvature)
    assert bool((result[5] == 0).all())
    assert bool(torch.isfinite(result).all())


def test_a_singular_hessian_is_damped_more() -> None:
    x = torch.randn(8, COLS, generator=torch.Generator().manual_seed(0))
    curvature = prepare(x.double().T @ x.double(), 1e-18, sort=True)
    assert bool(torch.isfinite(curvature.factor).all())


def test_a_hessian_of_nan_is_refused() -> None:
    h = hessian()
    h[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"q_proj.* stays singular"):
        prepare(h, 0.01, sort=False, name="q_proj")


@pytest.mark.parametrize("text", ["int3·g16·zero", "int3·g16·min", "int3·g16"])
def test_descending_and_solving_for_grids_never_lose(text: str) -> None:
    curvature = prepare(hessian(), 0.01, sort=True)
    result, loss, rounding = round_all(text, curvature)
    columns = weights().T.contiguous()
    better = descend(columns, curvature, rounding, result)
    after = output_error(columns - better, curvature.hessian)
    assert after < loss
    assert rounding.refit(columns, curvature.hessian)
    solved = output_error(columns - rounding.values(), curvature.hessian)
    assert solved < after * (1 + 1e-3)  # scales are stored in float16
    plain, refined = (
        gptq(weights(), curvature, rounding_of(text), static=True, refinements=n).dense()
        for n in (0, 3)
    )
    errors = [output_error((weights() - q).T, curvature.hessian) for q in (plain, refined)]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("text", ["int3·g16·zero", "int3·g16·min", "int3·g16", "uint3·g16"])
def test_searched_ranges_have_less_error_in_every_group(text: str) -> None:
    values = weights().abs() if text.startswith("u") else weights()
    importance = torch.rand(COLS, 1) + 0.1
    found = []
    for ranges in ("extremes", "mse"):
        rounding = rounding_of(text, ranges)
        rounding.fit(0, values.T.contiguous(), importance)
        for number, column in enumerate(values.T.contiguous()):
            rounding.round(number, column)
        wrong = (rounding.values() - values.T).square() * importance
        found.append(torch.stack([part.sum(0) for part in wrong.split(16)]))
    assert bool((found[1] <= found[0] * (1 + 1e-3) + 1e-7).all())
    assert float(found[1].sum()) < 0.95 * float(found[0].sum())
