"""A launch for one row and many outputs, whose programs take one tile of outputs after another.

The codes and factors of the next tile are on their way while one is multiplied, and x stays where
it is. See device/streams.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qc.backends.triton.emit import Emission
from qc.backends.triton.kernel import Cells, Launch, Scratch
from qc.backends.triton.linear import tiles
from qc.backends.triton.linear.affine import Affine
from qc.backends.triton.linear.coded import BLOCK, GROUP, Coded, CodedPart, transposed
from qc.backends.triton.linear.looked import Looked
from qc.backends.triton.linear.loop import Source, declare
from qc.backends.triton.linear.stages import Stages
from qc.backends.triton.linear.tiles import Tiling
from qc.ir.weights.affine import depends_on
from qc.ir.weights.expression import ROW, Load

if TYPE_CHECKING:
    from qc.backends.triton.linear.rule import LinearLaunches

UNIT = 64
"""Channels of a lane that are multiplied at once."""
PROGRAMS = 2
"""Programs of a multiprocessor."""


@dataclass
class Streamed:
    """The one launch of a product of codes with one row."""

    owner: LinearLaunches
    source: Source
    term: Coded
    tiling: Tiling
    programs: int

    @staticmethod
    def of(owner: LinearLaunches, stages: Stages) -> Streamed | None:
        """Plan it; None where more is to do than one product, or where outputs are few."""
        loops = list(stages.loops.items())
        gpu = owner.linear.region.target.gpu
        if owner.bucket != 1 or stages.steps or stages.added or len(loops) != 1 or gpu is None:
            return None
        source, terms = loops[0]
        if source.kind != "rows" or source.before * source.after != 1 or len(terms) != 1:
            return None
        term = terms[0][1]
        if isinstance(source.values, Scratch) or not isinstance(term, Coded) or not takes(term):
            return None
        linear = owner.linear
        tiling = tiles.streamed(
            linear.outer, linear.inner, term.group, gpu.multiprocessors, gpu.architectures
        )
        if tiling is None or stages.dtype != torch.float16:
            return None
        cells = linear.outer // tiling.outputs
        return Streamed(owner, source, term, tiling, min(cells, PROGRAMS * gpu.multiprocessors))

    @property
    def part(self) -> CodedPart:
        return self.term.parts[0]

    def launch(self) -> Launch:
        """Write it."""
        owner, tiling = self.owner, self.tiling
        outer, inner, lanes = owner.linear.outer, owner.linear.inner, tiling.lanes
        units, groups = inner // lanes // UNIT, inner // lanes // self.term.group
        emission = owner.emission("linear", tiling, outer, 1)
        words = [self.load_codes(emission, number) for number in range(units)]
        factors = [self.load_factor(emission, number) for number in range(groups)]
        emission.begin()
        x = declare(emission, self.source)
        xs = [
            emission.bind(f"streams.tile({x}, rows, {at * UNIT}, {inner}, {lanes})")
            for at in range(units)
        ]
        cells = outer // tiling.outputs
        emission.line("programs = launches.count(1)")
        emission.line(f"for number in tl.range(cell, {cells}, programs, num_stages=1):")
        emission.depth += 1
        emission.line(f"cell = tl.minimum(number + programs, {cells - 1})")
        emission.line(f"out = products.outputs(cell, BN, {outer})")
        emission.line("block = products.first_block(cell, BN)")
        next_words = [self.load_codes(emission, number) for number in range(units)]
        next_factors = [self.load_factor(emission, number) for number in range(groups)]
        emission.line(f"acc0 = streams.zeros({lanes}, BN, BM)")
        for group in range(groups):
            product = self.product(emission, self.grouped(words)[group], self.grouped(xs)[group])
            emission.line(f"acc0 = streams.scaled(acc0, {product}, {factors[group]})")
        emission.line("acc0 = streams.joined(acc0)")
        emission.line("cell = number")
        emission.line(f"out = products.outputs(cell, BN, {outer})")
        emission.join()
        owner.emit_end(emission, ())
        for name, then in zip((*words, *factors), (*next_words, *next_factors), strict=True):
            emission.line(f"{name} = {then}")
        emission.depth -= 1
        grid = Cells(), Cells(self.programs), Cells()
        return owner.launched_by(emission, "linear_coded", tiling, grid)

    @property
    def zero(self) -> int:
        """What is taken off a code."""
        assert self.part.stream is not None
        return -self.part.stream.offset

    def grouped(self, names: list[str]) -> list[list[str]]:
        """Return the names of units by groups."""
        each = self.term.group // UNIT
        return [names[at : at + each] for at in range(0, len(names), each)]

    def load_codes(self, emission: Emission, number: int) -> str:
        """Write the load of the words of a unit of all lanes."""
        assert self.part.stream is not None
        place, bits = self.term.place, self.part.stream.bits
        name = self.term.plane(emission, self.part.stream, bits, 0)
        sizes = f"{place.outer // BLOCK}, {bits}, {place.inner * bits // 256}"
        at = f"block, {number * UNIT}, {sizes}, BN, {self.tiling.lanes}"
        return emission.bind(f"fragments.load_pairs({name}, {at})")

    def load_factor(self, emission: Emission, number: int) -> str:
        """Write the load of the factors of a group of all lanes."""
        assert self.part.factor is not None
        turned, repacked = transposed(self.term.place, self.part.factor)
        raw = isinstance(turned, Load)
        place, lanes = self.term.place, self.tiling.lanes
        name, arrays = place.function(emission, turned, (ROW, GROUP), repacked, raw)
        groups = f"streams.groups({number}, {lanes}, {place.inner // lanes // self.term.group})"
        return emission.bind(f"{name}(streams.across(out), {groups}{arrays})")

    def product(self, emission: Emission, words: list[str], xs: list[str]) -> str:
        """Write the product of the codes of a group; return its name."""
        result = None
        for pairs, x in zip(words, xs, strict=True):
            codes = emission.bind(f"streams.unpack({pairs}, {self.zero})")
            left = emission.bind(f"streams.left({codes}, {self.tiling.lanes}, BN)")
            call = f"product({left}, {x})" if result is None else f"more({result}, {left}, {x})"
            result = emission.bind(f"fragments.{call}")
        assert result is not None
        return result


def takes(term: Coded) -> bool:
    """Say whether a term is codes of 4 bits times factors of its outputs."""
    if len(term.parts) != 1 or term.group % UNIT or isinstance(term, Looked | Affine):
        return False
    stream, factor = term.parts[0].stream, term.parts[0].factor
    if stream is None or factor is None or not depends_on(factor, ROW):
        return False
    return stream.bits == 4 and stream.digit == 1 and stream.half is None
