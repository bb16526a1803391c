"""Terms of codes whose factors are shared by few channels: weights are made in registers.

    w = scale(output, group) q + offset(output, group)      rounded to float16, which x is in, too

Scales and offsets of any form (codes in their turn, zero points times scales, small floats) lie
beside the codes as pairs of 16 bits, for one load: see factors.py, device/affine.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from qc.backends.triton.emit import Emission
from qc.backends.triton.linear.coded import (
    BLOCK,
    LARGEST_UNIT,
    RUN,
    Coded,
    Stream,
    coded_term,
)
from qc.backends.triton.linear.factors import Factors
from qc.backends.triton.linear.looked import looked_term
from qc.backends.triton.linear.loop import Loop
from qc.backends.triton.linear.place import Place

LARGEST_GROUP, LARGEST_OF_TABLES, LARGEST_WITH_OFFSET = 32, 64, 128
"""Channels of a group up to which weights are made: of integers, of what is looked up, and where
there are offsets. Measured: decision 029."""
MOST_BITS = 8
"""Bits of a code."""
SMALLEST_GROUP = 16
"""Channels of a group, at least: half a run."""


@dataclass(frozen=True)
class Affine(Coded):
    """A term of one stream of codes; `codes` unpacks them."""

    rule = "affine"
    codes: Coded | None = None

    @property
    def width(self) -> int:
        return max(super().width, self.unit)

    @property
    def unit(self) -> int:
        whole = self.place.inner % LARGEST_UNIT == 0
        return LARGEST_UNIT if whole else max(self.group, RUN)

    @cached_property
    def factors_of_groups(self) -> Factors:
        """Scales and offsets, as they are laid out."""
        return Factors(self.place, self.parts, self.group)

    def emit(self, emission: Emission, loop: Loop, acc: str) -> None:
        stream, moved = self.factors_of_groups.stream, self.factors_of_groups.moved
        target = loop.beside(emission, f"products.zeros({loop.tile})") if moved else acc
        for start in range(0, loop.width, loop.unit):
            runs = range(start, start + loop.unit, RUN)
            flat = ", ".join(
                name for run in runs for name in self.weights(emission, loop, stream, run)
            )
            kind = {1: "left", 2: "left64", 4: "left128"}[len(runs)]
            left = emission.bind(f"fragments.{kind}({flat}, {loop.size})")
            emission.line(f"{target} = fragments.more({target}, {left}, {loop.x(start)})")
        if moved:
            place = self.place
            array = f"{place.prefix}/whole"
            repack = self.factors_of_groups.whole
            name = emission.weight(place.operand, array, torch.float32, repack)
            loop.ends.append(f"{acc} = affine.whole({acc}, {target}, {name}, {loop.out})")

    def weights(self, emission: Emission, loop: Loop, stream: Stream, run: int) -> tuple[str, str]:
        """Write the weights of a run of 32 channels, of outputs g and g + 8."""
        assert self.codes is not None
        module = "portable" if emission.unpacking == "portable" else "affine"
        factors, offset = self.shared(emission, loop, run), self.factors_of_groups.offsets
        upper, lower = (
            emission.bind(f"{module}.scaled({name}, {factors}, {half}, {offset})")
            for half, name in enumerate(self.codes.digits(emission, loop, stream, run))
        )
        return upper, lower

    def shared(self, emission: Emission, loop: Loop, run: int) -> str:
        """Write the scales and offsets of a run of the step, or of its halves, once."""
        groups = range(run // self.group, -(-(run + RUN) // self.group))
        pairs = [self.pairs(emission, loop, number) for number in groups]
        key = f"factors {pairs}"
        if key not in loop.known:
            kind = "of_run" if len(pairs) == 1 else "of_halves"
            loop.known[key] = emission.bind(f"affine.{kind}({', '.join(pairs)})")
        return loop.known[key]

    def pairs(self, emission: Emission, loop: Loop, number: int) -> str:
        """Write the load of scales and offsets of a group of the step, once."""
        place = self.place
        array = f"{place.prefix}/factors{self.group}"
        repack = self.factors_of_groups.packed
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


def affine_term(place: Place) -> Affine | None:
    """Take a term of codes with scales, and maybe offsets, of few channels."""
    found = next((term for term in codes_of(place) if term is not None), None)
    if found is None:
        return None
    streams = [part.stream for part in found.parts if part.stream is not None]
    offsets = len(found.parts) - len(streams)
    if len(streams) != 1 or streams[0].bits > MOST_BITS or offsets > 1:
        return None
    largest = LARGEST_OF_TABLES if streams[0].table else LARGEST_GROUP
    if found.group > (LARGEST_WITH_OFFSET if offsets else largest):
        return None
    return Affine(place, found.parts, found.group, found)


def codes_of(place: Place) -> Iterator[Coded | None]:
    """Yield how codes are unpacked, where one way fits: by runs, or by halves of them."""
    for run in (RUN, SMALLEST_GROUP):
        yield looked_term(place, run)
        yield coded_term(place, run)
