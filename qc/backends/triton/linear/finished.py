"""A launch for few rows that needs no second one to add up what its programs leave.

Programs count themselves in a few zeros beside the weight (device/turns.py). Whoever is the last
one of a tile of outputs adds up what the others left, and runs the epilogue. A down projection is
done by the first programs; the others wait for it behind their loop, when it is long there. Entries
of very few rows are multiplied by the program that has their outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qc.backends.triton.emit import Emission
from qc.backends.triton.kernel import Launch
from qc.backends.triton.linear.entries import emit_entries
from qc.backends.triton.linear.loop import Loop, Source, Term, emit_loop, load_alone
from qc.backends.triton.linear.planned import Planned
from qc.backends.triton.linear.stages import EntriesOf, Stages, Step
from qc.backends.triton.linear.tiles import Tiling
from qc.ir.weights.weight import Weight

if TYPE_CHECKING:
    from qc.backends.triton.linear.rule import LinearLaunches

MOST_ROWS = 16
"""Rows up to which the last program of a tile adds up what others left; what more rows leave is as
much as the weights, and a launch of its own has more programs for it."""
SMALLEST_TILE = 16

Loops = list[tuple[Source, list[tuple[str, Term]]]]


@dataclass
class FinishedAlone:
    """The launches of a region, the last of which finishes alone."""

    owner: LinearLaunches
    stages: Stages
    loops: Loops
    level: int
    tiling: Tiling
    parts: int
    products: list[Step]
    """Down projections in the last launch."""
    inside: list[Step]
    """Entries that the programs of the loop multiply."""
    beside: list[Step]
    """Entries that other programs multiply."""

    @staticmethod
    def of(owner: LinearLaunches, stages: Stages) -> FinishedAlone | None:
        """Plan it; None where there are too many rows, or nothing is to be added up."""
        loops = list(stages.loops.items())
        if owner.bucket is None or owner.bucket > MOST_ROWS or not loops:
            return None
        source, looped = loops[0]
        ready = stages.level_of(source)
        level = max([ready, *(stages.level(step) for step in stages.steps)])
        now = [step for step in stages.steps if stages.level(step) == level]
        if not all(shares_a_launch(step) for step in now):
            return None
        entries = [step for step in now if isinstance(step.work, EntriesOf)]
        owner.crowded = any(isinstance(s.work, EntriesOf) and s.work.across for s in stages.steps)
        tiling = owner.tiling([term for _, term in looped], 1, source)
        parts = owner.parts(loops, tiling)
        inside = [
            step
            for step in entries
            if isinstance(step.work, EntriesOf) and step.work.source == source and parts == 1
        ]
        beside = [step for step in entries if step not in inside]
        products = [step for step in now if step not in entries]
        if parts == 1 and not now:
            return None
        return FinishedAlone(owner, stages, loops, level, tiling, parts, products, inside, beside)

    @property
    def shares(self) -> int:
        """The programs that leave something for a tile."""
        return self.parts + len(self.beside)

    @property
    def outer(self) -> int:
        return self.owner.linear.outer

    def launches(self) -> list[Launch]:
        """Write all launches."""
        owner, found = self.owner, list[Launch]()
        for level in range(self.level):
            steps = [step for step in self.stages.steps if self.stages.level(step) == level]
            planned = [owner.step(step) for step in steps]
            found += owner.together([each for each in planned if each.holds(owner.bucket)])
            found += [owner.launched(each) for each in planned if not each.holds(owner.bucket)]
        first = [self.waited_for(step) for step in self.products]
        waiting = sum(each.programs for each in first)
        return found + owner.together(
            [*first, self.loop(waiting), *(self.entries(step, waiting) for step in self.beside)]
        )

    def turns(self, emission: Emission) -> str:
        """Take the zeros that programs count in."""
        operand = self.owner.linear.operand(self.owner.linear.linears[0].inputs[1])
        return emission.weight(operand, "turns", torch.int32, partial(zeros, self.at + 2))

    @property
    def at(self) -> int:
        """Where those are counted that all others wait for: behind the tiles."""
        return -(-self.outer // SMALLEST_TILE)

    def waited_for(self, step: Step) -> Planned:
        """Write a down projection that others wait for."""
        planned = self.owner.step(step)
        planned.emission.line(f"turns.done({self.turns(planned.emission)}, {self.at})")
        return planned

    def wait(self, emission: Emission, waiting: int) -> None:
        """Write the wait for down projections."""
        if waiting:
            cells = -(-self.outer // self.tiling.outputs)
            turns = self.turns(emission)
            emission.line(f"turns.wait({turns}, {self.at}, {waiting}, {cells})")

    def loop(self, waiting: int) -> Planned:
        """Write the loop over the channels of x, and the end where nothing is left to others."""
        owner, tiling = self.owner, self.tiling
        source, looped = self.loops[0]
        emission = owner.emission("linear", tiling, self.outer, 1)
        loaded: list[Loop | None] = []
        early = [] if self.shares > 1 else emission.written(lambda: self.load(emission, loaded))
        works = [(self.acc_of(step), step.work) for step in self.inside]
        owner.emit_products(emission, source, looped, tiling, self.parts, works, early)
        emission.join()
        if self.shares > 1:
            for acc in owner.accs:
                at = emission.array(f"{acc}_parts", owner.partial(acc, self.parts), torch.float32)
                where = f"out, rows, there, cell, part, ROWS, {self.outer}, BN"
                emission.line(f"products.partial({at}, {acc}, {where})")
            self.finish_last(emission, waiting)
        else:
            self.wait(emission, waiting)
            self.emit_rest(emission, [], loaded)
        return Planned(emission, f"linear_{self.stages.rules}", tiling, self.outer, self.parts)

    def load(self, emission: Emission, loaded: list[Loop | None]) -> None:
        """Write the loads of what stands behind the wait."""
        loaded += [load_alone(emission, source, looped) for source, looped in self.loops[1:]]

    def entries(self, step: Step, waiting: int) -> Planned:
        """Write the products of entries by programs of their own, tile by tile of the loop's."""
        owner, work = self.owner, step.work
        assert isinstance(work, EntriesOf)
        tiling = replace(self.tiling, rows=work.tile, lanes=1)
        emission = owner.emission(f"entries{self.beside.index(step)}", tiling, self.outer, 1)
        emission.line("acc0 = products.zeros(BN, BM)")
        emit_entries(emission, work, "acc0", tiling)
        emission.join()
        target = emission.array("target", step.target, step.target.dtype)
        emission.line(f"places = inputs.places(rows, {self.outer}, 1, 1)")
        where = f"out, places, there, cell, {self.outer}, 1, BN"
        emission.line(f"products.store({target}, acc0, {where})")
        self.finish_last(emission, waiting)
        return Planned(emission, "entries", tiling, self.outer)

    def finish_last(self, emission: Emission, waiting: int) -> None:
        """Write that the last program of a tile finishes it."""
        emission.line(f"if turns.last({self.turns(emission)}, cell, {self.shares}):")
        emission.depth += 1
        emission.call(self.finish(waiting), "finish", "tile, cell, part")
        emission.depth -= 1

    def finish(self, waiting: int) -> Emission:
        """Write the function that adds up what all left for a tile, and what follows."""
        owner = self.owner
        emission = owner.emission("finish", replace(self.tiling, lanes=1), self.outer, 1)
        emission.begun, emission.early = True, frozenset()
        begin = [owner.summed(emission, acc, self.parts) for acc in owner.accs]
        self.wait(emission, waiting)
        self.emit_rest(emission, begin, [None] * len(self.loops[1:]))
        return emission

    def emit_rest(
        self, emission: Emission, begin: list[str], loaded: list[Loop | None]
    ) -> None:  # fmt: skip
        """Write the products with what chains left, what was computed beside, the epilogue."""
        for (source, looped), loop in zip(self.loops[1:], loaded, strict=True):
            emit_loop(emission, source, looped, 1, 0, begin, loaded=loop)
            begin = []
        for line in begin:
            emission.line(line)
        targets = [step.target for step in self.inside]
        added = [(acc, target) for acc, target in self.stages.added if target not in targets]
        self.owner.emit_end(emission, added)

    def acc_of(self, step: Step) -> str:
        """Return the accumulator that the result of a step is added to."""
        return next(acc for acc, target in self.stages.added if target == step.target)


def shares_a_launch(step: Step) -> bool:
    """Say whether a step can be done by programs of the main launch."""
    if isinstance(step.work, EntriesOf):
        return step.work.entries.width == 1
    return isinstance(step.work, Term) and step.source.before == step.source.after == 1


def zeros(count: int, weight: Weight) -> Tensor:
    """Return what programs count in."""
    return torch.zeros(count, dtype=torch.int32)
