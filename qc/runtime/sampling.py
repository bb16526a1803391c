"""Choose the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
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
    probabilities sum to at least p (Holtzman et al. 2020, arXiv:1904.09751); of equally likely ones
    the first. Raises InputError.
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
        """Return a token id for `logits` [vocabulary]. Raises ArtifactError if they hold NaN.

        Weights are integers, so a GPU finds the same token: qc/backends/triton/device/sampling.py.
        """
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):  # argmax finds the first NaN if there is one
            raise ArtifactError(NOT_NUMBERS)
        if self.temperature == 0:
            return best
        logits = logits.astype(np.float32, copy=False)
        away = distances(logits, logits[best], sharpness(self.temperature))
        kept: NDArray[Any] | None = None  # all
        if self.top_k is not None and self.top_k < away.size:
            kept = nearest_first(away, self.top_k)
            kept.sort()
            away = away[kept]
        weights = weights_of(away)
        if self.top_p is not None and self.top_p < 1:
            nucleus = _find_nucleus(away, weights, share(self.top_p))
            nucleus.sort()
            kept = nucleus if kept is None else kept[nucleus]
            weights = weights[nucleus]
        cumulative = np.cumsum(weights)
        wanted = part_of(int(cumulative[-1]), share(random.random()))
        at = int(np.searchsorted(cumulative, wanted, side="right"))
        return at if kept is None else int(kept[at])

    def choose_rows(
        self, logits: NDArray[Any], random: np.random.Generator, alive: Sequence[bool], pad: int
    ) -> list[int]:
        """Return a token id for each row of logits; `pad` for those that are not alive."""
        return [
            self.choose(row, random) if going else pad
            for row, going in zip(logits, alive, strict=True)
        ]

    def settings(self, random: np.random.Generator, alive: Sequence[bool]) -> NDArray[np.int32]:
        """Return what a GPU reads to choose a token for each row, as `choose_rows` would:
        [rows, 4], the sharpness as bits (0: the most likely), top_k, the share of top_p (0 for
        all), the share that is drawn."""
        found = np.zeros((len(alive), 4), np.int32)
        if self.temperature == 0:
            return found
        for row, going in zip(found, alive, strict=True):
            if going:
                row[0] = np.float32(sharpness(self.temperature)).view(np.int32)
                row[1] = min(self.top_k or 0, 2**31 - 1)
                row[2] = share(self.top_p) if self.top_p is not None and self.top_p < 1 else 0
                row[3] = share(random.random())
        return found


NOT_NUMBERS = "the model computed logits that are infinite, or not numbers (NaN)"
STEPS = 1 << 24
"""Of a distance: one is a factor of 2."""
FARTHEST = 41 * STEPS
"""From there on a weight is 0."""
HALVES = (
    1073741823, -744260975, 257938938, -59583045, 10286509, -1369790, 117454,
)  # fmt: skip
"""2^30 2^-x for x in [0, 1) as a polynomial, off by 1e-8 at most; fitted at Chebyshev nodes."""
LARGEST_SHARPNESS = 1e30


def sharpness(temperature: float) -> np.float32:
    """Return by how many steps a token falls behind for each unit of its logit."""
    return np.float32(min(STEPS / (np.log(2.0) * temperature), LARGEST_SHARPNESS))


def share(fraction: float) -> int:
    """Return a fraction in units of 2^-31, at least one."""
    return max(1, min(int(fraction * 2**31), 2**31 - 1))


def part_of(total: int, part: int) -> int:
    """Return total * part / 2^31, rounded down."""
    return total * part >> 31


def needed_of(total: int, part: int) -> int:
    """Return what a nucleus must hold: a millionth less than asked for, since logits are rounded
    and half of all is to be reached by a half."""
    needed = part_of(total, part)
    return needed - (needed >> 20)


def distances(logits: NDArray[Any], best: Any, sharpness: np.float32) -> NDArray[np.int32]:
    """Return how far behind the best tokens are, in steps: (best - logit) sharpness. Two
    operations of float32, rounded as IEEE 754 says, and one that cuts off."""
    with np.errstate(over="ignore"):
        behind = (np.float32(best) - logits) * sharpness
    found: NDArray[np.int32] = np.minimum(behind, np.float32(FARTHEST)).astype(np.int32)
    return found


def weights_of(distances: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return 2^40 2^-(distance / 2^24), rounded down. Integers alone."""
    fraction = distances.astype(np.int64) & (STEPS - 1)
    power = np.full(distances.shape, HALVES[-1], np.int64)
    for coefficient in reversed(HALVES[:-1]):
        power *= fraction
        power >>= 24
        power += coefficient
    return (power << 10) >> (distances >> 24)


def nearest_first(distances: NDArray[np.int32], count: int) -> NDArray[np.intp]:
    """Return the places of the `count` shortest distances; of equal ones, the first."""
    border = np.partition(distances, count - 1)[count - 1]
    nearer = np.flatnonzero(distances < border)
    return np.concatenate([nearer, np.flatnonzero(distances == border)[: count - nearer.size]])


def _find_nucleus(
    distances: NDArray[np.int32], weights: NDArray[np.int64], part: int
) -> NDArray[np.intp]:
    """Return the fewest nearest places that hold `part` of all weights; of equals, the first."""
    needed = needed_of(int(weights.sum()), part)
    for count in (256, 4096, weights.size):  # the nucleus is small as a rule: avoid a full sort
        if count >= weights.size:
            found = np.arange(weights.size)
        else:
            found = nearest_first(distances, count)
            found.sort()
        order = found[np.argsort(distances[found], kind="stable")]
        cumulative = np.cumsum(weights[order])
        if cumulative[-1] >= needed:
            break
    return order[: int(np.searchsorted(cumulative, needed)) + 1]
