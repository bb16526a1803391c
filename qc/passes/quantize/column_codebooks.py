"""CLAQ: a table of values for every input, more bits and more outliers where they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qc.errors import FormatError
from qc.ir.device import CPU, moved
from qc.ir.node import Node
from qc.ir.weights.columns import OnColumnsFormat, columns_term
from qc.ir.weights.parts import MILLION, share_of
from qc.ir.weights.rounding import Rounding
from qc.ir.weights.sparse import SparseFormat, sparse_term
from qc.ir.weights.weight import Term, TermFormat, WeightFormat
from qc.passes.quantize.calibrated import StoreByData, weight_of
from qc.passes.quantize.error_feedback import Curvature, feed_back, prepare

MULTIPLES = (13.0, 9.0, 6.0, 4.0, 3.0)
"""A weight is an outlier above so many times the mean magnitude: 13 in the paper, fewer where the
matrix has none, for without any the order of the columns would be arbitrary."""

TOP_COLUMNS, TOP_SHARE, OTHER_SHARE = 0.10, 0.028, 0.008
"""Outliers kept in the tenth of the columns that has most, and in the others, half of them at each
end: CLAQ, section 3.4."""


def outlier_ratios(columns: Tensor) -> Tensor:
    """Return for each column of W^T [in, out] how many of its weights are outliers, then how large
    it is: columns are ranked by the first, ties by the second."""
    magnitude = columns.abs()
    mean = magnitude.mean()
    counts = next(
        (found for m in MULTIPLES if bool((found := (magnitude >= m * mean).sum(1)).any())),
        torch.zeros(len(columns)),
    )
    return counts + magnitude.mean(1) / magnitude.mean(1).max().clamp_min(1e-30) * 0.5


def kept_per_column(rows: int, share: float) -> int:
    """Return how many weights of a column are kept at each end."""
    return round(rows * share / 2)


def extreme_entries(column: Tensor, count: int) -> Tensor:
    """Mark the `count` largest and the `count` smallest weights of a column."""
    chosen = torch.zeros_like(column, dtype=torch.bool)
    if count:
        order = column.argsort(stable=True)
        chosen[order[:count]] = True
        chosen[order[len(order) - count :]] = True
    return chosen


class PartedRounding(Rounding):
    """Columns that are rounded in different formats, each a group of its own."""

    group = 1

    def __init__(self, shape: tuple[int, int], parts: Sequence[tuple[TermFormat, Tensor]]) -> None:
        self.columns = shape[1]
        self.parts: list[tuple[TermFormat, Tensor, Rounding]] = []
        self.place: dict[int, tuple[Rounding, int]] = {}
        for format, index in parts:
            rounding = format.rounding((shape[0], len(index)))
            assert rounding is not None
            self.parts.append((format, index, rounding))
            self.place |= {c: (rounding, i) for i, c in enumerate(moved(index, CPU).tolist())}

    def fit(self, first: int, values: Tensor, importance: Tensor) -> None:
        for number in range(len(values)):
            rounding, at = self.place[first + number]
            rounding.fit(at, values[number : number + 1], importance[number : number + 1])

    def round(self, column: int, values: Tensor) -> Tensor:
        rounding, at = self.place[column]
        return rounding.round(at, values)

    def term(self) -> Term:
        raise ValueError("columns of several formats are several terms")

    def terms(self) -> tuple[Term, ...]:
        """Return one term for each format; one format for all columns needs no index."""
        if len(self.parts) == 1:
            return (self.parts[0][2].term(),)
        return tuple(
            columns_term(
                OnColumnsFormat(format, count=len(index)), self.columns, index, rounding.term()
            )
            for format, index, rounding in self.parts
        )


@dataclass(frozen=True)
class ColumnCodebooks(StoreByData):
    """Store the weights of linears as codes into one table for every input.

        linear(%x, dense f32)  -->  linear(%x, lookup3·col), or
            linear(%x, columns70(lookup4·col) + columns506(lookup3·col) + sparse1%)

    Lossy: minimises ||X W^T - X Q^T||^2 greedily; tables by k-means of the values that a column has
    when its turn comes. Wang et al. 2024 (CLAQ), sections 3.2 to 3.4. The `wide_per_million` of the
    columns with most outliers get `wide_bits`; `outliers` keeps the extremes of every column in
    float16, more of them in the columns with most outliers.
    """

    name: ClassVar[str] = "column_codebooks"
    format: str = "lookup3·col"
    wide_bits: int = 4
    wide_per_million: int = 0
    outliers: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        rounding = self.weights.terms[0].rounding((64, 64))
        if len(self.weights.terms) != 1 or rounding is None or rounding.group != 1:
            raise FormatError(
                f"column codebooks are one table a column, lookup3·col, not {self.format}"
            )

    @property
    def wide(self) -> TermFormat:
        """The format of the columns with most outliers."""
        found = self.weights.terms[0].resized(self.wide_bits)
        assert found is not None
        return found

    def planned_format(self, parameter: Node) -> WeightFormat:
        rows, cols = weight_of(parameter).shape
        wide = share_of(self.wide_per_million, cols) if self.wide_per_million else 0
        narrow = self.weights.terms[0]
        terms: tuple[TermFormat, ...] = (narrow,)
        if wide:
            terms = (
                OnColumnsFormat(self.wide, count=wide),
                OnColumnsFormat(narrow, count=cols - wide),
            )
        kept = self.sparse_format(rows, cols)
        return WeightFormat(terms if kept is None else (*terms, kept))

    def sparse_format(self, rows: int, cols: int) -> SparseFormat | None:
        """Return the room for the outliers of a matrix."""
        if not self.outliers:
            return None
        top = share_of(int(TOP_COLUMNS * MILLION), cols)
        ends = top * kept_per_column(rows, TOP_SHARE)
        ends += (cols - top) * kept_per_column(rows, OTHER_SHARE)
        return SparseFormat(-(-2 * ends * MILLION // (rows * cols))) if ends else None

    def prepare(self, hessian: Tensor, name: str) -> Curvature:
        return prepare(hessian, self.damping, sort=True, name=name)

    def store(self, values: Tensor, prepared: Curvature, parameter: Node) -> tuple[Term, ...]:
        columns = values.T.contiguous()
        ranked = outlier_ratios(columns).argsort(descending=True, stable=True)
        wide = share_of(self.wide_per_million, len(columns)) if self.wide_per_million else 0
        parts = [(self.wide, ranked[:wide].sort().values)] if wide else []
        parts.append((self.weights.terms[0], ranked[wide:].sort().values))
        rounding = PartedRounding((values.shape[0], values.shape[1]), parts)
        kept = self.sparse_format(*values.shape)
        chosen = torch.zeros(columns.shape, dtype=torch.bool)
        if kept is not None:
            leading = ranked[: share_of(int(TOP_COLUMNS * MILLION), len(columns))]
            top = set(moved(leading, CPU).tolist())

            def exempt(column: int, wanted: Tensor, rounded: Tensor) -> Tensor:
                share = TOP_SHARE if column in top else OTHER_SHARE
                chosen[column] = extreme_entries(wanted, kept_per_column(len(wanted), share))
                return chosen[column]

        result, _ = feed_back(
            columns, prepared, rounding, fitted=False, exempt=None if kept is None else exempt
        )
        terms = rounding.terms()
        if kept is None:
            return terms
        dense = torch.stack([term.dense().float() for term in terms]).sum(0)
        return (*terms, sparse_term(kept, result.T - dense, chosen.T.contiguous()))
