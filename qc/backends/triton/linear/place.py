"""A term in a kernel: which operand stores it, where in its arrays, and how it is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from qc.backends.region import Repack
from qc.backends.triton.emit import Emission
from qc.backends.triton.expression import Rendering, arrays_read
from qc.ir.weights.affine import Sizes, simplify
from qc.ir.weights.expression import COL, ROW, Expr, Index, rename_arrays
from qc.ir.weights.structure import Part
from qc.ir.weights.weight import ArraySpec, TermFormat, nested


@dataclass(frozen=True)
class Place:
    """The matrix [outer, inner] that `format` stores in the arrays "prefix..." of an operand."""

    operand: int
    prefix: str
    format: TermFormat
    shape: tuple[int, int]

    @property
    def outer(self) -> int:
        return self.shape[0]

    @property
    def inner(self) -> int:
        return self.shape[1]

    @cached_property
    def specs(self) -> dict[str, ArraySpec]:
        """The stored arrays, under the names that the operand has for them."""
        return nested(self.prefix, self.format.arrays(self.shape))

    @cached_property
    def decode(self) -> Expr:
        """The value of element (ROW, COL) over the operand's arrays."""
        sizes: Sizes = {ROW: self.outer, COL: self.inner}
        decoded = self.format.decode(self.shape, ROW, COL)
        return simplify(rename_arrays(decoded, f"{self.prefix}."), sizes)

    def named(self, expr: Expr) -> Expr:
        """Return an expression of the format over the operand's arrays."""
        return rename_arrays(expr, f"{self.prefix}.")

    def part(self, part: Part) -> Place:
        """Return the place of a matrix inside this term."""
        return Place(self.operand, f"{self.prefix}.{part.prefix}", part.format, part.shape)

    def function(
        self,
        emission: Emission,
        expr: Expr,
        indices: tuple[Index, ...],
        repacked: Mapping[str, tuple[ArraySpec, Repack]] | None = None,
        raw: bool = False,
    ) -> tuple[str, str]:
        """Write a device function that computes `expr`; return its name and the arrays to pass.

        `repacked` are arrays that are laid out for this kernel. A `raw` load is not widened.
        """
        known = repacked or {}
        specs = {**self.specs, **{name: spec for name, (spec, _) in known.items()}}
        pointers, actual = {}, []
        for number, array in enumerate(arrays_read(expr)):
            pointers[array] = f"a{number}"
            repack = known[array][1] if array in known else None
            actual.append(emission.weight(self.operand, array, specs[array].dtype, repack))
        name = emission.function(Rendering(specs, pointers, indices, raw), expr)
        return name, "".join(f", {each}" for each in actual)

    def stored(self, emission: Emission, name: str) -> str:
        """Pass one array of the term as it is stored; return the parameter."""
        array = f"{self.prefix}.{name}"
        return emission.weight(self.operand, array, self.specs[array].dtype)


def dtype_of(place: Place, name: str) -> torch.dtype:
    """Return how an array of a term is stored."""
    return place.specs[f"{place.prefix}.{name}"].dtype
