"""Measure what quantization costs: perplexity, and how far the predictions moved.

Protocol: the text is tokenized as one stream without special tokens and cut into windows that do
not overlap; each window is predicted from nothing but itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qc.errors import InputError

Logits = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Token ids [1, tokens] -> logits [1, tokens, vocabulary]."""


@dataclass(frozen=True)
class Evaluation:
    """Perplexity per token; KL divergence in nats and the share of equal top predictions, both
    against a reference, or None without one."""

    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    divergence: float | None = None
    agreement: float | None = None

    def __str__(self) -> str:
        lines = [f"perplexity            {self.perplexity:.3f}   ({self.tokens} tokens)"]
        if self.divergence is not None:
            lines = [
                f"perplexity, original  {self.reference_perplexity:.3f}",
                *lines,
                f"KL divergence         {self.divergence:.4f} nats a token",
                f"same top token        {self.agreement:.1%}",
            ]
        return "\n".join(lines)


def windows_of(
    tokens: Sequence[int], size: int = 512, count: int | None = None
) -> list[NDArray[np.int64]]:
    """Cut a stream of token ids into windows [1, size]; InputError where there are none."""
    if size < 2:
        raise InputError(f"a window has at least 2 tokens, not {size}")
    if count is not None and count < 1:
        raise InputError(f"at least 1 window is needed, not {count}")
    whole = len(tokens) // size
    if whole == 0:
        raise InputError(f"the text has {len(tokens)} tokens, less than one window of {size}")
    used = whole if count is None else min(whole, count)
    stream = np.asarray(tokens[: used * size], np.int64).reshape(used, 1, size)
    return list(stream)


def evaluate_windows(
    model: Logits,
    windows: Iterable[NDArray[np.int64]],
    reference: Logits | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Predict every token of every window but the first; compare with `reference` where given.

    The divergence is KL(reference || model), averaged over the predicted tokens.
    """
    totals = np.zeros(4)
    count = 0
    for number, window in enumerate(windows):
        own = log_softmax(model(window)[0, :-1])
        targets = window[0, 1:]
        totals[0] -= own[np.arange(len(targets)), targets].sum(dtype=np.float64)
        if reference is not None:
            other = log_softmax(reference(window)[0, :-1])
            totals[1] -= other[np.arange(len(targets)), targets].sum(dtype=np.float64)
            totals[2] += (np.exp(other) * (other - own)).sum(dtype=np.float64)
            totals[3] += (own.argmax(-1) == other.argmax(-1)).sum()
        count += len(targets)
        progress(number + 1)
    means = totals / max(1, count)
    if reference is None:
        return Evaluation(count, math.exp(means[0]))
    return Evaluation(count, math.exp(means[0]), math.exp(means[1]), means[2], means[3])


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return log probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    normal: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normal
