"""A stored weight: the sum of its terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod

import torch
from torch import Tensor

from qc.ir.types import DTYPE_NAMES
from qc.ir.weights.expression import COL, ROW, Expr, TorchRendering, rename_arrays


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of one stored array."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TermFormat(ABC):
    """How a term is stored, without its values: frozen, hashable, printed in reports."""

    @abstractmethod
    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        """Return the stored arrays of a weight of `shape` [out, in]."""

    @abstractmethod
    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        """Return the f32 value of element (row, col) as an expression over the stored arrays."""

    @abstractmethod
    def term(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Term:
        """Make the term that these arrays store; ValueError where they do not fit."""

    def bits(self, shape: tuple[int, ...]) -> int:
        """Count the stored bits, everything included."""
        return 8 * sum(spec.bytes for spec in self.arrays(shape).values())

    def check(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> None:
        """Refuse arrays of another shape or dtype; ValueError names the first."""
        for name, spec in self.arrays(shape).items():
            if name not in arrays:
                raise ValueError(f"{self} of shape {list(shape)} has no array {name!r}")
            array = arrays[name]
            if tuple(array.shape) != spec.shape or array.dtype != spec.dtype:
                dtype = DTYPE_NAMES.get(array.dtype, str(array.dtype))
                raise ValueError(
                    f"array {name!r} of {self} is {dtype}{list(array.shape)}, "
                    f"expected {DTYPE_NAMES[spec.dtype]}{list(spec.shape)}"
                )


class Term(ABC):
    """One summand of a weight: its format and its stored arrays."""

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def format(self) -> TermFormat:
        """How this term is stored."""

    @abstractmethod
    def arrays(self) -> dict[str, Tensor]:
        """Return what is stored."""

    @abstractmethod
    def stacked(self, others: Sequence[Term]) -> Term:
        """Return one term whose rows are those of this term, then of `others` (same format)."""

    def rows(self, index: Tensor) -> Term | None:
        """Return the term of these rows alone; None where the format cannot take rows apart."""
        return None

    @property
    def bits(self) -> int:
        """The stored bits, metadata included."""
        return 8 * sum(a.numel() * a.element_size() for a in self.arrays().values())

    def dense(self) -> Tensor:
        """Return the float32 values [out, in]."""
        rows, cols = self.shape
        row = torch.arange(rows, dtype=torch.int32).unsqueeze(1)
        col = torch.arange(cols, dtype=torch.int32).unsqueeze(0)
        expr = self.format.decode(self.shape, ROW, COL)
        return TorchRendering(self.arrays(), row, col).value(expr).expand(rows, cols)


@dataclass(frozen=True)
class WeightFormat:
    """The formats of all terms; printed `int4·g128 + rank32`."""

    terms: tuple[TermFormat, ...]

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        """Return all stored arrays as "term.array"."""
        return {
            f"{i}.{name}": spec
            for i, term in enumerate(self.terms)
            for name, spec in term.arrays(shape).items()
        }

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        """Return the value of one element: the sum over the terms."""
        parts = (
            rename_arrays(t.decode(shape, row, col), f"{i}.") for i, t in enumerate(self.terms)
        )
        return reduce(lambda a, b: a + b, parts)

    def bits(self, shape: tuple[int, ...]) -> int:
        """Count the stored bits."""
        return sum(term.bits(shape) for term in self.terms)

    def __str__(self) -> str:
        return " + ".join(str(term) for term in self.terms)


@dataclass(frozen=True, eq=False)
class Weight:
    """A named tensor, stored as a sum of terms. `shape` is [out, in] for a matrix."""

    name: str
    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    dtype: torch.dtype = torch.float32

    @cached_property
    def format(self) -> WeightFormat:
        return WeightFormat(tuple(term.format for term in self.terms))

    @property
    def bits(self) -> int:
        return sum(term.bits for term in self.terms)

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bits_per_element(self) -> float:
        return self.bits / max(1, self.elements)

    def dense(self) -> Tensor:
        """Decode to a tensor of the logical dtype; terms are added in float32."""
        if len(self.terms) == 1:
            return self.terms[0].dense().to(self.dtype)
        total = reduce(torch.add, (term.dense().float() for term in self.terms))
        return total.to(self.dtype)

    def rows(self, index: Tensor, name: str) -> Weight | None:
        """Return a weight of these rows alone, called `name`; None where a term cannot."""
        terms = [term.rows(index) for term in self.terms]
        known = tuple(term for term in terms if term is not None)
        shape = (len(index), *self.shape[1:])
        return Weight(name, shape, known, self.dtype) if len(known) == len(terms) else None

    def arrays(self) -> dict[str, Tensor]:
        """Return all stored arrays as "term.array"."""
        return {
            f"{i}.{name}": array
            for i, term in enumerate(self.terms)
            for name, array in term.arrays().items()
        }
