"""Plain storage: float32, float16 or bfloat16 values of any shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from qc.ir.types import DTYPE_NAMES, DTYPES_BY_NAME
from qc.ir.weights.expression import Expr, Load
from qc.ir.weights.mapped import MappedArrays, MappedTensor, mapped_term
from qc.ir.weights.weight import ArraySpec, Term, TermFormat, Weight


@dataclass(frozen=True)
class DenseFormat(TermFormat):
    """Values as they are, in `dtype`. Printed `dense f16`; `f16` is read too."""

    dtype: torch.dtype = torch.float32
    examples: ClassVar[tuple[str, ...]] = ("dense f32", "dense f16", "dense bf16")

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return {"values": ArraySpec(shape, self.dtype)}

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        return Load("values", (row, col))

    def nearest(self, values: Tensor) -> Term:
        return self.term(tuple(values.shape), {"values": values.to(self.dtype)})

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        name = words[0].removeprefix("dense ")
        if name in ("f32", "f16", "bf16") and len(words) == 1:
            return cls(DTYPES_BY_NAME[name])
        return None

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["values"]

    def rows(self, term: Term, index: Tensor) -> Term:
        if not bool((index.diff() == 1).all()):
            return dense_term(term.stored["values"][index])
        first, stored = int(index[0]), term.stored
        if isinstance(stored, MappedArrays):
            return dense_in_file(stored.places["values"].rows(first, len(index)))
        return dense_term(stored["values"][first : first + len(index)])

    def __str__(self) -> str:
        return f"dense {DTYPE_NAMES[self.dtype]}"


def dense_term(values: Tensor) -> Term:
    """Store a tensor as it is."""
    return DenseFormat(values.dtype).term(tuple(values.shape), {"values": values})


def dense_in_file(place: MappedTensor) -> Term:
    """Leave a tensor in its file."""
    return mapped_term(DenseFormat(place.dtype), place.shape, MappedArrays({"values": place}))


def dense_weight(name: str, values: Tensor) -> Weight:
    """Store a tensor as it is; its logical dtype is its own."""
    values = values.detach()
    return Weight(name, tuple(values.shape), (dense_term(values),), values.dtype)
