"""One launch for a sum of several rows: its first programs make what the others need at their end.

That is the down projection of low ranks, and the copy of x that entries are multiplied from. The
programs of the loop wait for it behind the loop, each at a gate of its own (device/turns.py), which
whoever makes the last piece opens. By then it is usually open, and no sums are left for a second
launch to add up.

A program that waits holds its place on a multiprocessor. So those it waits for have lower numbers,
which GPUs begin first, and there are no more programs than run at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch

from qc.backends.triton.emit import Emission, combined
from qc.backends.triton.kernel import Cells, Launch, Scratch
from qc.backends.triton.linear import tiles
from qc.backends.triton.linear.coded import Coded
from qc.backends.triton.linear.entries import EntryLoop
from qc.backends.triton.linear.finished import WAVE, zeros
from qc.backends.triton.linear.loop import Source, Term, declare, emit_loop
from qc.backends.triton.linear.planned import Planned
from qc.backends.triton.linear.stages import EntriesOf, Stages, Step
from qc.backends.triton.linear.tiles import Tiling

if TYPE_CHECKING:
    from qc.backends.triton.linear.rule import LinearLaunches

MOST_ROWS, BITS, WARPS = 16, 4, 4
"""The bucket, the codes and the tiles that this was measured for: docs/decisions/030. Entries
without a low rank take less time in programs of their own."""
WIDTH = 256
"""Channels of x that a program copies: few programs, for each takes the place of one that loops."""
BYTES = 16
"""What a thread loads at once, of a row of x."""
HELD = 32
"""Registers of a thread that entries' rows of x are loaded into at once."""
LINE = 64
"""Columns, or values, in a line of the cache."""


@dataclass
class BehindGates:
    """The one launch of a region."""

    owner: LinearLaunches
    stages: Stages
    tiling: Tiling

    @staticmethod
    def of(owner: LinearLaunches, stages: Stages) -> BehindGates | None:
        """Plan it; None where it does not fit, or was not measured."""
        gpu, loops = owner.linear.region.target.gpu, list(stages.loops.items())
        if owner.bucket != MOST_ROWS or gpu is None or set(gpu.architectures) != {tiles.MEASURED}:
            return None
        if len(owner.linear.linears) != 1 or len(loops) < 2:
            return None
        source, looped = loops[0]
        if any(type(term) is not Coded or term.bits != BITS for _, term in looped):
            return None
        alone = replace(owner, alone=True)
        tiling = alone.tiling([term for _, term in looped], 1, source)
        found = BehindGates(alone, stages, tiling)
        if alone.parts(loops, tiling) > 1 or tiling.warps != WARPS or not found.takes_all:
            return None
        return found if found.pieces + found.cells <= WAVE * gpu.multiprocessors else None

    @property
    def takes_all(self) -> bool:
        """Whether what is made first needs x alone, and all else is ranks or single entries."""
        made = {step.target for step in self.stages.steps}
        sources = list(self.stages.loops)[1:]
        entries = {step.target for step in self.stages.steps if isinstance(step.work, EntriesOf)}
        return (
            all(self.takes(step) for step in self.stages.steps)
            and all(source.values in made for source in sources)
            and all(target in entries for _, target in self.stages.added)
        )

    def takes(self, step: Step) -> bool:
        """Say whether a step is a product with the x of the loop, or single entries."""
        if isinstance(step.work, EntriesOf):
            stored = EntryLoop(Emission("", "", ()), step.work, self.tiling).stored
            return step.work.across and stored is not None
        x = next(iter(self.stages.loops))
        return step.work is not None and step.source == x and x.kind == "rows"

    @cached_property
    def front(self) -> list[Planned]:
        """What is made first."""
        return [
            self.owner.copy_across(step, WIDTH) if step.work == "across" else self.owner.step(step)
            for step in self.stages.steps
            if not isinstance(step.work, EntriesOf)
        ]

    @property
    def pieces(self) -> int:
        """Programs that make something first."""
        return sum(each.programs for each in self.front)

    @property
    def cells(self) -> int:
        """Tiles of outputs, each with a program and a gate."""
        return -(-self.owner.linear.outer // self.tiling.outputs)

    def launch(self) -> Launch:
        """Write it."""
        for each in self.front:
            self.emit_opening(each.emission)
        main, linear = self.main(), self.owner.linear
        title = f"together: {linear.outer} x {linear.inner}"
        emission = combined("together", title, [each.role for each in (*self.front, main)])
        self.owner.repack |= emission.repack
        grid = Cells(), Cells(self.pieces + self.cells), Cells()
        return emission.launch(main.rule, grid, self.tiling.warps, self.tiling.stages)

    def turns(self, emission: Emission) -> str:
        """Take what programs count in as a parameter: pieces that are made, then gates."""
        linear = self.owner.linear
        operand = linear.operand(linear.linears[0].inputs[1])
        make = partial(zeros, 1 + self.cells)
        return emission.weight(operand, "turns_of_gates", torch.int32, make)

    def emit_opening(self, emission: Emission) -> None:
        """Write what follows a piece: the program of the last one adds up what several have left,
        and opens the gates."""
        turns = self.turns(emission)
        emission.line(f"if turns.last({turns}, 0, {self.pieces}):")
        emission.depth += 1
        for source in list(self.stages.loops)[1:]:
            if source.parts > 1:
                self.emit_sum(emission, source)
        room = 1 << (self.cells - 1).bit_length()
        emission.line(f"turns.open({turns} + 1, {self.cells}, {room})")
        emission.depth -= 1

    def whole(self, source: Source) -> Scratch:
        """Return where the sum of the parts of a source is left."""
        assert isinstance(source.values, Scratch)
        shape = self.owner.rows, source.channels
        return Scratch(f"{source.values.name}_whole", self.stages.dtype, shape)

    def emit_sum(self, emission: Emission, source: Source) -> None:
        """Write the sum of the parts of a source: once, not in every program that reads it."""
        channels, target = source.channels, self.whole(source)
        room = 1 << (channels - 1).bit_length()
        x, whole = declare(emission, source), emission.array("whole", target, target.dtype)
        emission.line(f"places = inputs.places(rows, {channels}, 1, 1)")
        emission.line(
            f"total = inputs.summed_tile({x}, places, 0, ROWS * {channels}, {source.parts}, "
            f"{channels}, {room}, {emission.dtype_name})"
        )
        out = f"products.outputs(0, {room}, {channels})"
        emission.line(
            f"products.store({whole}, total, {out}, places, live, 0, {channels}, 1, {room})"
        )

    @property
    def ranks(self) -> Iterator[tuple[Source, list[tuple[str, Term]]]]:
        """What follows the loop: products with what chains leave, as plain rows."""
        for source, looped in list(self.stages.loops.items())[1:]:
            plain = Source(self.whole(source), source.channels) if source.parts > 1 else source
            yield plain, looped

    def main(self) -> Planned:
        """Write the loop, and what is added to its products."""
        owner, tiling, outer = self.owner, self.tiling, self.owner.linear.outer
        emission = owner.emission("linear", tiling, outer, 1)
        targets = {target: acc for acc, target in self.stages.added}
        entries = [
            (targets[step.target], EntryLoop(emission, step.work, tiling))
            for step in self.stages.steps
            if isinstance(step.work, EntriesOf)
        ]
        for _, loop in entries:
            loop.emit_bounds()
        early = [line for _, loop in entries for line in self.asked(loop)]
        source, looped = next(iter(self.stages.loops.items()))
        owner.emit_products(emission, source, looped, tiling, 1, early=early)
        emission.join()
        emission.line(f"turns.enter({self.turns(emission)} + 1, cell)")
        loaded = owner.load_extras(emission)
        for source, looped in self.ranks:
            emit_loop(emission, source, looped, 1, tiling.width)
        for acc, loop in entries:
            self.emit_entries(emission, acc, loop)
        owner.emit_epilogue(emission, owner.accs, loaded)
        return Planned(emission, f"linear_{self.stages.rules}", tiling, outer)

    def asked(self, loop: EntryLoop) -> Iterator[str]:
        """Yield statements that ask for the entries of a tile."""
        assert loop.stored is not None
        place = loop.each.place
        count = place.specs[f"{place.prefix}.columns"].shape[0] * self.tiling.outputs
        lines = 1 << (count // (place.outer * LINE)).bit_length()
        for array in loop.stored:
            where = f"tl.min({loop.start}, 0), tl.max({loop.stop}, 0)"
            yield f"launches.ask({array}, {where}, {lines})"

    def emit_entries(self, emission: Emission, acc: str, loop: EntryLoop) -> None:
        """Write the products of entries."""
        assert loop.stored is not None
        columns, values = loop.stored
        tile, threads = self.tiling.outputs * self.tiling.rows, 32 * self.tiling.warps
        shares = max(1, BYTES // 2 * threads // tile)
        together = max(1, 2 * HELD * threads // (shares * tile))
        x = declare(emission, loop.each.source)
        emission.line(
            f"{acc} = entries.across({acc}, {x}, {loop.start}, {loop.stop}, {columns}, {values}, "
            f"{shares}, {together})"
        )
