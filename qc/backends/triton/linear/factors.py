"""Scales and offsets of groups as pairs of float16, the way device/affine.py loads them.

What all groups of an output share (the factor of a matrix, a constant) multiplies finished sums in
float32; the rest is moved by a power of two, one an output, to where float16 is exact, unless it is
made of float16 and integers: then it stands as it is, and nothing is left to do for sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, reduce

import torch
from torch import Tensor

from qc.backends.triton.linear.coded import BLOCK, GROUP, CodedPart, Stream
from qc.backends.triton.linear.place import Place
from qc.ir.weights.affine import depends_on
from qc.ir.weights.expression import (
    ROW,
    Arith,
    AsFloat,
    AsHalf,
    Const,
    Expr,
    Load,
    TorchRendering,
    walk,
)
from qc.ir.weights.weight import Weight

LARGEST, MOST = 15, 126
"""Weights and scales are 2^15 at most, for float16 ends at 65504; powers of two of a float32."""


class Factors:
    """The factors of a term of one stream of codes: values = scale q + offset, times `whole`."""

    def __init__(self, place: Place, parts: Sequence[CodedPart], group: int) -> None:
        self.place, self.group = place, group
        (self.stream,) = (part.stream for part in parts if part.stream is not None)
        scales = [part.factor for part in parts if part.stream is not None]
        offsets = [part.factor for part in parts if part.stream is None]
        self.scale, self.offset = scales[0], offsets[0] if offsets else None
        self.offsets = bool(offsets)

    @cached_property
    def moved(self) -> bool:
        """Whether sums are multiplied by `whole`."""
        factors = (self.scale, self.offset) if self.offsets else (self.scale,)
        return not all(in_halves(factor, self.place) for factor in factors)

    def packed(self, weight: Weight) -> Tensor:
        """Return scales, and above them offsets, of outputs g and above those of g + 8, of every
        16: i64[groups, outputs / 2]."""
        scale, offset = self.values(weight)
        groups, outer = scale.shape
        blocks = -(-outer // BLOCK)
        words = torch.zeros(groups, blocks * BLOCK, dtype=torch.int32)
        kept = words[:, :outer]
        kept |= scale.half().view(torch.int16).int() & 0xFFFF
        if offset is not None:
            kept |= offset.half().view(torch.int16).int() << 16
        pairs = words.view(groups, blocks, 2, 8).transpose(2, 3).contiguous()
        return pairs.view(torch.int64).view(groups, -1)

    def whole(self, weight: Weight) -> Tensor:
        """Return what multiplies the sums of outputs, f32[outputs]."""
        shared = self.evaluated(weight, self.apart[1])[0]
        return shared / self.moves(*self.own(weight), weight)

    def values(self, weight: Weight) -> tuple[Tensor, Tensor | None]:
        """Return scales and offsets, f32[groups, outputs], as float16 takes them."""
        scale, offset = self.own(weight)
        if not self.moved:
            return scale, offset
        moves = self.moves(scale, offset, weight)
        return scale * moves, None if offset is None else offset * moves

    def moves(self, scale: Tensor, offset: Tensor | None, weight: Weight) -> Tensor:
        """Return the powers of two, f32[outputs], by which the largest become 2^15 at most."""
        most = scale.abs() * max(1.0, largest_of(self.stream, weight))
        if offset is not None:
            most = most + offset.abs()
        places = LARGEST - most.amax(0).log2().ceil()
        return torch.where(places.isfinite(), places, 0).clamp(-MOST, MOST).exp2()

    def own(self, weight: Weight) -> tuple[Tensor, Tensor | None]:
        """Return scales and offsets without what all groups share, f32[groups, outputs]."""
        scale = self.evaluated(weight, (self.apart[0] if self.moved else self.scale,))
        return scale, self.evaluated(weight, (self.offset,)) if self.offsets else None

    @cached_property
    def apart(self) -> tuple[Expr | None, tuple[Expr, ...]]:
        """Take what no group changes out of the scale; None is 1. Where there are offsets, all
        stays."""
        if self.offsets or self.scale is None:
            return self.scale, ()
        own: Expr | None = None
        shared = []
        for factor in factors_of(self.scale):
            if depends_on(factor, GROUP):
                own = factor if own is None else own * factor
            else:
                shared.append(factor)
        return own, tuple(shared)

    def evaluated(self, weight: Weight, factors: Sequence[Expr | None]) -> Tensor:
        """Return the product of some factors, f32[groups, outputs]."""
        place = self.place
        groups = -(-place.inner // self.group)
        rows = torch.arange(place.outer, dtype=torch.int32)
        indices = {ROW.axis: rows, GROUP.axis: torch.arange(groups, dtype=torch.int32)[:, None]}
        rendering = TorchRendering(weight.arrays(), indices)
        known = (rendering.value(factor) for factor in factors if factor is not None)
        return reduce(torch.mul, known, torch.ones(())).expand(groups, place.outer)


def factors_of(expr: Expr) -> list[Expr]:
    """Return what a product multiplies."""
    match expr:
        case Arith("mul", left, right):
            return factors_of(left) + factors_of(right)
    return [expr]


def largest_of(stream: Stream, weight: Weight) -> float:
    """Return the largest number that codes stand for, without its sign."""
    if stream.half is not None:
        magnitude, place = stream.half
        bits = torch.tensor(((1 << magnitude) - 1) << place, dtype=torch.int16)
        return float(bits.view(torch.float16))
    if stream.table is not None:
        return float(weight.arrays()[stream.table.array].abs().max())
    ends = stream.offset, stream.digit * ((1 << stream.bits) - 1) + stream.offset
    return float(max(map(abs, ends)))


def in_halves(factor: Expr | None, place: Place) -> bool:
    """Say whether factors of outputs are made of float16 and integers, so that float16 holds them
    wherever it holds what is stored."""
    if factor is None or isinstance(factor, Const) or not depends_on(factor, ROW):
        return False
    return not any(
        isinstance(each, AsFloat | AsHalf)
        or (isinstance(each, Load) and place.specs[each.array].dtype == torch.float32)
        for each in walk(factor)
    )
