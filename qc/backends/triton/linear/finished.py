"""A launch for few rows that needs no second one to add up what its programs leave.

Where the channels are split, programs count themselves in a few zeros beside the weight
(device/turns.py): whoever is the last one of a tile of outputs adds up what all left, and runs the
epilogue. Entries of very few rows are multiplied by the program that has their outputs, where those
are all of one wave: each then waits for memory once more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qc.backends.triton.emit import Emission
from qc.backends.triton.linear.coded import Coded
from qc.backends.triton.linear.loop import Source, Term
from qc.backends.triton.linear.planned import Planned
from qc.backends.triton.linear.stages import EntriesOf, Stages, Step
from qc.backends.triton.linear.tiles import Tiling
from qc.ir.weights.weight import Weight

if TYPE_CHECKING:
    from qc.backends.triton.linear.rule import LinearLaunches

MOST_ROWS, FEW_ROWS = 16, 4
"""Rows up to which the last program of a tile adds up what others left: what more rows leave is as
much as the weights, and a launch of its own has more programs for it. Rows up to which entries are
multiplied by the programs of the loop."""
WAVE = 2
"""Programs that run on a multiprocessor at once, at least. One H200, 1 row, `int4·g128 + sparse1%`:
256 programs took 5.2 us instead of 7.4 (4096 x 4096), 896 took 18.7 us instead of 16.5."""
SMALLEST_TILE = 16
BITS, GROUP = 4, 128

Loops = list[tuple[Source, list[tuple[str, Term]]]]


@dataclass
class FinishedAlone:
    """The one launch of a region."""

    owner: LinearLaunches
    stages: Stages
    loops: Loops
    tiling: Tiling
    parts: int

    @staticmethod
    def of(owner: LinearLaunches, stages: Stages) -> FinishedAlone | None:
        """Plan it; None where there are too many rows, or other launches are needed."""
        loops = list(stages.loops.items())
        if owner.bucket is None or owner.bucket > MOST_ROWS or len(loops) != 1:
            return None
        source, looped = loops[0]
        tiling = owner.tiling([term for _, term in looped], 1, source)
        parts = owner.parts(loops, tiling)
        found = FinishedAlone(owner, stages, loops, tiling, parts)
        fits = found.splits if parts > 1 else found.lists_entries
        return found if fits else None

    @property
    def splits(self) -> bool:
        """Whether there are parts of one product of few registers, and nothing beside it.

        One H200, 16 rows of 4096 x 14336: `int4·g128` took 12.9 us instead of 14.3, `int4·g64` 19.1
        us instead of 15.2.
        """
        small = all(
            type(term) is Coded and term.bits == BITS and term.group >= GROUP
            for _, term in self.loops[0][1]
        )
        return small and not self.stages.steps and not self.stages.added

    @property
    def lists_entries(self) -> bool:
        """Whether there are entries, and all are multiplied by the programs of the loop."""
        owner, steps = self.owner, self.stages.steps
        gpu = owner.linear.region.target.gpu
        most = WAVE * (gpu.multiprocessors if gpu else 1)
        cells = -(-owner.linear.outer // self.tiling.outputs)
        one_wave = cells <= most and max(self.tiling.rows, owner.bucket or 0) <= FEW_ROWS
        return one_wave and bool(steps) and all(self.is_inside(step) for step in steps)

    def is_inside(self, step: Step) -> bool:
        """Say whether a step is the products of single entries with the x of the loop."""
        work = step.work
        if not isinstance(work, EntriesOf) or work.across:
            return False
        return work.entries.width == 1 and work.source == self.loops[0][0]

    def launch(self) -> Planned:
        """Write it."""
        owner, tiling, outer = self.owner, self.tiling, self.owner.linear.outer
        source, looped = self.loops[0]
        emission = owner.emission("linear", tiling, outer, 1)
        works = [
            (self.acc_of(step), step.work)
            for step in self.stages.steps
            if isinstance(step.work, EntriesOf)
        ]
        owner.emit_products(emission, source, looped, tiling, self.parts, works)
        emission.join()
        if self.parts == 1:
            owner.emit_end(emission, ())
        else:
            self.emit_finish(emission)
        return Planned(emission, f"linear_{self.stages.rules}", tiling, outer, self.parts)

    def emit_finish(self, emission: Emission) -> None:
        """Write what leaves sums to the last program of a tile, which finishes it."""
        owner, outer = self.owner, self.owner.linear.outer
        for acc in owner.accs:
            at = emission.array(f"{acc}_parts", owner.partial(acc, self.parts), torch.float32)
            where = f"out, rows, live, cell, part, ROWS, {outer}, BN"
            emission.line(f"products.partial({at}, {acc}, {where})")
        operand = owner.linear.operand(owner.linear.linears[0].inputs[1])
        count = -(-outer // SMALLEST_TILE)
        turns = emission.weight(operand, "turns", torch.int32, partial(zeros, count))
        finish = owner.emission("finish", replace(self.tiling, lanes=1), outer, 1)
        finish.begun, finish.early = True, frozenset()
        for acc in owner.accs:
            finish.line(owner.summed(finish, acc, self.parts))
        owner.emit_end(finish, ())
        emission.line(f"if turns.last({turns}, cell, {self.parts}):")
        emission.depth += 1
        emission.call(finish, "finish", "tile, cell, part")
        emission.depth -= 1

    def acc_of(self, step: Step) -> str:
        """Return the accumulator that the result of a step is added to."""
        return next(acc for acc, target in self.stages.added if target == step.target)


def zeros(count: int, weight: Weight) -> Tensor:
    """Return what programs count in."""
    return torch.zeros(count, dtype=torch.int32)
