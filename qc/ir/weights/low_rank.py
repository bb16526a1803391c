"""Low rank: W = up @ down, up [out, rank] and down [rank, in] each stored as a term.

Printed `rank16` (float16 factors) or `rank16·factors(int8·row)`.

Sources: ZeroQuant-V2 (Yao et al. 2023), section 5, low-rank compensation of the rounding error,
factors in 8 bits as well; SVDQuant (Li et al. 2024), section 4.2, a 16-bit branch that takes the
leading singular directions before the rest is rounded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from qc.ir.weights.dense import DenseFormat
from qc.ir.weights.expression import Expr, Sum, as_expr, rename_arrays
from qc.ir.weights.notation import refuse_rest, take_argument
from qc.ir.weights.parts import arrays_of, unused_index
from qc.ir.weights.structure import Chain, Part, Step
from qc.ir.weights.weight import ArraySpec, Term, TermFormat, inner_term, nested

HALF = DenseFormat(torch.float16)


@dataclass(frozen=True)
class LowRankFormat(TermFormat):
    """The product of two matrices that share a side of `rank`, both stored as `factors`."""

    rank: int
    factors: TermFormat = HALF

    examples: ClassVar[tuple[str, ...]] = (
        "rank1", "rank16", "rank4·factors(dense f32)", "rank32·factors(int8·row)",
        "rank8·factors(int4·g32·min)",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"the rank is at least 1, not {self.rank}")

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, Part]:
        """Return the factors, the one that reads x last."""
        rows, cols = shape
        up, down = (rows, self.rank), (self.rank, cols)
        return Part("up", self.factors, up), Part("down", self.factors, down)

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        up, down = (nested(p.prefix, p.format.arrays(p.shape)) for p in self.parts(shape))
        return up | down

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        up, down = self.parts(shape)
        at = unused_index("rank", row, col)
        left = rename_arrays(self.factors.decode(up.shape, row, at), "up.")
        right = rename_arrays(self.factors.decode(down.shape, at, col), "down.")
        return Sum(at, as_expr(0), as_expr(self.rank), left * right)

    def structure(self, shape: tuple[int, ...]) -> Chain:
        up, down = self.parts(shape)
        return Chain((Step(1, down, 1), Step(1, up, 1)))

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        most = min(shape)
        if self.rank > most:
            return f"rank {self.rank} is more than {shape[0]} x {shape[1]} has: rank{most} is all"
        for part in self.parts(shape):
            if (why := part.format.refusal(part.shape)) is not None:
                return f"the factors of {self}: {why}"
        return None

    def factor(self, part: Part, arrays: Mapping[str, Tensor]) -> Term:
        """Return one factor as a term, checked."""
        return inner_term(part.prefix, part.format, part.shape, arrays)

    def verify(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> None:
        for part in self.parts(shape):
            self.factor(part, arrays)

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        up, down = (self.factor(part, arrays).dense().float() for part in self.parts(shape))
        return up @ down

    def rows(self, term: Term, index: Tensor) -> Term | None:
        up, down = (self.factor(part, term.stored) for part in self.parts(term.shape))
        shape = (len(index), term.shape[1])
        if self.refusal(shape) is not None or (chosen := up.rows(index)) is None:
            return None
        return self.term(shape, arrays_of(up=chosen, down=down))

    def nearest(self, values: Tensor) -> Term:
        """Truncate the singular value decomposition, each singular value split evenly.

        Minimises ||W - up down||_F for factors that are not rounded (Eckart and Young 1936); the
        factors are then stored as near as their format can.
        """
        up, down = balanced_factors(values, self.rank)
        stored = arrays_of(up=self.factors.nearest(up), down=self.factors.nearest(down))
        return self.term(tuple(values.shape), stored)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        head = re.fullmatch(r"rank(\d+)", words[0])
        if head is None:
            return None
        rest = list(words[1:])
        factors = take_argument(rest, "factors")
        refuse_rest(rest, "factors(...)")
        return cls(int(head[1]), factors or HALF)

    def __str__(self) -> str:
        factors = "" if self.factors == HALF else f"·factors({self.factors})"
        return f"rank{self.rank}{factors}"


def low_rank_term(format: LowRankFormat, up: Tensor, down: Tensor) -> Term:
    """Store given factors, up [out, rank] and down [rank, in]."""
    stored = arrays_of(up=format.factors.nearest(up), down=format.factors.nearest(down))
    return format.term((up.shape[0], down.shape[1]), stored)


def balanced_factors(values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U sqrt(S) [out, rank] and sqrt(S) V^T [rank, in] of the truncated decomposition."""
    if values.shape[0] > values.shape[1]:
        right, left = balanced_factors(values.T, rank)
        return left.T.contiguous(), right.T.contiguous()
    basis, rest = project(values, rank)
    root = rest.norm(dim=1).sqrt()
    root = torch.where(root == 0, torch.ones_like(root), root)
    left = (basis * root).float().contiguous()  # eigenvectors come column by column
    return left, (rest / root.unsqueeze(1)).float()


def project(values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U [m, rank] and U^T W = S V^T [rank, n] for m <= n, in float64.

    U are the leading eigenvectors of W W^T: several times faster than a full decomposition, and
    as exact, for what float64 loses by squaring is below what float32 values hold.
    """
    wide = values.double()
    vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors
    basis = vectors[:, vectors.shape[1] - rank :].flip(1)
    return basis, basis.T @ wide
