"""Terms of codes whose factors are shared by few channels: weights are made in registers.

    w = scale(output, group) q + offset(output, group)      rounded to float16, which x is in, too

Scales and offsets of any form (codes in their turn, zero points times scales) lie beside the codes
as pairs of 16 bits, for one load. See device/affine.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qc.backends.triton.emit import Emission
from qc.backends.triton.linear.coded import (
    BLOCK,
    GROUP,
    LARGEST_UNIT,
    RUN,
    Coded,
    CodedPart,
    Stream,
    coded_term,
)
from qc.backends.triton.linear.looked import looked_term
from qc.backends.triton.linear.loop import Loop
from qc.backends.triton.linear.place import Place
from qc.ir.weights.affine import depends_on
from qc.ir.weights.expression import ROW, AsFloat, AsHalf, Const, Expr, TorchRendering, walk
from qc.ir.weights.weight import Weight

LARGEST_GROUP, LARGEST_OF_TABLES, LARGEST_WITH_OFFSET = 32, 64, 128
"""Channels of a group up to which weights are made: of integers, of what is looked up, and where
there are offsets. Measured: decision 029."""


@dataclass(frozen=True)
class Affine(Coded):
    """A term of one stream of codes; `codes` unpacks them."""

    rule = "affine"
    codes: Coded | None = None

    @property
    def unit(self) -> int:
        return LARGEST_UNIT if self.place.inner % LARGEST_UNIT == 0 else self.group

    @property
    def offset(self) -> CodedPart | None:
        """What is added to scaled codes."""
        return next((part for part in self.parts if part.stream is None), None)

    def emit(self, emission: Emission, loop: Loop, acc: str) -> None:
        stream = next(part.stream for part in self.parts if part.stream is not None)
        for start in range(0, loop.width, loop.unit):
            runs = range(start, start + loop.unit, RUN)
            flat = ", ".join(
                name for run in runs for name in self.weights(emission, loop, stream, run)
            )
            kind = {1: "left", 2: "left64", 4: "left128"}[len(runs)]
            left = emission.bind(f"fragments.{kind}({flat}, {loop.size})")
            emission.line(f"{acc} = fragments.more({acc}, {left}, {loop.x(start)})")

    def weights(self, emission: Emission, loop: Loop, stream: Stream, run: int) -> tuple[str, str]:
        """Write the weights of a run of 32 channels, of outputs g and g + 8."""
        assert self.codes is not None
        module = "portable" if emission.unpacking == "portable" else "affine"
        factors, offset = self.pairs(emission, loop, run // self.group), self.offset is not None
        upper, lower = (
            emission.bind(f"{module}.scaled({name}, {factors}, {half}, {offset})")
            for half, name in enumerate(self.codes.digits(emission, loop, stream, run))
        )
        return upper, lower

    def pairs(self, emission: Emission, loop: Loop, number: int) -> str:
        """Write the load of scales and offsets of a group of the step, once."""
        place = self.place
        array = f"{place.prefix}/factors{self.group}"
        repack = partial(packed_factors, self)
        name = emission.weight(place.operand, array, torch.int64, repack)
        key = f"{name} of group {number}"
        if key not in loop.known:
            blocks, groups = -(-place.outer // BLOCK), -(-loop.channels // self.group)
            sizes = f"{blocks}, BN, {loop.lanes}, {groups}"
            call = f"affine.load({name}, block, {{}}, {sizes})"
            first = call.format(loop.number(loop.first, self.group, number, False))
            after = call.format(loop.number("step + 1", self.group, number, False))
            loop.known[key] = loop.carried(emission, first, after)
        return loop.known[key]


def packed_factors(term: Affine, weight: Weight) -> Tensor:
    """Return scales, and above them offsets, of outputs g and above those of g + 8, of every 16:
    i64[groups, outputs / 2]."""
    place = term.place
    blocks, groups = -(-place.outer // BLOCK), -(-place.inner // term.group)
    rows = torch.arange(place.outer, dtype=torch.int32)
    indices = {ROW.axis: rows, GROUP.axis: torch.arange(groups, dtype=torch.int32).unsqueeze(1)}
    rendering = TorchRendering(weight.arrays(), indices)
    words = torch.zeros(groups, blocks * BLOCK, dtype=torch.int32)
    for part in term.parts:
        factor = torch.ones(()) if part.factor is None else rendering.value(part.factor)
        bits = factor.expand(groups, place.outer).half().view(torch.int16).int()
        words[:, : place.outer] |= bits << 16 if part.stream is None else bits & 0xFFFF
    pairs = words.view(groups, blocks, 2, 8).transpose(2, 3).contiguous()
    return pairs.view(torch.int64).view(groups, -1)


def affine_term(place: Place) -> Affine | None:
    """Take a term of codes with scales, and maybe offsets, of few channels."""
    found = looked_term(place) or coded_term(place)
    if found is None:
        return None
    streams = [part.stream for part in found.parts if part.stream is not None]
    offsets = len(found.parts) - len(streams)
    if len(streams) != 1 or streams[0].half is not None or streams[0].bits > 4 or offsets > 1:
        return None
    largest = LARGEST_OF_TABLES if streams[0].table else LARGEST_GROUP
    if found.group > (LARGEST_WITH_OFFSET if offsets else largest):
        return None
    if not all(in_halves(part.factor) for part in found.parts):
        return None
    return Affine(place, found.parts, found.group, found)


def in_halves(factor: Expr | None) -> bool:
    """Say whether factors of outputs are made of float16 and integers, so that float16 holds them
    wherever it holds what is stored."""
    if factor is None or isinstance(factor, Const) or not depends_on(factor, ROW):
        return False
    return not any(isinstance(each, AsFloat | AsHalf) for each in walk(factor))
