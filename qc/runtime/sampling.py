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
        candidates: NDArray[Any] | None = None  # all
        if self.top_k is not None and self.top_k < logits.size:
            candidates = np.argpartition(logits, -self.top_k)[-self.top_k :]
            logits = logits[candidates]
        weights = np.exp((logits - logits.max()) / np.float32(self.temperature))
        if self.top_p is not None and self.top_p < 1:
            nucleus = _find_nucleus(weights, self.top_p)
            candidates = nucleus if candidates is None else candidates[nucleus]
            weights = weights[nucleus]
        # float64: the probabilities of a large vocabulary are many and small.
        cumulative = np.cumsum(weights, dtype=np.float64)
        at = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
        at = min(at, cumulative.size - 1)
        return at if candidates is None else int(candidates[at])


def _find_nucleus(weights: NDArray[Any], top_p: float) -> NDArray[np.intp]:
    """Return the fewest largest weights, in falling order, that hold `top_p` of the sum."""
    needed = top_p * weights.sum(dtype=np.float64)
    for count in (256, 4096, weights.size):  # the nucleus is small as a rule: avoid a full sort
        if count >= weights.size:
            largest = np.arange(weights.size)
        else:
            largest = np.argpartition(weights, -count)[-count:]
        order = largest[np.argsort(-weights[largest], kind="stable")]
        cumulative = np.cumsum(weights[order], dtype=np.float64)
        if cumulative[-1] >= needed:
            break
    return order[: int(np.searchsorted(cumulative, needed)) + 1]
