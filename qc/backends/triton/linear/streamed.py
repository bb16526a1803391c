"""A launch for one row and many outputs, whose programs take one tile of outputs after another.

The codes and factors of the next tile are on their way while one is multiplied, and x stays where
it is. Where a gate and what it gates are multiplied by the same x, a program takes the tile of the
one, then that of the other, through the same registers. Of one weight, low ranks and listed entries
are added by the same programs (beside.py). See device/streams.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from qc.backends.triton.emit import Emission
from qc.backends.triton.glue import power_of_two
from qc.backends.triton.kernel import Cells, Launch, Scratch
from qc.backends.triton.linear import tiles
from qc.backends.triton.linear.beside import Beside, besides
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
    besides: list[Beside]
    rules: str

    @staticmethod
    def of(owner: LinearLaunches, stages: Stages) -> Streamed | None:
        """Plan it; None where it would have to do something else, too, or where outputs are few."""
        loops = list(stages.loops.items())
        linear, gpu = owner.linear, owner.linear.region.target.gpu
        if owner.bucket != 1 or not loops or gpu is None or stages.dtype != torch.float16:
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
        tiling = tiles.streamed(
            linear.outer, linear.inner, terms[0].group, len(terms), not stages.steps,
            gpu.multiprocessors, gpu.architectures,
        )  # fmt: skip
        if tiling is None:
            return None
        programs = min(linear.outer // tiling.outputs, PROGRAMS * gpu.multiprocessors)
        most = most_tiles(linear.outer // tiling.outputs, programs)
        beside = besides(stages, source, programs, tiling.outputs * most)
        if beside is None or (beside and len(terms) > 1):
            return None
        if beside and most == 1 and not any(each.follows for each in beside):
            return None  # finished.py is as fast for entries alone
        return Streamed(owner, source, terms, tiling, programs, beside, stages.rules)

    @property
    def most(self) -> int:
        """The tiles of a program, at most."""
        return most_tiles(self.owner.linear.outer // self.tiling.outputs, self.programs)

    def launch(self) -> Launch:
        """Write it."""
        owner, tiling = self.owner, self.tiling
        inner, lanes = owner.linear.inner, tiling.lanes
        emission = owner.emission("linear", tiling, owner.linear.outer, 1)
        emission.line("programs = launches.count(1)")
        if self.besides:
            emission.line("first = cell")
        held = Held(self.load_words(emission, None), self.load_factors(emission, None))
        if self.besides:
            emission.line(f"every = {self.every('first')}")
        for each in self.besides:
            each.load(emission, "every")
        emission.begin()
        x = declare(emission, self.source)
        xs = [
            emission.bind(f"streams.tile({x}, rows, {at * UNIT}, {inner}, {lanes})")
            for at in range(inner // lanes // UNIT)
        ]
        found = [each.begin(emission, x) for each in self.besides]
        self.leave(emission, found, "first", "set")
        if self.besides:
            emission.line("streams.meet()")
        then = self.turn(emission, held, xs, x)
        for name, following in zip(held.names, then.names, strict=True):
            emission.line(f"{name} = {following}")
        emission.depth -= 1
        grid = Cells(), Cells(self.programs), Cells()
        return owner.launched_by(emission, f"linear_{self.rules}", tiling, grid)

    def every(self, first: str) -> str:
        """Return the call for the outputs of all tiles of a program."""
        return f"streams.every({first}, programs, BN, {self.most}, {self.owner.linear.outer})"

    def add_besides(self, emission: Emission, acc: str, x: str) -> None:
        """Write what adds to a tile; behind the first one, what completes it for all tiles."""
        if not self.besides:
            return
        following = [each for each in self.besides if each.follows]
        if following:
            emission.line("if number < programs:")
            emission.depth += 1
            emission.line("begun = streams.kept_here(number)")
            emission.line(f"every = {self.every('begun')}")
            found = [each.follow(emission, "every", x) for each in following]
            how = "set" if following == self.besides else "more"
            self.leave(emission, found, "begun", how)
            emission.line("streams.meet()")
            emission.line(self.load_added(emission))
            emission.depth -= 1
        emission.line(f"{acc} += added")

    def load_added(self, emission: Emission) -> str:
        """Return the load of what is added to a tile."""
        at = emission.array("added_here", self.scratch, torch.float32)
        return f"added = products.full({at}, out, rows, {self.owner.linear.outer})"

    @property
    def scratch(self) -> Scratch:
        """What is added to products."""
        return Scratch("added_here", torch.float32, (self.owner.linear.outer,))

    def leave(
        self, emission: Emission, sums: Sequence[str | None], first: str, how: str
    ) -> None:  # fmt: skip
        """Write the store of what is added to all tiles of a program."""
        for name in sums:
            if name is not None:
                at = emission.array("added_here", self.scratch, torch.float32)
                where = f"{first}, programs, BN, {self.most}, {self.owner.linear.outer}"
                emission.line(f"streams.{how}_every({at}, {name}, {where})")

    def place_tile(self, emission: Emission) -> None:
        """Write which outputs a tile has."""
        emission.line(f"out = products.outputs(cell, BN, {self.owner.linear.outer})")
        emission.line("block = products.first_block(cell, BN)")

    def turn(self, emission: Emission, held: Held, xs: list[str], x: str) -> Held:
        """Write the loop over tiles but for its end: what follows the words of the next tile is
        asked for when half of those of this one are multiplied, and their registers free."""
        owner, acc, half = self.owner, self.owner.accs[-1], len(held.factors) // 2
        self.begin_turn(emission)
        words = self.load_words(emission, "weight")
        emission.line(f"{acc} = streams.zeros({self.tiling.lanes}, BN, BM)")
        self.multiply(emission, acc, held, xs, range(half))
        factors = self.load_factors(emission, "weight")
        self.return_to_tile(emission)
        emission.join()
        loaded = owner.load_extras(emission) if len(self.terms) == 1 else {}
        if self.besides:
            emission.line(self.load_added(emission))
        self.multiply(emission, acc, held, xs, range(half, len(held.factors)))
        emission.line(f"{acc} = streams.joined({acc})")
        self.add_besides(emission, acc, x)
        if len(self.terms) > 1:
            emission.line(f"if weight == {len(self.terms) - 1}:")
        emission.depth += len(self.terms) > 1
        owner.emit_epilogue(emission, owner.accs, loaded)
        emission.depth -= len(self.terms) > 1
        for name, following in pairwise(owner.accs):
            emission.line(f"{name} = {following}")
        return Held(words, factors)

    def begin_turn(self, emission: Emission) -> None:
        """Write the head of the loop over tiles, and which tile follows one."""
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
        self.place_tile(emission)

    def return_to_tile(self, emission: Emission) -> None:
        """Write which tile is multiplied."""
        outer, weights = self.owner.linear.outer, len(self.terms)
        if weights == 1:
            emission.line("cell = number")
        else:
            at = f"turn, first, programs, {outer // self.tiling.outputs}, {weights}"
            emission.line(f"cell, weight = streams.turn({at})")
        emission.line(f"out = products.outputs(cell, BN, {outer})")

    def load_words(self, emission: Emission, weight: str | None) -> list[str]:
        """Write the loads of the words of tile `block`: of the first weight, or of the one that
        `weight` is the number of."""
        place, bits = self.terms[0].place, self.stream.bits
        planes = [each.plane(emission, self.stream, bits, 0) for each in self.terms]
        plane = chosen(emission, weight, planes)
        steps = place.inner * bits // 256
        sizes = f"{place.outer // BLOCK}, {bits}, {steps}, BN, {self.tiling.lanes}"
        return [
            emission.bind(f"fragments.load_pairs({plane}, block, {at}, {sizes})")
            for at in range(0, place.inner // self.tiling.lanes, UNIT)
        ]

    def load_factors(self, emission: Emission, weight: str | None) -> list[str]:
        """Write the loads of the factors of the outputs `out`, of a weight like `load_words`."""
        term, lanes = self.terms[0], self.tiling.lanes
        decoders = [self.decoder(emission, each) for each in self.terms]
        arrays = zip(*(passed for _, passed in decoders), strict=True)
        passed = "".join(f", {chosen(emission, weight, each)}" for each in arrays)
        count = term.place.inner // lanes // term.group
        return [
            emission.bind(
                f"{decoders[0][0]}(streams.across(out), "
                f"streams.groups({group}, {lanes}, {count}){passed})"
            )
            for group in range(count)
        ]

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

    def multiply(
        self, emission: Emission, acc: str, held: Held, xs: list[str], groups: range
    ) -> None:  # fmt: skip
        """Write the product of the codes of some groups of a tile with x."""
        each = self.terms[0].group // UNIT
        for group in groups:
            units = slice(group * each, (group + 1) * each)
            product = self.product(emission, held.words[units], xs[units])
            emission.line(f"{acc} = streams.scaled({acc}, {product}, {held.factors[group]})")

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


def most_tiles(cells: int, programs: int) -> int:
    """Return how many of `cells` tiles a program takes, at most, rounded up to a power of two."""
    return power_of_two(-(-cells // programs))


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
