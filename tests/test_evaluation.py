"""Perplexity, divergence and agreement against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from qc.errors import InputError
from qc.evaluation import Evaluation, evaluate_windows, log_softmax, windows_of

VOCABULARY = 11


def table_model(seed: int, scale: float = 1.0) -> np.ndarray:
    """Return logits by token: a model that looks at the last token only."""
    return np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY)).astype("f4") * scale


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    windows = windows_of(range(10), 3)
    assert [window.tolist() for window in windows] == [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]]]
    assert windows[0].dtype == np.int64
    assert len(windows_of(range(10), 3, 2)) == 2
    assert len(windows_of(range(10), 3, 9)) == 3


@pytest.mark.parametrize(("tokens", "size"), [(2, 3), (0, 2), (9, 1), (9, 0), (9, -3)])
def test_no_window_is_an_error(tokens: int, size: int) -> None:
    with pytest.raises(InputError, match="window"):
        windows_of(range(tokens), size)


def test_no_windows_asked_for_is_an_error() -> None:
    with pytest.raises(InputError, match="at least 1 window is needed, not 0"):
        windows_of(range(9), 3, 0)


def test_measures_are_those_of_torch() -> None:
    model, reference = table_model(1), table_model(2)
    windows = windows_of(np.random.default_rng(3).integers(0, VOCABULARY, 40).tolist(), 8)
    result = evaluate_windows(lambda ids: model[ids], windows, lambda ids: reference[ids])
    inputs = torch.from_numpy(np.concatenate([w[0, :-1] for w in windows]))
    targets = torch.from_numpy(np.concatenate([w[0, 1:] for w in windows]))
    own, other = torch.from_numpy(model)[inputs], torch.from_numpy(reference)[inputs]
    assert result.tokens == 35
    assert result.perplexity == pytest.approx(math.exp(cross_entropy(own, targets)), rel=1e-5)
    expected = math.exp(cross_entropy(other, targets))
    assert result.reference_perplexity == pytest.approx(expected, rel=1e-5)
    divergence = kl_div(own.log_softmax(-1), other.log_softmax(-1), log_target=True,
                        reduction="batchmean")  # fmt: skip
    assert result.divergence == pytest.approx(float(divergence), rel=1e-4)
    agreement = (own.argmax(-1) == other.argmax(-1)).float().mean()
    assert result.agreement == pytest.approx(float(agreement))


def test_the_same_model_does_not_diverge_from_itself() -> None:
    model = table_model(1, scale=30.0)
    windows = windows_of(list(range(VOCABULARY)) * 2, VOCABULARY)
    result = evaluate_windows(lambda ids: model[ids], windows, lambda ids: model[ids])
    assert result.divergence == pytest.approx(0, abs=1e-6)
    assert result.agreement == 1
    assert result.perplexity == result.reference_perplexity


def test_a_uniform_model_has_the_perplexity_of_the_vocabulary() -> None:
    result = evaluate_windows(
        lambda ids: np.zeros((*ids.shape, VOCABULARY), "f4"), windows_of(range(9), 3)
    )
    assert result.perplexity == pytest.approx(VOCABULARY)
    assert result.divergence is None


def test_log_softmax_takes_large_logits() -> None:
    found = log_softmax(np.array([[1e4, 0, -1e4]], "f4"))
    assert np.isfinite(found).all()
    assert found[0, 0] == pytest.approx(0, abs=1e-6)


def test_the_text_shows_what_was_measured() -> None:
    assert "original" not in str(Evaluation(10, 12.5))
    text = str(Evaluation(10, 12.5, 12.25, 0.0125, 0.975))
    for part in ("12.500", "(10 tokens)", "12.250", "0.0125 nats", "97.5%"):
        assert part in text


def test_progress_counts_windows() -> None:
    seen: list[int] = []
    model = table_model(1)
    evaluate_windows(lambda ids: model[ids], windows_of(range(9), 3), progress=seen.append)
    assert seen == [1, 2, 3]
