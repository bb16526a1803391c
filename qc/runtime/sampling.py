"""Choose the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qc.errors import ArtifactError, InputError

__all__ = ["Sampling"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Say how tokens are chosen: the most likely one at `temperature` 0, else at random.

    `top_k` keeps the k most likely tokens; `top_p` then keeps the fewest most likely ones whose
    probabilities sum to at least p (Holtzman et al. 2020, arXiv:1904.09751). Raises InputError.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be 1 or more, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    def choose(self, logits: NDArray[Any], random: np.random.Generator) -> int:
        """Return a token id for `logits` [vocabulary]. Raises ArtifactError if they hold NaN."""
        best = int(logits.argmax())
        if np.isnan(logits[best]):  # argmax finds the first NaN if there is one
            raise ArtifactError("the model computed logits that are not numbers (NaN)")
        if self.temperature == 0:
            return best
        candidates = np.arange(logits.size)
        if self.top_k is not None and self.top_k < logits.size:
            candidates = np.argpartition(logits, -self.top_k)[-self.top_k :]
        # float64: probabilities of a large vocabulary must sum to 1.
        scores = (logits[candidates].astype(np.float64) - logits[best]) / self.temperature
        weights = np.exp(scores)
        weights /= weights.sum()
        if self.top_p is not None and self.top_p < 1:
            # Tokens below this are together less than 1 - p, so sorting can leave them out.
            likely = np.flatnonzero(weights > (1 - self.top_p) / weights.size)
            order = likely[np.argsort(-weights[likely], kind="stable")]
            count = int(np.searchsorted(np.cumsum(weights[order]), self.top_p)) + 1
            candidates, weights = candidates[order[:count]], weights[order[:count]]
        cumulative = np.cumsum(weights)
        at = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
        return int(candidates[min(at, candidates.size - 1)])
