"""What can be measured of a value while a graph runs over calibration data.

A statistic is a frozen description, so that it can be a key: `Hessian()` of a node is measured once
and remembered. It works in two steps, so that batches are measured side by side and still give the
same bits on any number of threads: `partial` of one batch, then `merged` in the order of the data.
Values are [..., channels]; everything before the channels counts as tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qc.ir.device import CPU, moved
from qc.ir.quantized import QuantizedTensor


@dataclass(frozen=True)
class Statistic(ABC):
    """One thing to measure. `partial` of a batch; `merged` adds it to what is known of the batches
    before (None: nothing); `finished` turns the sum into the result."""

    @abstractmethod
    def partial(self, value: Tensor) -> Any:
        """Measure a float32 value [..., channels] of one batch."""

    def compared(self, value: Tensor, original: Tensor | None) -> Any:
        """Measure a value of one batch that is `original` in the graph as it came, or None where
        nothing is compared."""
        return self.partial(value)

    @abstractmethod
    def merged(self, known: Any, partial: Any) -> Any:
        """Add the measurement of the next batch."""

    def finished(self, known: Any) -> Any:
        """Return the result of all batches."""
        return known

    def collected(self, result: Any) -> Any:
        """Return a result on the CPU, wherever it was measured."""
        return moved(result, CPU)


@dataclass(frozen=True)
class AbsMax(Statistic):
    """max |x_c| of every channel: float32[channels]."""

    def partial(self, value: Tensor) -> Tensor:
        return tokens_of(value).abs().amax(0)

    def merged(self, known: Tensor | None, partial: Tensor) -> Tensor:
        return partial if known is None else torch.maximum(known, partial)


@dataclass(frozen=True)
class MomentValues:
    """Means over `tokens` tokens, float64[channels]: of x, of |x| and of x^2."""

    tokens: int
    mean: Tensor
    absolute: Tensor
    square: Tensor


@dataclass(frozen=True)
class Moments(Statistic):
    """Mean, mean magnitude and mean square of every channel: `MomentValues`."""

    def partial(self, value: Tensor) -> tuple[int, Tensor]:
        wide = tokens_of(value).double()
        return len(wide), torch.stack((wide.sum(0), wide.abs().sum(0), wide.square().sum(0)))

    def merged(
        self, known: tuple[int, Tensor] | None, partial: tuple[int, Tensor]
    ) -> tuple[int, Tensor]:
        return partial if known is None else (known[0] + partial[0], known[1] + partial[1])

    def finished(self, known: tuple[int, Tensor]) -> MomentValues:
        tokens, sums = known[0], known[1].cpu()
        return MomentValues(tokens, *(sums / max(1, tokens)))


@dataclass(frozen=True)
class Hessian(Statistic):
    """H = 2/n sum x x^T over n tokens: float64[channels, channels].

    The Hessian of the mean squared error of a linear with respect to a row of its weight. Products
    are taken in float32, batches are added in float64. GPTQ (Frantar et al. 2022), section 3.
    """

    def partial(self, value: Tensor) -> tuple[int, Tensor]:
        tokens = tokens_of(value)
        return len(tokens), gram(tokens)

    def merged(
        self, known: tuple[int, Tensor] | None, partial: tuple[int, Tensor]
    ) -> tuple[int, Tensor]:
        count, product = partial
        if known is None:
            return count, product.double()
        return known[0] + count, known[1].add_(product)

    def finished(self, known: tuple[int, Tensor]) -> Tensor:
        tokens, total = known
        return total.mul_(2 / max(1, tokens))


@dataclass(frozen=True)
class Drift(Statistic):
    """2/n sum (y - x) x^T over n tokens: float64[channels, channels], x the value as it is by now,
    y what it is in the original. Only a sequential visit knows both; elsewhere they are equal.

    With it a weight can make up for what earlier weights have lost: see `visit`.
    """

    def partial(self, value: Tensor) -> tuple[int, Tensor]:
        tokens = tokens_of(value)
        return len(tokens), tokens.new_zeros(tokens.shape[1], tokens.shape[1])

    def compared(self, value: Tensor, original: Tensor | None) -> tuple[int, Tensor]:
        if original is None:
            return self.partial(value)
        tokens = tokens_of(value)
        return len(tokens), (tokens_of(original) - tokens).T @ tokens

    def merged(
        self, known: tuple[int, Tensor] | None, partial: tuple[int, Tensor]
    ) -> tuple[int, Tensor]:
        return Hessian().merged(known, partial)

    def finished(self, known: tuple[int, Tensor]) -> Tensor:
        return Hessian().finished(known)


GRAM_BLOCK = 256
"""Columns of a block of `gram`: large enough for full speed, small enough to skip most of the
lower half."""


def gram(tokens: Tensor) -> Tensor:
    """Return X^T X of X [n, channels]; the blocks below the diagonal are copies."""
    channels = tokens.shape[1]
    product = tokens.new_empty(channels, channels)
    for start in range(0, channels, GRAM_BLOCK):
        stop = min(start + GRAM_BLOCK, channels)
        torch.mm(tokens[:, start:stop].T, tokens[:, start:], out=product[start:stop, start:])
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product


@dataclass(frozen=True)
class Samples(Statistic):
    """Some tokens themselves, `per_sequence` of each, spread evenly: float32[n, channels].

    Which tokens these are depends on the length of a sequence alone: two nodes give the same.
    """

    per_sequence: int = 4

    def partial(self, value: Tensor) -> Tensor:
        if value.ndim < 3:
            value = value.unsqueeze(0)
        length = value.shape[-2]
        count = min(self.per_sequence, length)
        chosen = (torch.arange(count) * 2 + 1) * length // (2 * count)
        return tokens_of(value[..., chosen, :])

    def merged(self, known: list[Tensor] | None, partial: Tensor) -> list[Tensor]:
        return [*(known or []), partial]

    def finished(self, known: list[Tensor]) -> Tensor:
        return torch.cat(known)


@dataclass(frozen=True)
class Values(Statistic):
    """The whole values of the first `batches` batches: a list of tensors, shaped as they are."""

    batches: int = 1

    def partial(self, value: Tensor) -> Tensor:
        return value

    def merged(self, known: list[Tensor] | None, partial: Tensor) -> list[Tensor]:
        kept = known or []
        return kept if len(kept) >= self.batches else [*kept, partial]


def tokens_of(value: Tensor) -> Tensor:
    """View a value [..., channels] as [tokens, channels]."""
    return value.flatten(0, -2) if value.ndim > 1 else value.unsqueeze(0)


def as_float(value: Tensor | QuantizedTensor) -> Tensor:
    """Return a value of the graph as float32."""
    return (value.dequantize() if isinstance(value, QuantizedTensor) else value).float()
