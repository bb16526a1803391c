"""A term on some input channels: channels that matter more, or a matrix of several widths.

`columns20%(int4·row·zero)` stores a fifth of the channels so, `columns8(dense f16)` eight of them;
elsewhere the term is zero. Terms whose channels partition the matrix give every channel its own
width: `columns20%(int4·row) + columns80%(int2·row)`. The index costs 2 bytes a channel (4 above
32768 inputs), the inner term is a matrix [out, channels] like any other.

Sources: PTQ1.61 (Zhao et al. 2025), section 3.2, salient channels; SliM-LLM (Huang et al. 2024),
section 3.2, groups of channels of three widths; SqueezeLLM (Kim et al. 2023), section 4.2, dense
columns beside the sparse entries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from qc.ir.weights.expression import Expr, Load, Sum, ToFloat, as_expr, equal, rename_arrays
from qc.ir.weights.notation import parse_term, refuse_rest
from qc.ir.weights.parts import (
    arrays_of,
    check_share,
    index_dtype,
    largest,
    parse_percent,
    percent,
    share_of,
    unused_index,
    verify_positions,
)
from qc.ir.weights.structure import Part, Selected
from qc.ir.weights.weight import ArraySpec, Term, TermFormat, inner_term, nested


@dataclass(frozen=True)
class OnColumnsFormat(TermFormat):
    """`inner` on `count` channels, or on `per_million` of a million, rounded up; one is given."""

    inner: TermFormat
    count: int | None = None
    per_million: int | None = None

    examples: ClassVar[tuple[str, ...]] = (
        "columns20%(int4·row·zero)", "columns80%(int2·g16·min)", "columns1(dense f16)",
        "columns8(int8·row)", "columns50%(rank1)", "columns50%(sparse5%)",
    )  # fmt: skip
    takes_outliers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.count is None) == (self.per_million is None):
            raise ValueError("columns are given as a count or as a share, one of the two")
        if self.count is not None and self.count < 1:
            raise ValueError(f"there is at least one column, not {self.count}")
        if self.per_million is not None:
            check_share(self.per_million)

    def channels(self, cols: int) -> int:
        """Return how many of the input channels are stored."""
        if self.per_million is not None:
            return share_of(self.per_million, cols)
        return self.count or 0

    def part(self, shape: tuple[int, ...]) -> Part:
        """Return the inner matrix."""
        return Part("inner", self.inner, (shape[0], self.channels(shape[1])))

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        part = self.part(shape)
        index = ArraySpec((part.shape[1],), index_dtype(shape[1]))
        return {"index": index, **nested(part.prefix, self.inner.arrays(part.shape))}

    def decode(self, shape: tuple[int, ...], row: Expr, col: Expr) -> Expr:
        part = self.part(shape)
        at = unused_index("channel", row, col)
        here = ToFloat(equal(Load("index", (at,)), col))
        inner = rename_arrays(self.inner.decode(part.shape, row, at), f"{part.prefix}.")
        return Sum(at, as_expr(0), as_expr(part.shape[1]), here * inner)

    def structure(self, shape: tuple[int, ...]) -> Selected:
        return Selected("index", self.part(shape))

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        channels = self.channels(shape[1])
        if channels > shape[1]:
            return f"{self} needs {channels} input channels, there are {shape[1]}"
        why = self.inner.refusal((shape[0], channels))
        return None if why is None else f"the channels of {self}: {why}"

    def stored_inner(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Term:
        """Return the inner matrix as a term, checked."""
        part = self.part(shape)
        return inner_term(part.prefix, part.format, part.shape, arrays)

    def verify(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> None:
        verify_positions("index", arrays["index"], shape[1])
        self.stored_inner(shape, arrays)

    def dense(self, shape: tuple[int, ...], arrays: Mapping[str, Tensor]) -> Tensor:
        dense = torch.zeros(shape)
        dense[:, arrays["index"].long()] = self.stored_inner(shape, arrays).dense().float()
        return dense

    def rows(self, term: Term, index: Tensor) -> Term | None:
        inner = self.stored_inner(term.shape, term.stored).rows(index)
        if inner is None:
            return None
        return columns_term(self, term.shape[1], term.stored["index"], inner)

    def nearest(self, values: Tensor) -> Term:
        """Store the channels with the largest L2 norm, each as near as `inner` can.

        Minimises ||W - W'||_F where the inner format loses nothing.
        """
        shape = (values.shape[0], values.shape[1])
        chosen = largest(values.norm(dim=0), self.channels(shape[1]))
        index = chosen.nonzero().flatten()
        return columns_term(self, shape[1], index, self.inner.nearest(values[:, index]))

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self | None:
        if not words[0].startswith("columns"):
            return None
        head = re.fullmatch(r"columns(?:(\d+)|(\d+(?:\.\d+)?)%)\((.*)\)", words[0], re.DOTALL)
        if head is None:
            raise ValueError("columns are written columns8(...) or columns20%(...)")
        refuse_rest(words[1:], "the format of the columns alone, in parentheses")
        inner = parse_term(head[3])
        if head[1] is not None:
            return cls(inner, count=int(head[1]))
        return cls(inner, per_million=parse_percent(head[2]))

    def __str__(self) -> str:
        share = self.count if self.per_million is None else percent(self.per_million)
        return f"columns{share}({self.inner})"


def columns_term(format: OnColumnsFormat, cols: int, index: Tensor, inner: Term) -> Term:
    """Put a term on the channels `index` (sorted) of a matrix with `cols` inputs."""
    stored = {"index": index.to(index_dtype(cols)), **arrays_of(inner=inner)}
    return format.term((inner.shape[0], cols), stored)


def partition(
    values: Tensor, channels: Sequence[Tensor], formats: Sequence[TermFormat]
) -> tuple[Term, ...]:
    """Store every list of channels in the format beside it; the sum of the terms is the matrix.

    ValueError unless every input channel is in exactly one list.
    """
    cols = values.shape[1]
    if not torch.equal(torch.cat(tuple(channels)).sort().values, torch.arange(cols)):
        raise ValueError(f"the lists do not hold each of {cols} input channels exactly once")
    terms = []
    for listed, inner in zip(channels, formats, strict=True):
        index = listed.sort().values
        format = OnColumnsFormat(inner, count=len(index))
        terms.append(columns_term(format, cols, index, inner.nearest(values[:, index])))
    return tuple(terms)
