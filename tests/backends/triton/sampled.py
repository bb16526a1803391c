"""Logits of many kinds and ways to choose among them: a GPU must take the tokens taken here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qc.runtime.sampling import Sampling


@dataclass(frozen=True)
class Sampled:
    """`coarse` logits are whole numbers, so that many are equal; of `masked` ones a third are
    minus infinity."""

    vocabulary: int
    sampling: Sampling
    spread: float = 3.0
    coarse: bool = False
    masked: bool = False

    def logits(self, rows: int, random: np.random.Generator) -> NDArray[np.float32]:
        """Draw rows of logits."""
        found = self.spread * random.standard_normal((rows, self.vocabulary))
        found = np.round(found) if self.coarse else found
        if self.masked:
            found[:, ::3] = -np.inf
        return found.astype(np.float32)


SAMPLED = (
    Sampled(41, Sampling()),
    Sampled(2500, Sampling(), coarse=True),
    Sampled(41, Sampling(1.0), masked=True),
    Sampled(2500, Sampling(0.8), coarse=True),
    Sampled(41, Sampling(1.0, top_k=5), coarse=True),
    Sampled(41, Sampling(0.5, top_p=0.9), coarse=True),
    Sampled(41, Sampling(2.0, top_p=0.5), spread=0.01),
    Sampled(41, Sampling(1e-30), spread=20.0),
    Sampled(2500, Sampling(1.3, top_k=100, top_p=0.8), coarse=True, masked=True),
)
