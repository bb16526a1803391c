"""Plain storage: float32, float16 or bfloat16 values of any shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qc.ir.types import DTYPE_NAMES
from qc.ir.weights.expression import Expr, Load
from qc.ir.weights.weight import ArraySpec, Term, TermFormat, Weight


@dataclass(frozen=True)
class DenseFormat(TermFormat):
    """Values as they are, in `dtype`."""

    dtype: torch.dtype = torch.float32

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {"values": ArraySpec(shape, self.dtype)}

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        return Load("values", (row, col))

    def term(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Dense:
        self.check(shape, arrays)
        return Dense(arrays["values"])

    def __str__(self) -> str:
        return f"dense {DTYPE_NAMES[self.dtype]}"


@dataclass(frozen=True, eq=False)
class Dense(Term):
    """A tensor stored as it is (often a view of a memory-mapped file)."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]  # read-only here
        return tuple(self.values.shape)

    @property
    def format(self) -> DenseFormat:
        return DenseFormat(self.values.dtype)

    def arrays(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def stacked(self, others: Sequence[Term]) -> Dense:
        return Dense(torch.cat([self.values, *(o.arrays()["values"] for o in others)]))

    def rows(self, index: Tensor) -> Dense:
        if bool((index.diff() == 1).all()):
            first = int(index[0])
            return Dense(self.values[first : first + len(index)])  # a view: the file stays mapped
        return Dense(self.values[index])

    def dense(self) -> Tensor:
        return self.values


def dense_weight(name: str, values: Tensor) -> Weight:
    """Store a tensor as it is; its logical dtype is its own."""
    values = values.detach()
    return Weight(name, tuple(values.shape), (Dense(values),), values.dtype)
