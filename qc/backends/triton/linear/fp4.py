"""Floats of 4 bits (e2m1) times activations of the same kind, on tensor cores that multiply them.

Weights are `nvfp4`: scales of e4m3 for 16 channels and one float32 for the matrix; activations have
a float32 for each token in its place. Tensor memory of sm_100 takes 128 outputs and 16 rows at
least, weights on the left; smaller tiles would be widened to bfloat16 there. Decision 028.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qc.backends.triton.emit import Emission
from qc.backends.triton.linear.loop import Loop, Source, Term
from qc.backends.triton.linear.place import Place
from qc.backends.triton.linear.tiles import Tiling
from qc.ir.weights.notation import parse_term
from qc.ir.weights.weight import Weight

GROUP = 16
"""Channels that share a scale of e4m3."""
LEAST_WIDTH = 64
"""Channels that one instruction multiplies."""
WIDTHS = (256, 128, LEAST_WIDTH)
OUTPUTS, LEAST_ROWS, MOST_ROWS = 128, 16, 64


@dataclass(frozen=True)
class Fp4Coded(Term):
    """A term of e2m1 times the codes of `source`."""

    place: Place
    source: Source
    rule = "fp4"

    @property
    def width(self) -> int:
        return LEAST_WIDTH

    @property
    def unit(self) -> int:
        return LEAST_WIDTH

    def emit(self, emission: Emission, loop: Loop, acc: str) -> None:
        place, x = self.place, self.source
        assert x.scale is not None
        assert x.factor is not None
        codes, scale = (
            emission.weight(place.operand, f"{place.prefix}.{name}/fp4", torch.uint8, repack)
            for name, repack in (("codes", self.codes), ("scale.codes", self.scales))
        )
        whole = place.stored(emission, "scale.scale.values")
        x_scale = emission.array("x_scale", x.scale, torch.uint8)
        factor = emission.array("x_factor", x.factor, torch.float32)
        blocks = loop.beside(emission, "products.zeros(BN, BM)")
        for start in range(0, loop.width, loop.unit):
            at = f"{loop.at(start)}, {place.inner}, {loop.unit}"
            left = emission.bind(f"fp4.weights({codes}, out, {at})")
            scales = emission.bind(f"fp4.scales({scale}, out, {at})")
            key = f"scales of x from {start}"
            if key not in loop.known:
                loop.known[key] = emission.bind(f"fp4.scales({x_scale}, rows, {at})")
            tile = f"{loop.x(start)}, {loop.known[key]}"
            emission.line(f"{blocks} = fp4.more({blocks}, {left}, {scales}, {tile})")
        loop.ends.append(f"{acc} += fp4.scaled({blocks}, {factor}, rows, {whole})")

    def codes(self, weight: Weight) -> Tensor:
        """Return the codes, with the signs of scales: tensor cores take scales without one."""
        stored = weight.arrays()
        codes, scale = (stored[f"{self.place.prefix}.{name}"] for name in ("codes", "scale.codes"))
        signs = (scale >> 7) * 0x88
        return codes ^ signs.repeat_interleave(GROUP // 2, 1)

    def scales(self, weight: Weight) -> Tensor:
        """Return the scales without signs."""
        return weight.arrays()[f"{self.place.prefix}.scale.codes"] & 0x7F


NVFP4 = parse_term("nvfp4")
E2M1 = (3, 9)
"""Bits below the sign, and their place in a float16 2^-14 times the code."""


@dataclass(frozen=True)
class Fp4Widened(Term):
    """The same weights times rows of bfloat16, which holds a code times its scale exactly; for
    float16 they are made as all weights of small groups are (affine.py)."""

    place: Place
    rule = "widened"

    @property
    def width(self) -> int:
        return WIDENED

    @property
    def unit(self) -> int:
        return WIDENED

    def emit(self, emission: Emission, loop: Loop, acc: str) -> None:
        place, type = self.place, emission.dtype_name
        codes, scale = (place.stored(emission, name) for name in ("codes", "scale.codes"))
        whole = place.stored(emission, "scale.scale.values")
        own = loop.beside(emission, "products.zeros(BN, BM)")
        bits_and_place = ", ".join(map(str, E2M1))
        for start in range(0, loop.width, loop.unit):
            at = f"{loop.at(start)}, {place.inner}, {loop.unit}"
            loaded = emission.bind(f"fp4.groups({codes}, {scale}, out, {at})")
            call = f"unpack_halves({loaded}[0], 4, {bits_and_place}, {type})"
            halves = emission.bind(f"{emission.unpacking}.{call}")
            tile = emission.bind(f"fp4.widened({halves}, {loaded}[1], {loop.unit})")
            emission.line(f"{own} = products.decoded({own}, {tile}, {loop.x(start)})")
        loop.ends.append(f"{acc} += fp4.whole({own}, {whole})")


WIDENED = 128
"""Channels that are widened at once."""


def fp4_term(place: Place, source: Source) -> Fp4Coded | None:
    """Take a term of `nvfp4` and whole instructions, where activations are e2m1."""
    if source.kind != "quantized" or source.code != "e2m1" or source.group != GROUP:
        return None
    if place.format != NVFP4 or place.inner % LEAST_WIDTH:
        return None
    return Fp4Coded(place, replace(source, kind="codes"))


def widened_term(place: Place) -> Fp4Widened | None:
    """Take a term of `nvfp4` and whole groups."""
    return Fp4Widened(place) if place.format == NVFP4 and place.inner % GROUP == 0 else None


def widened_tiling(rows: int, terms: int) -> Tiling:
    """Return the tile for up to `rows` rows of widened terms."""
    return Tiling(64, rows_of(rows, terms), 4, 3)


def fp4_tiling(rows: int, inner: int, terms: int) -> Tiling:
    """Return the tile for up to `rows` rows."""
    width = next(each for each in WIDTHS if inner % each == 0)
    return Tiling(OUTPUTS, rows_of(rows, terms), 4, 3, width, unit=width)


def rows_of(rows: int, terms: int) -> int:
    """Return the rows of a tile: two terms and more than 32 would not stay in registers on sm_80
    and sm_100."""
    return max(LEAST_ROWS, min(rows, MOST_ROWS if terms == 1 else MOST_ROWS // 2))
