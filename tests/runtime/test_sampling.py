"""Tokens are chosen by integers, so that any machine chooses the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from qc.runtime.sampling import (
    FARTHEST,
    STEPS,
    Sampling,
    distances,
    nearest_first,
    part_of,
    share,
    sharpness,
    weights_of,
)


def test_weights_are_powers_of_two() -> None:
    away = np.arange(0, FARTHEST + 1, 99_991, dtype=np.int32)
    exact = 2.0 ** (40 - away / STEPS)
    assert np.abs(weights_of(away) - exact).max() <= 2.0**40 * 1.1e-8
    assert (np.abs(weights_of(away) - exact) <= 1 + 1.1e-8 * exact).all()
    assert weights_of(np.array([FARTHEST], np.int32))[0] == 0


@pytest.mark.parametrize("temperature", [1e-40, 0.1, 1.0, 100.0])
def test_distances_are_those_of_a_softmax(temperature: float) -> None:
    logits = np.array([3.0, -np.inf, 2.5, 3.0, -40.0], np.float32)
    found = distances(logits, logits.max(), sharpness(temperature))
    assert found[0] == found[3] == 0
    assert found[1] == FARTHEST
    wanted = np.minimum((3.0 - logits) / (temperature * np.log(2)) * STEPS, FARTHEST)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1)


@given(some.integers(0, 1 << 58), some.integers(1, (1 << 31) - 1))
def test_a_part_is_less_than_all(total: int, part: int) -> None:
    assert part_of(total, part) <= max(0, total - 1)
    low = total & 0xFFFFFFFF  # as the GPU computes it, within 64 bits
    assert ((total >> 32) * part << 1) + (low * part >> 31) == part_of(total, part)
    assert low * part < 1 << 63


def test_of_equally_likely_tokens_the_first_are_kept() -> None:
    logits = np.array([1, 3, 2, 3, 3, 1], np.float32)
    random = np.random.default_rng(0)
    assert {Sampling(9.0, top_k=2).choose(logits, random) for _ in range(50)} == {1, 3}
    assert {Sampling(1.0, top_p=0.3).choose(logits, random) for _ in range(50)} == {1, 3}
    assert nearest_first(np.array([5, 0, 5, 1], np.int32), 3).tolist() == [1, 3, 0]


@pytest.mark.parametrize("size", [300, 5000])
@pytest.mark.parametrize("top_p", [0.5, 0.999])
def test_a_nucleus_is_the_fewest_that_hold_its_share(size: int, top_p: float) -> None:
    random = np.random.default_rng(2)
    logits = np.round(random.standard_normal(size), 1).astype(np.float32)
    seen = {Sampling(1.0, top_p=top_p).choose(logits, random) for _ in range(200)}
    power = np.exp(logits.astype(np.float64))
    order = np.argsort(-logits, kind="stable")
    held = np.cumsum(power[order]) / power.sum()
    assert seen <= set(order[: int(np.searchsorted(held, top_p)) + 1].tolist())


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square of 8,000 draws: 60.5 is passed once in 1000 times with 29 degrees."""
    random = np.random.default_rng(3)
    logits = random.standard_normal(30).astype(np.float32)
    drawn = np.bincount([Sampling(0.7).choose(logits, random) for _ in range(8_000)], minlength=30)
    power = np.exp(logits / 0.7)
    expected = 8_000 * power / power.sum()
    assert float(((drawn - expected) ** 2 / expected).sum()) < 60.5


def test_settings_draw_as_choosing_does() -> None:
    sampling = Sampling(0.5, top_k=7, top_p=0.9)
    one, other = np.random.default_rng(4), np.random.default_rng(4)
    found = sampling.settings(one, [True, False, True])
    sampling.choose_rows(np.zeros((3, 9), np.float32), other, [True, False, True], 0)
    assert one.random() == other.random()
    assert found[1].tolist() == [0, 0, 0, 0]
    assert found[0].tolist()[1:3] == [7, share(0.9)]
    assert found[0, 0].view(np.float32) == sharpness(0.5)
    assert not Sampling(top_k=7).settings(one, [True]).any()
