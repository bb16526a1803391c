"""Rounding a matrix column by column, on a grid that a group of columns shares.

Methods that feed the error of one column into the columns after it (GPTQ and its family) need three
things of a format: to choose what a group of columns shares from the values that these have by now,
to round one column so, and the stored term at the end. Values are transposed, [in, out]: a column
of the matrix is a contiguous row here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from qc.ir.weights.weight import Term

Ranges = Literal["extremes", "mse"]
"""How a grid is laid around weights: over their extremes, or where the squared error is least."""


class Rounding(ABC):
    """One matrix [out, in] on its way into a format."""

    group: int
    """Consecutive columns that are fitted together."""

    levels: int = 0
    """The values of a grid of even steps; 0 where there is none."""

    @abstractmethod
    def fit(self, first: int, values: Tensor, importance: Tensor) -> None:
        """Choose what the columns from `first` on share, from their values [columns, out]; errors
        count by their importance: [columns, out], or [columns, 1]. Whole groups, one or several."""

    @abstractmethod
    def round(self, column: int, values: Tensor) -> Tensor:
        """Choose the codes of one column [out]; return the values that they stand for."""

    @abstractmethod
    def term(self) -> Term:
        """Return the stored term; ValueError where it does not hold what was chosen."""

    def refit(self, target: Tensor, hessian: Tensor) -> bool:
        """Choose what columns share once more, for the codes as they are, so that the error
        tr((W - Q) H (W - Q)^T) is least; False where the format has no such way."""
        return False

    def values(self) -> Tensor:
        """Return what the codes stand for by now, [in, out]."""
        return self.term().dense().float().T.contiguous()

    def nearest(self, values: Tensor, importance: Tensor | None = None) -> Term:
        """Fit everything to a matrix [out, in], errors counting by their importance [out, in], and
        round every weight by itself."""
        columns = values.float().T.contiguous()
        even = torch.ones(len(columns), 1)
        self.fit(0, columns, even if importance is None else importance.T)
        for number, column in enumerate(columns):
            self.round(number, column)
        return self.term()
