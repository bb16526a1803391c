"""Floats of 8 bits (e4m3) times activations of the same kind, on tensor cores that multiply them.

Where there are none, or activations share a scale over fewer channels than a group has, both are
widened to float16. Micikevicius et al. 2022, "FP8 Formats for Deep Learning".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qc.backends.triton.emit import Emission
from qc.backends.triton.linear.coded import BLOCK, Coded, CodedPart, Stream, coded_term
from qc.backends.triton.linear.int8 import byte_fragments, product_of, row_scale
from qc.backends.triton.linear.loop import Loop, Source
from qc.backends.triton.linear.place import Place
from qc.ir.target import LEAST_GROUP
from qc.ir.weights.packing import unpack_codes
from qc.ir.weights.weight import Weight

E4M3 = (7, 7)
"""Bits below the sign, and their place in a float16 2^-8 times the code."""
UNIT = 2.0**-8
"""What factors of such codes count on."""
COLUMNS, LARGEST_UNIT = 32, 64


@dataclass(frozen=True)
class Fp8Coded(Coded):
    """A term of streams of e4m3 times the codes of `source`."""

    rule = "fp8"
    source: Source | None = None

    @property
    def width(self) -> int:
        return max(self.group, LARGEST_UNIT)

    @property
    def unit(self) -> int:
        return min(self.group, LARGEST_UNIT)

    def value(self, emission: Emission, loop: Loop, part: CodedPart, start: int) -> str:
        assert self.source is not None
        assert part.stream is not None
        found = self.product(emission, loop, part.stream, start)
        scale = row_scale(emission, loop, self.source, start)
        return emission.bind(f"int8.scaled({found}, {scale}, {UNIT!r})")

    def product(self, emission: Emission, loop: Loop, stream: Stream, start: int) -> str:
        run = partial(self.run, emission, loop, stream)
        return product_of(emission, loop, run, start, self.group, "fp8")

    def run(self, emission: Emission, loop: Loop, stream: Stream, start: int) -> str:
        """Write the load of a run of 32 channels, once."""
        steps, blocks = -(-self.place.inner // COLUMNS), -(-self.place.outer // BLOCK)
        lead = "_".join(map(str, stream.lead))
        array = f"{stream.array}/e4m3" + (f"of{lead}" if lead else "")
        repack = partial(packed, stream, self.place.shape)
        name = emission.weight(self.place.operand, array, torch.int8, repack)
        key = f"{name} from {start}"
        if key not in loop.known:
            here = loop.stored_at(loop.at(start), COLUMNS)
            size = f"{blocks}, 8, {steps}, BN"
            loop.known[key] = emission.bind(f"int8.load({name}, block, {here}, {size})")
        return loop.known[key]


def packed(stream: Stream, shape: tuple[int, int], weight: Weight) -> Tensor:
    """Return the bytes of e4m3 in the order of device/int8.py: i8[blocks, steps, 512]."""
    stored = weight.arrays()[stream.array][stream.lead]
    return byte_fragments(unpack_codes(stored, 8, shape[1]).int(), 8)


def fp8_term(place: Place, source: Source) -> Fp8Coded | None:
    """Take a term of e4m3, where activations are e4m3 and their groups wide enough."""
    if source.kind != "quantized" or source.code != "e4m3":
        return None
    found = coded_term(place)
    if found is None:
        return None
    if source.group < source.channels and (
        source.group < LEAST_GROUP or source.group % found.group
    ):
        return None
    streams = [part.stream for part in found.parts]
    if any(s is None or s.bits != 8 or s.half != E4M3 for s in streams):
        return None
    return Fp8Coded(place, found.parts, found.group, replace(source, kind="codes"))
