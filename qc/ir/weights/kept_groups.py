"""Group sparsity: only some groups of `size` inputs of a row are stored (BSR with 1 x size blocks).

The kept groups, one below the other, are the rows of an inner matrix [kept, size]: in
`kept50%·g16(int4·row·zero)` each has its own scale and zero point. A kept group costs 2 bytes for
its place in the row (4 above 32768 groups), a row 4 bytes for where its groups start. How many
groups are kept follows from the shape: the share, rounded up.

Source: GQSA (Zeng et al. 2024), section 3, where pruned groups are the groups of quantization.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from qc.ir.weights.expression import (
    ENTRY,
    LANE,
    ROW,
    Expr,
    Load,
    Sum,
    ToFloat,
    equal,
    rename_arrays,
)
from qc.ir.weights.notation import parse_term, refuse_rest
from qc.ir.weights.parts import (
    arrays_of,
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
from qc.ir.weights.structure import Entries, Part
from qc.ir.weights.weight import ArraySpec, Term, TermFormat, inner_term, nested


@dataclass(frozen=True)
class KeptGroupsFormat(TermFormat):
    """`per_million` of a million groups of `size` inputs are kept, as rows of `inner`."""

    per_million: int
    size: int
    inner: TermFormat

    examples: ClassVar[tuple[str, ...]] = (
        "kept50%·g16(int4·row·zero)", "kept70%·g16(int4·row)", "kept25%·g8(dense f16)",
        "kept50%·g64(int4·g32·min)", "kept50%·g16(int4·row·scale(uint8·o16))",
        "kept40%·g32(kept50%·g4(int8·row))",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_share(self.per_million)
        if self.size < 1:
            raise ValueError(f"a group holds at least one weight, not {self.size}")

    def groups(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the rows, and the groups per row, kept or not."""
        return shape[0], shape[1] // self.size

    def kept(self, shape: tuple[int, ...]) -> int:
        """Return how many groups a matrix of `shape` stores."""
        rows, groups = self.groups(shape)
        return share_of(self.per_million, rows * groups)

    def part(self, shape: tuple[int, ...]) -> Part:
        """Return the matrix of kept groups."""
        return Part("inner", self.inner, (self.kept(shape), self.size))

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        part, (rows, groups) = self.part(shape), self.groups(shape)
        return {
            "starts": ArraySpec((rows + 1,), torch.int32),
            "places": ArraySpec((part.shape[0],), index_dtype(groups)),
            **nested(part.prefix, self.inner.arrays(part.shape)),
        }

    def weight_at(self, shape: tuple[int, ...], entry: Expr, lane: Expr) -> Expr:
        """Read weight `lane` of a kept group."""
        part = self.part(shape)
        return rename_arrays(self.inner.decode(part.shape, entry, lane), f"{part.prefix}.")

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        entry = unused_index(ENTRY.axis, row, col)
        here = ToFloat(equal(Load("places", (entry,)), col // self.size))
        value = self.weight_at(shape, entry, col % self.size)
        return Sum(entry, Load("starts", (row,)), Load("starts", (row + 1,)), here * value)

    def structure(self, shape: tuple[int, ...]) -> Entries:
        return Entries(
            start=Load("starts", (ROW,)),
            stop=Load("starts", (ROW + 1,)),
            column=Load("places", (ENTRY,)) * self.size,
            value=self.weight_at(shape, ENTRY, LANE),
            width=self.size,
        )

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        cols = shape[1]
        if cols % self.size:
            fits = max(g for g in range(1, min(self.size, cols) + 1) if cols % g == 0)
            return f"groups of {self.size} do not divide {cols} inputs; g{fits} would"
        why = self.inner.refusal(self.part(shape).shape)
        return None if why is None else f"the groups of {self}: {why}"

    def stored_inner(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Term:
        """Return the kept groups as a term, checked."""
        part = self.part(shape)
        return inner_term(part.prefix, part.format, part.shape, arrays)

    def verify(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> None:
        verify_starts(arrays["starts"], self.kept(shape))
        verify_positions("places", arrays["places"], self.groups(shape)[1], arrays["starts"])
        self.stored_inner(shape, arrays)

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        dense = torch.zeros(*self.groups(shape), self.size)
        at = entry_rows(arrays["starts"]), arrays["places"].long()
        dense[at] = self.stored_inner(shape, arrays).dense().float()
        return dense.view(shape)

    def nearest(self, values: Tensor) -> Term:
        """Keep the groups with the largest L2 norm of the whole matrix, as near as `inner` can.

        Minimises ||W - W'||_F where the inner format loses nothing.
        """
        shape = (values.shape[0], values.shape[1])
        norms = values.reshape(*self.groups(shape), self.size).norm(dim=2)
        return kept_groups_term(self, values, largest(norms, self.kept(shape)))

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        if not words[0].startswith("kept"):
            return None
        head = re.fullmatch(r"kept(\d+(?:\.\d+)?)%", words[0])
        group = re.fullmatch(r"g(\d+)\((.*)\)", words[1], re.DOTALL) if len(words) > 1 else None
        if head is None or group is None:
            raise ValueError("kept groups are written kept50%·g16(...)")
        refuse_rest(words[2:], "the share and the format of the groups, as in kept50%·g16(...)")
        return cls(parse_percent(head[1]), int(group[1]), parse_term(group[2]))

    def __str__(self) -> str:
        return f"kept{percent(self.per_million)}·g{self.size}({self.inner})"


def kept_groups_term(format: KeptGroupsFormat, values: Tensor, kept: Tensor) -> Term:
    """Store the groups of `values` [out, in] that `kept` (bool [out, groups]) marks.

    ValueError unless it marks as many as the format stores.
    """
    shape = (values.shape[0], values.shape[1])
    if int(kept.sum()) != format.kept(shape):
        raise ValueError(
            f"{int(kept.sum())} groups are marked, "
            f"{format} of {list(shape)} stores {format.kept(shape)}"
        )
    groups = values.reshape(*format.groups(shape), format.size)
    stored = {
        "starts": row_starts(kept),
        "places": kept.nonzero()[:, 1].to(index_dtype(kept.shape[1])),
        **arrays_of(inner=format.inner.nearest(groups[kept])),
    }
    return format.term(shape, stored)
