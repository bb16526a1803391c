"""Tensor trains (matrix product operators): a matrix as a product of two or three small cores.

out = o1 o2 o3 and in = i1 i2 i3 are cut into factors as equal as can be; with bonds a and b

    W[o1 o2 o3, i1 i2 i3] = sum over a, b of A[o1, i1, a] B[a, o2, i2, b] C[b, o3, i3]

(two sites: no B). Each core is stored as the matrix that its step of the product needs, in the
order in which x meets them: C as [(b o3), i3], B as [(a o2), (i2 b)], A as [o1, (i1 a)]. Printed
`train2·bond16`, `train3·bond16·factors(int8·row)`. A bond is `bond` wide, or less where all of it
is less. Bytes shrink with the bond, operations hardly: see `structure`.

Source: CompactifAI (Tomut et al. 2024), section 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from math import prod
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from qc.ir.weights.expression import Expr, Sum, as_expr, rename_arrays
from qc.ir.weights.low_rank import HALF, balanced_factors, project
from qc.ir.weights.notation import refuse_rest, take_argument
from qc.ir.weights.parts import arrays_of, unused_index
from qc.ir.weights.structure import Chain, Part, Step
from qc.ir.weights.weight import ArraySpec, Term, TermFormat, inner_term, nested

Sites = Literal[2, 3]


@dataclass(frozen=True)
class TensorTrainFormat(TermFormat):
    """`sites` cores that share bonds of at most `bond`, each stored as `factors`."""

    sites: Sites
    bond: int
    factors: TermFormat = HALF

    examples: ClassVar[tuple[str, ...]] = (
        "train2·bond16", "train3·bond16", "train2·bond4·factors(dense f32)",
        "train2·bond32·factors(int8·row)", "train3·bond8·factors(int4·g32·min)",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.sites not in (2, 3):
            raise ValueError(f"a train has 2 or 3 cores, not {self.sites}")
        if self.bond < 1:
            raise ValueError(f"a bond is at least 1 wide, not {self.bond}")

    def legs(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return o1, o2, ... and i1, i2, ..."""
        outs, ins = (factorise(size, self.sites) for size in shape)
        return outs, ins

    def bonds(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the width left of the first core (1), of each bond, right of the last (1)."""
        sizes = [o * i for o, i in zip(*self.legs(shape), strict=True)]
        cuts = range(1, self.sites)
        widths = (min(self.bond, prod(sizes[:cut]), prod(sizes[cut:])) for cut in cuts)
        return (1, *widths, 1)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Return the cores, each as the matrix [(bond o), (i next bond)]."""
        bonds = self.bonds(shape)
        return tuple(
            Part(f"core{n + 1}", self.factors, (bonds[n] * o, i * bonds[n + 1]))
            for n, (o, i) in enumerate(zip(*self.legs(shape), strict=True))
        )

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        stored: dict[str, ArraySpec] = {}
        for part in self.parts(shape):
            stored |= nested(part.prefix, part.format.arrays(part.shape))
        return stored

    def structure(self, shape: tuple[int, ...]) -> Chain:
        """Contract x with the last core first.

        x stands as [i1 i2, i3]; core 3 makes it [i1 i2, (b o3)], core 2 [i1, (a o2), o3] and core 1
        [o1, o2 o3]. Each intermediate is `bond` times as large as what x and y have of it.
        """
        outs, ins = self.legs(shape)
        steps = [
            Step(prod(ins[:n]), part, prod(outs[n + 1 :]))
            for n, part in enumerate(self.parts(shape))
        ]
        return Chain(tuple(reversed(steps)))

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        bonds = self.bonds(shape)
        counted = [unused_index(f"bond{n}", row, col) for n in range(1, self.sites)]
        at: list[Expr] = [as_expr(0), *counted, as_expr(0)]  # at the ends a bond is 1 wide
        value = self.core_at(self.sites - 1, shape, row, col, at)
        for n in reversed(range(self.sites - 1)):
            product = self.core_at(n, shape, row, col, at) * value
            value = Sum(counted[n], as_expr(0), as_expr(bonds[n + 1]), product)
        return value

    def core_at(
        self, n: int, shape: tuple[int, ...], row: Expr, col: Expr, at: Sequence[Expr]
    ) -> Expr:
        """Read what core `n` has for an element, at these places on the bonds."""
        outs, ins = self.legs(shape)
        part = self.parts(shape)[n]
        core_row = at[n] * outs[n] + digit(row, outs, n)
        core_col = digit(col, ins, n) * self.bonds(shape)[n + 1] + at[n + 1]
        return rename_arrays(self.factors.decode(part.shape, core_row, core_col), f"{part.prefix}.")

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        for size in shape:
            if min(factorise(size, self.sites)) < 2:
                other = "" if self.sites == 2 else f"train2·bond{self.bond} or "
                return (
                    f"{size} is no product of {self.sites} factors above 1; "
                    f"{other}rank{self.bond} may do"
                )
        for part in self.parts(shape):
            if (why := part.format.refusal(part.shape)) is not None:
                return f"the cores of {self}: {why}"
        return None

    def verify(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> None:
        for part in self.parts(shape):
            inner_term(part.prefix, part.format, part.shape, arrays)

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        cores = []
        for part, o, i in zip(self.parts(shape), *self.legs(shape), strict=True):
            matrix = inner_term(part.prefix, part.format, part.shape, arrays).dense().float()
            cores.append(matrix.view(part.shape[0] // o, o, i, part.shape[1] // i))
        return reduce(joined, cores).reshape(shape)

    def nearest(self, values: Tensor) -> Term:
        """Cut with one truncated singular value decomposition after the other.

        ||W - W'||_F^2 is at most the sum of all singular values squared that are cut off, and the
        least possible for two sites. The kept ones are split evenly between the cores beside their
        bond: no core lies far from 1, whatever the scale of the matrix.
        """
        shape = (values.shape[0], values.shape[1])
        parts, stored = self.parts(shape), dict[str, Tensor]()
        for part, core in zip(parts, self.cores(values), strict=True):
            stored |= arrays_of(**{part.prefix: part.format.nearest(core.reshape(part.shape))})
        return self.term(shape, stored)

    def cores(self, values: Tensor) -> list[Tensor]:
        """Return the cores of a matrix, float32, row-major as [bond, o, i, next bond]."""
        outs, ins = self.legs(tuple(values.shape))
        order = [axis for n in range(self.sites) for axis in (n, n + self.sites)]
        paired = values.reshape(*outs, *ins).permute(order)
        bonds = self.bonds(tuple(values.shape))
        matrix = paired.reshape(outs[0] * ins[0], -1)
        if self.sites == 2:
            return list(balanced_factors(matrix, bonds[1]))
        basis, rest = project(matrix, bonds[1])
        root = rest.norm(dim=1).sqrt()
        root = torch.where(root == 0, torch.ones_like(root), root)
        # The rest is cut before it is scaled: only so are its singular values those of the matrix.
        middle, last = balanced_factors(rest.reshape(-1, outs[2] * ins[2]), bonds[2])
        middle = middle.view(bonds[1], -1) / root.unsqueeze(1)
        return [(basis * root).float().contiguous(), middle.float(), last]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        head = re.fullmatch(r"train(\d+)", words[0])
        if head is None:
            return None
        rest = list(words[1:])
        factors = take_argument(rest, "factors")
        bond = re.fullmatch(r"bond(\d+)", rest.pop(0)) if rest else None
        if bond is None:
            raise ValueError(f"{words[0]} needs the width of its bonds, as in train2·bond16")
        refuse_rest(rest, "factors(...)")
        sites: Sites = 2 if int(head[1]) == 2 else 3
        if sites != int(head[1]):
            raise ValueError(f"a train has 2 or 3 cores, not {head[1]}")
        return cls(sites, int(bond[1]), factors or HALF)

    def __str__(self) -> str:
        factors = "" if self.factors == HALF else f"·factors({self.factors})"
        return f"train{self.sites}·bond{self.bond}{factors}"


def digit(index: Expr, legs: tuple[int, ...], site: int) -> Expr:
    """Return the part of a row or column that belongs to one site."""
    high = index // prod(legs[site + 1 :])
    return high if site == 0 else high % legs[site]


def joined(left: Tensor, right: Tensor) -> Tensor:
    """Contract two cores [bond, o, i, next bond] over the bond between them."""
    pair = torch.einsum("aoib,bpjc->aopijc", left, right)
    return pair.flatten(3, 4).flatten(1, 2)


@cache
def factorise(size: int, count: int) -> tuple[int, ...]:
    """Return `count` factors of `size`, ascending, their sum the least: 576 = 8 * 8 * 9."""
    if count == 1 or size < 1:
        return (size,) * count
    found = [
        tuple(sorted((first, *factorise(size // first, count - 1))))
        for first in divisors_up_to_root(size, count)
    ]
    return min(found, key=sum)


def divisors_up_to_root(size: int, count: int) -> list[int]:
    """List what can be the least of `count` factors."""
    return [n for n in range(1, int(size ** (1 / count)) + 2) if n <= size and size % n == 0]
