"""Sparse entries sorted by row (CSR): outliers kept in 16 bits beside a matrix of few bits.

An entry is a float16 value and a column of 2 bytes (4 above 32768 inputs); 4 bytes a row say where
its entries start. How many entries there are follows from the shape: the share, rounded up.

Sources: SpQR (Dettmers et al. 2023), section 4.2; SqueezeLLM (Kim et al. 2023), section 4.2;
GWQ (Shao et al. 2024), section 3. They differ in which entries they choose, not in the storage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from qc.ir.weights.expression import ENTRY, ROW, Expr, Load, Sum, ToFloat, equal
from qc.ir.weights.notation import refuse_rest
from qc.ir.weights.parts import (
    check_share,
    entry_rows,
    index_dtype,
    largest,
    parse_percent,
    percent,
    row_starts,
    share_of,
    unused_index,
    verify_positions,
    verify_starts,
)
from qc.ir.weights.structure import Entries
from qc.ir.weights.weight import ArraySpec, Term, TermFormat


@dataclass(frozen=True)
class SparseFormat(TermFormat):
    """Room for `per_million` entries of a million, anywhere. Printed in percent: `sparse0.5%`."""

    per_million: int

    examples: ClassVar[tuple[str, ...]] = ("sparse0.45%", "sparse1%", "sparse5%", "sparse20%")
    takes_outliers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share(self.per_million)

    def entries(self, shape: tuple[int, ...]) -> int:
        """Return how many entries a matrix of `shape` stores."""
        return share_of(self.per_million, shape[0] * shape[1])

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        entries = self.entries(shape)
        return {
            "starts": ArraySpec((shape[0] + 1,), torch.int32),
            "columns": ArraySpec((entries,), index_dtype(shape[1])),
            "values": ArraySpec((entries,), torch.float16),
        }

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        entry = unused_index(ENTRY.axis, row, col)
        here = ToFloat(equal(Load("columns", (entry,)), col))
        start, stop = Load("starts", (row,)), Load("starts", (row + 1,))
        return Sum(entry, start, stop, here * Load("values", (entry,)))

    def structure(self, shape: tuple[int, ...]) -> Entries:
        return Entries(
            start=Load("starts", (ROW,)),
            stop=Load("starts", (ROW + 1,)),
            column=Load("columns", (ENTRY,)),
            value=Load("values", (ENTRY,)),
        )

    def verify(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> None:
        verify_starts(arrays["starts"], self.entries(shape))
        verify_positions("columns", arrays["columns"], shape[1], arrays["starts"])

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        dense = torch.zeros(shape)
        at = entry_rows(arrays["starts"]), arrays["columns"].long()
        dense[at] = arrays["values"].float()
        return dense

    def nearest(self, values: Tensor) -> Term:
        """Keep the largest magnitudes of the whole matrix, of equal ones the first.

        Minimises ||W - W'||_F among all matrices with so many entries, up to float16 rounding.
        """
        return sparse_term(self, values, largest(values.abs(), self.entries(tuple(values.shape))))

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        head = re.fullmatch(r"sparse(\d+(?:\.\d+)?)%", words[0])
        if head is None:
            return None
        refuse_rest(words[1:], "the share alone, as in sparse0.5%")
        return cls(parse_percent(head[1]))

    def __str__(self) -> str:
        return f"sparse{percent(self.per_million)}"


def sparse_term(format: SparseFormat, values: Tensor, chosen: Tensor) -> Term:
    """Store `values` [out, in] where `chosen` (bool) says so; ValueError for more than fit.

    Room that is left holds zeros at other positions, spread evenly over the matrix: they cost
    what any entry costs, and no row gets all of them.
    """
    shape = (values.shape[0], values.shape[1])
    entries, wanted = format.entries(shape), int(chosen.sum())
    if wanted > entries:
        raise ValueError(f"{wanted} entries are chosen, {format} of {list(shape)} holds {entries}")
    free = (~chosen).flatten().nonzero().flatten()
    spare = torch.arange(entries - wanted) * len(free) // max(1, entries - wanted)
    occupied = chosen.flatten().index_fill(0, free[spare], True).view(shape)
    stored = {
        "starts": row_starts(occupied),
        "columns": occupied.nonzero()[:, 1].to(index_dtype(shape[1])),
        "values": torch.where(chosen, values, 0.0)[occupied].to(torch.float16),
    }
    return format.term(shape, stored)
