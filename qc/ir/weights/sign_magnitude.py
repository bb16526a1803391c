"""Stacked blocks of signs times low-rank magnitudes.

    w = sum_b (2 signs_b - 1) (left_b right_b)

Each block holds a sign for every weight, one bit, and its magnitude as a float16 product
[rows, rank] [rank, cols]: 1 + 16 rank (1 / rows + 1 / cols) bits. Blocks are fitted one after the
other to what those before leave, so the first blocks of a term are the term of fewer blocks.

Source: BitStack (Wang et al. 2024, arXiv 2410.23918), absolute value decomposition.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from qc.ir.weights.expression import Const, Expr, Load, ToFloat, total
from qc.ir.weights.notation import refuse_rest
from qc.ir.weights.packing import code_at, pack_codes, row_bytes, unpack_codes
from qc.ir.weights.weight import ArraySpec, Term, TermFormat

MOST_BLOCKS = 16
"""BitStack's own number: its residual is then below the rounding of float16."""

MOST_RANK = 16
"""BitStack's own rank. Every element is written out as so many products in each block."""


@dataclass(frozen=True)
class SignMagnitudeFormat(TermFormat):
    """`blocks` sign matrices, each with a magnitude of rank `rank`."""

    blocks: int
    rank: int = 1

    examples: ClassVar[tuple[str, ...]] = (
        "bitstack1·rank1", "bitstack2·rank4", "bitstack4·rank2", "bitstack3·rank16",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 1 <= self.blocks <= MOST_BLOCKS:
            raise ValueError(f"1 to {MOST_BLOCKS} blocks are stacked, not {self.blocks}")
        if not 1 <= self.rank <= MOST_RANK:
            raise ValueError(f"magnitudes have rank 1 to {MOST_RANK}, not {self.rank}")

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        rows, cols = shape
        return {
            "signs": ArraySpec((self.blocks, rows, row_bytes(cols, 1)), torch.uint8),
            "left": ArraySpec((self.blocks, rows, self.rank), torch.float16),
            "right": ArraySpec((self.blocks, self.rank, cols), torch.float16),
        }

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        def block(number: Expr) -> Expr:
            products: list[Expr] = [
                Load("left", (number, row, Const(k))) * Load("right", (number, Const(k), col))
                for k in range(self.rank)
            ]
            sign = code_at("signs", (number, row), col, 1) * 2 - 1
            return ToFloat(sign) * total(products)

        return total([block(Const(number)) for number in range(self.blocks)])

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        dense = torch.zeros(shape)
        for number in range(self.blocks):
            signs = unpack_codes(arrays["signs"][number], 1, shape[1]).float() * 2 - 1
            left, right = arrays["left"][number].float(), arrays["right"][number].float()
            # added up as `decode` does: a matrix product rounds a row by how many rows there are
            dense += signs * sum(left[:, k : k + 1] * right[k] for k in range(self.rank))
        return dense

    def rows(self, term: Term, index: Tensor) -> Term:
        kept = {name: term.stored[name][:, index] for name in ("signs", "left")}
        return self.term((len(index), term.shape[1]), {**kept, "right": term.stored["right"]})

    def nearest(self, values: Tensor) -> Term:
        """Fit block after block: the signs of what is left, and the best product for its magnitude.

        Minimises the squared error of each block given those before and its own signs, by singular
        vectors of |rest|. What is left is computed with the product as it is stored, so that later
        blocks take up its rounding. The sign of 0 is +.
        """
        rest = values.float()
        signs, left, right = [], [], []
        for _ in range(self.blocks):
            positive = rest >= 0
            a, b = leading_product(rest.abs(), self.rank)
            signs.append(pack_codes(positive.to(torch.uint8), 1))
            left.append(a)
            right.append(b)
            product = a.float() @ b.float()
            rest = rest - torch.where(positive, product, -product)
        stored = {
            "signs": torch.stack(signs), "left": torch.stack(left), "right": torch.stack(right)
        }  # fmt: skip
        return self.term((values.shape[0], values.shape[1]), stored)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        head = re.fullmatch(r"bitstack(\d+)", words[0])
        if head is None:
            return None
        ranks = [found for word in words[1:] if (found := re.fullmatch(r"rank(\d+)", word))]
        refuse_rest(
            [word for word in words[1:] if not re.fullmatch(r"rank\d+", word)]
            or [found[0] for found in ranks[1:]],
            "rank4 (one rank)",
        )
        return cls(int(head[1]), int(ranks[0][1]) if ranks else 1)

    def __str__(self) -> str:
        return f"bitstack{self.blocks}·rank{self.rank}"


def leading_product(magnitude: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return float16 factors [rows, rank], [rank, cols] of the nearest product of that rank.

    The singular values are shared between them evenly, as BitStack does; a matrix of fewer rows or
    columns than `rank` leaves zeros.
    """
    u, s, v = torch.linalg.svd(magnitude, full_matrices=False)
    root = s[:rank].sqrt()
    missing = rank - len(root)
    left = torch.nn.functional.pad(u[:, :rank] * root, (0, missing))
    right = torch.nn.functional.pad(root.unsqueeze(1) * v[:rank], (0, 0, 0, missing))
    return left.half(), right.half()
