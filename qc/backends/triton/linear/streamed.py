"""A launch for one row and many outputs, whose programs take one tile of outputs after another.

The codes and factors of the next tile are on their way while one is multiplied, and x stays where
it is. Where a gate and what it gates are multiplied by the same x, a program takes the tile of the
one, then that of the other, through the same registers. See device/streams.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from qc.backends.triton.emit import Emission
from qc.backends.triton.kernel import Cells, Launch, Scratch
from qc.backends.triton.linear import tiles
from qc.backends.triton.linear.coded import BLOCK, GROUP, Coded, Stream, transposed
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
    """The one launch of products of codes with one row."""

    owner: LinearLaunches
    source: Source
    terms: tuple[Coded, ...]
    tiling: Tiling
    programs: int

    @staticmethod
    def of(owner: LinearLaunches, stages: Stages) -> Streamed | None:
        """Plan it; None where more is to do than one product a weight, or where outputs are few."""
        loops = list(stages.loops.items())
        gpu = owner.linear.region.target.gpu
        if owner.bucket != 1 or stages.steps or stages.added or len(loops) != 1 or gpu is None:
            return None
        source, looped = loops[0]
        if source.kind != "rows" or source.before * source.after != 1:
            return None
        terms = tuple(term for _, term in looped if isinstance(term, Coded) and takes(term))
        if isinstance(source.values, Scratch) or len(terms) != len(looped):
            return None
        alone = [acc for acc, _ in looped] == owner.accs  # one term a weight
        if not alone or any(each.parts != terms[0].parts for each in terms):
            return None
        linear = owner.linear
        tiling = tiles.streamed(
            linear.outer, linear.inner, terms[0].group, len(terms),
            gpu.multiprocessors, gpu.architectures,
        )  # fmt: skip
        if tiling is None or stages.dtype != torch.float16:
            return None
        cells = linear.outer // tiling.outputs
        return Streamed(owner, source, terms, tiling, min(cells, PROGRAMS * gpu.multiprocessors))

    def launch(self) -> Launch:
        """Write it."""
        owner, tiling = self.owner, self.tiling
        outer, inner, lanes = owner.linear.outer, owner.linear.inner, tiling.lanes
        emission = owner.emission("linear", tiling, outer, 1)
        held = self.held(emission, None)
        emission.begin()
        x = declare(emission, self.source)
        xs = [
            emission.bind(f"streams.tile({x}, rows, {at * UNIT}, {inner}, {lanes})")
            for at in range(inner // lanes // UNIT)
        ]
        emission.line("programs = launches.count(1)")
        then = self.begin_turn(emission)
        acc = owner.accs[-1]
        self.multiply(emission, acc, held, xs)
        self.end_turn(emission, acc)
        for name, following in zip(held.names, then.names, strict=True):
            emission.line(f"{name} = {following}")
        emission.depth -= 1
        grid = Cells(), Cells(self.programs), Cells()
        return owner.launched_by(emission, "linear_coded", tiling, grid)

    def begin_turn(self, emission: Emission) -> Held:
        """Write the head of the loop over tiles, and the loads of the tile after one."""
        outer, weights = self.owner.linear.outer, len(self.terms)
        cells = outer // self.tiling.outputs
        if weights == 1:
            emission.line(f"for number in tl.range(cell, {cells}, programs, num_stages=1):")
            emission.depth += 1
            emission.line(f"cell = tl.minimum(number + programs, {cells - 1})")
        else:
            for acc in self.owner.accs[:-1]:
                emission.line(f"{acc} = products.zeros(BN, BM)")
            emission.line("first = cell")
            emission.line(f"count = streams.turns(first, programs, {cells}, {weights})")
            emission.line("for turn in tl.range(0, count, num_stages=1):")
            emission.depth += 1
            at = f"turn + 1, first, programs, {cells}, {weights}"
            emission.line(f"cell, weight = streams.turn({at})")
        emission.line(f"out = products.outputs(cell, BN, {outer})")
        emission.line("block = products.first_block(cell, BN)")
        return self.held(emission, "weight")

    def end_turn(self, emission: Emission, acc: str) -> None:
        """Write the end of a product: the epilogue, once all weights have had their turn."""
        owner, outer, weights = self.owner, self.owner.linear.outer, len(self.terms)
        cells = outer // self.tiling.outputs
        if weights == 1:
            emission.line("cell = number")
        else:
            at = f"turn, first, programs, {cells}, {weights}"
            emission.line(f"cell, weight = streams.turn({at})")
        emission.line(f"out = products.outputs(cell, BN, {outer})")
        emission.join()
        if weights > 1:
            emission.line(f"if weight == {weights - 1}:")
        emission.depth += weights > 1
        owner.emit_end(emission, ())
        emission.depth -= weights > 1
        for name, following in pairwise(owner.accs):
            emission.line(f"{name} = {following}")

    def held(self, emission: Emission, weight: str | None) -> Held:
        """Write the loads of tile `block` of a weight, whose outputs are `out`: of the first one,
        or of that which `weight` is the number of."""
        term, lanes = self.terms[0], self.tiling.lanes
        place, bits = term.place, self.stream.bits
        planes = [each.plane(emission, self.stream, bits, 0) for each in self.terms]
        plane = chosen(emission, weight, planes)
        sizes = f"{place.outer // BLOCK}, {bits}, {place.inner * bits // 256}, BN, {lanes}"
        channels = place.inner // lanes
        words = [
            emission.bind(f"fragments.load_pairs({plane}, block, {at}, {sizes})")
            for at in range(0, channels, UNIT)
        ]
        decoders = [self.decoder(emission, each) for each in self.terms]
        arrays = zip(*(passed for _, passed in decoders), strict=True)
        passed = "".join(f", {chosen(emission, weight, each)}" for each in arrays)
        count = channels // term.group
        factors = [
            emission.bind(
                f"{decoders[0][0]}(streams.across(out), "
                f"streams.groups({group}, {lanes}, {count}){passed})"
            )
            for group in range(count)
        ]
        return Held(words, factors)

    def decoder(self, emission: Emission, term: Coded) -> tuple[str, list[str]]:
        """Write the function of the factors of a term; return its name and the arrays to pass."""
        factor = term.parts[0].factor
        assert factor is not None
        turned, repacked = transposed(term.place, factor)
        raw = isinstance(turned, Load)
        name, arrays = term.place.function(emission, turned, (ROW, GROUP), repacked, raw)
        return name, arrays.split(", ")[1:]

    @property
    def stream(self) -> Stream:
        """The codes of all terms."""
        stream = self.terms[0].parts[0].stream
        assert stream is not None
        return stream

    def multiply(self, emission: Emission, acc: str, held: Held, xs: list[str]) -> None:
        """Write the product of the codes of a tile with x."""
        lanes, each = self.tiling.lanes, self.terms[0].group // UNIT
        emission.line(f"{acc} = streams.zeros({lanes}, BN, BM)")
        for group, factor in enumerate(held.factors):
            units = slice(group * each, (group + 1) * each)
            product = self.product(emission, held.words[units], xs[units])
            emission.line(f"{acc} = streams.scaled({acc}, {product}, {factor})")
        emission.line(f"{acc} = streams.joined({acc})")

    def product(self, emission: Emission, words: list[str], xs: list[str]) -> str:
        """Write the product of the codes of a group; return its name."""
        result = None
        for pairs, x in zip(words, xs, strict=True):
            codes = emission.bind(f"streams.unpack({pairs}, {-self.stream.offset})")
            left = emission.bind(f"streams.left({codes}, {self.tiling.lanes}, BN)")
            call = f"product({left}, {x})" if result is None else f"more({result}, {left}, {x})"
            result = emission.bind(f"fragments.{call}")
        assert result is not None
        return result


@dataclass(frozen=True)
class Held:
    """The names of what a program holds of a tile: its words by units, its factors by groups."""

    words: list[str]
    factors: list[str]

    @property
    def names(self) -> list[str]:
        return [*self.words, *self.factors]


def chosen(emission: Emission, weight: str | None, arrays: Sequence[str]) -> str:
    """Write the choice of the array of a weight by its number; return its name."""
    if weight is None or len(arrays) == 1:
        return arrays[0]
    first, second = arrays
    return emission.bind(f"tl.where({weight} == 0, {first}, {second})")


def takes(term: Coded) -> bool:
    """Say whether a term is codes of 4 bits times factors of its outputs."""
    if len(term.parts) != 1 or term.group % UNIT or term.rule != Coded.rule:
        return False
    stream, factor = term.parts[0].stream, term.parts[0].factor
    if stream is None or factor is None or not depends_on(factor, ROW):
        return False
    return stream.bits == 4 and stream.digit == 1 and stream.half is None
