"""A stored weight: the sum of its terms.

A `TermFormat` says how a matrix is stored, without its values; a `Term` is such a format with the
stored arrays; a `Weight` is a named sum of terms. A new storage format is one file with one
subclass of `TermFormat`: see docs/add-a-format.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from qc.ir.types import DTYPE_NAMES
from qc.ir.weights.expression import COL, ROW, Expr, TorchRendering, rename_arrays, total
from qc.ir.weights.structure import Structure

if TYPE_CHECKING:
    from qc.ir.weights.rounding import Ranges, Rounding

ELEMENTS_AT_ONCE = 1 << 22
"""Elements that the generic decoding holds in float32 at a time."""


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of one stored array."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TermFormat(ABC):
    """How a term is stored, without its values: frozen, hashable, printed in reports.

    Shapes are [out, in]. Only `arrays`, `decode`, `nearest` and `parse` must be written; the rest
    have answers that are right for every format. `examples` are printed forms that tests try and
    benchmarks time.
    """

    examples: ClassVar[tuple[str, ...]] = ()
    takes_outliers: ClassVar[bool] = False
    """In a sum, the values are chosen first, so that the other terms need not span outliers."""

    @abstractmethod
    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        """Return the stored arrays of a weight of `shape`."""

    @abstractmethod
    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        """Return the f32 value of element (row, col) as an expression over the stored arrays."""

    @abstractmethod
    def nearest(self, values: Tensor) -> Term:
        """Store float32 values as well as the format can without data; says what it minimises."""

    @classmethod
    @abstractmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        """Read the printed form, split at its dots; None where it is of another format.

        ValueError where the first word is this format's and another is wrong.
        """

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Say why a weight of `shape` cannot be stored so, and what could; None where it can."""
        return None

    def structure(self, shape: tuple[int, ...]) -> Structure | None:
        """Return how products with this matrix are built of smaller ones; None: element by
        element."""
        return None

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the values, float32 unless they are stored as another float."""
        return decoded(self, shape, arrays)

    def verify(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> None:
        """Refuse stored values that no weight has, such as an index out of range; ValueError
        starts with "array 'name'"."""
        return None

    def rows(self, term: Term, index: Tensor) -> Term | None:
        """Return the term of some rows alone; None where they cannot be taken apart."""
        return None

    def rounding(self, shape: tuple[int, ...], ranges: Ranges = "extremes") -> Rounding | None:
        """Return what rounds a matrix of `shape` column by column; None where nothing does."""
        return None

    def turned(self) -> TermFormat | None:
        """Return the format with what lies along the inputs along the outputs and the other way
        round; None where that is no format."""
        return None

    def resized(self, bits: int | None = None, group: int | None = None) -> TermFormat | None:
        """Return the format with other bits a code, or with other groups along the inputs; None
        where it has none."""
        return None

    def term(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Term:
        """Make the term that these arrays store; ValueError where they do not fit."""
        why = self.refusal(shape)
        if why is not None:
            raise ValueError(why)
        self.check(shape, arrays)
        if not any(array.is_meta for array in arrays.values()):
            self.verify(shape, arrays)
        return Term(self, shape, {name: arrays[name] for name in self.arrays(shape)})

    def planned(self, shape: tuple[int, ...]) -> Term:
        """Return a term of this format without values: arrays on torch's meta device."""
        stored = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            for name, spec in self.arrays(shape).items()
        }
        return self.term(shape, stored)

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


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of a weight: its format and its stored arrays. Made by `TermFormat.term`."""

    format: TermFormat
    shape: tuple[int, ...]
    stored: Mapping[str, Tensor]

    def arrays(self) -> dict[str, Tensor]:
        """Return what is stored."""
        return dict(self.stored)

    @property
    def bits(self) -> int:
        """The stored bits, metadata included."""
        return 8 * sum(a.numel() * a.element_size() for a in self.stored.values())

    def dense(self) -> Tensor:
        """Return the values [out, in]."""
        return self.format.dense(self.shape, self.stored)

    def rows(self, index: Tensor) -> Term | None:
        """Return the term of these rows alone; None where the format cannot take rows apart."""
        return self.format.rows(self, index)


def decoded(format: TermFormat, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
    """Evaluate the decode expression for every element: float32[out, in]."""
    rows, cols = shape
    expr = format.decode(shape, ROW, COL)
    at_once = max(1, ELEMENTS_AT_ONCE // max(1, cols))
    col = torch.arange(cols, dtype=torch.int32).unsqueeze(0)
    parts = []
    for start in range(0, rows, at_once):
        row = torch.arange(start, min(rows, start + at_once), dtype=torch.int32).unsqueeze(1)
        rendering = TorchRendering(arrays, {ROW.axis: row, COL.axis: col})
        parts.append(rendering.value(expr).expand(len(row), cols))
    return torch.cat(parts) if parts else torch.zeros(shape)


def nested(prefix: str, specs: Mapping[str, ArraySpec]) -> dict[str, ArraySpec]:
    """Name the arrays of a term inside another one."""
    return {f"{prefix}.{name}": spec for name, spec in specs.items()}


def inside(prefix: str, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the arrays that `nested` named."""
    start = f"{prefix}."
    return {name.removeprefix(start): a for name, a in arrays.items() if name.startswith(start)}


def inner_term(
    prefix: str, format: TermFormat, shape: tuple[int, ...], arrays: Mapping[str, Tensor]
) -> Term:
    """Return a term that is stored inside another one, checked; ValueError names the array as
    the outer term does."""
    try:
        return format.term(shape, inside(prefix, arrays))
    except ValueError as error:
        raise ValueError(str(error).replace("array '", f"array '{prefix}.", 1)) from None


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
        return total(
            [rename_arrays(t.decode(shape, row, col), f"{i}.") for i, t in enumerate(self.terms)]
        )

    def bits(self, shape: tuple[int, ...]) -> int:
        """Count the stored bits."""
        return sum(term.bits(shape) for term in self.terms)

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Say why a weight of `shape` cannot be stored so; None where it can."""
        found = (term.refusal(shape) for term in self.terms)
        return next((why for why in found if why is not None), None)

    def planned(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Weight:
        """Return a weight of this format without values; ValueError where it is refused."""
        return Weight(name, shape, tuple(term.planned(shape) for term in self.terms), dtype)

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
        summed = reduce(torch.add, (term.dense().float() for term in self.terms))
        return summed.to(self.dtype)

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
            for name, array in term.stored.items()
        }
