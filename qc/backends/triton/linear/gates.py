"""One launch for a sum of several rows: its first programs make what the others need at their end.

Those are the down projections of low ranks, and the copy of x that entries are multiplied from. The
programs of the loop wait for them behind it, each at a gate of its own (device/turns.py); whoever
makes the last piece opens all gates. Between them lies the whole loop, so hardly any program waits,
and no sums are left for a second launch to add up.

A program that waits holds its place on a multiprocessor. So those it waits for have lower numbers,
which GPUs begin first, and there are no more programs than can run at once.
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
from qc.backends.triton.linear.finished import WAVE, emit_finish, zeros
from qc.backends.triton.linear.loop import Source, Term, declare, emit_loop
from qc.backends.triton.linear.planned import Planned
from qc.backends.triton.linear.stages import EntriesOf, Stages, Step
from qc.backends.triton.linear.tiles import Tiling

if TYPE_CHECKING:
    from qc.backends.triton.linear.rule import LinearLaunches

BUCKETS = (16, 32, 64)
WIDTH = 256
"""Channels of x that a program copies: few programs, for each takes the place of one that loops."""
HELD = 32
"""Registers of a thread that rows of x are loaded into at once."""
BITS = 4
LINE = 64
"""Columns, or values, in what memory hands over at once."""


@dataclass
class BehindGates:
    """The one launch of a region."""

    owner: LinearLaunches
    stages: Stages
    tiling: Tiling
    parts: int

    @staticmethod
    def of(owner: LinearLaunches, stages: Stages) -> BehindGates | None:
        """Plan it; None where that is not what the launch does, or where it was not measured."""
        gpu = owner.linear.region.target.gpu
        loops = list(stages.loops.items())
        if owner.bucket not in BUCKETS or gpu is None or not stages.steps or not loops:
            return None
        if set(gpu.architectures) != {tiles.MEASURED} or len(owner.linear.linears) != 1:
            return None
        source, looped = loops[0]
        if source.kind != "rows" or isinstance(source.values, Scratch):
            return None
        if any(type(term) is not Coded or term.bits != BITS for _, term in looped):
            return None
        alone = replace(owner, alone=True)
        tiling = alone.tiling([term for _, term in looped], 1, source)
        found = BehindGates(alone, stages, tiling, alone.parts(loops, tiling))
        fits = found.programs <= WAVE * gpu.multiprocessors
        return found if fits and all(found.takes(step) for step in stages.steps) else None

    def takes(self, step: Step) -> bool:
        """Say whether a step is a product with the x of the loop, or single entries."""
        source = next(iter(self.stages.loops))
        match step.work:
            case EntriesOf() as work:
                loop = EntryLoop(Emission("", "", ()), work, self.tiling)
                return work.across and loop.stored is not None
            case None:
                return False
        return step.source == source

    @cached_property
    def entries(self) -> list[tuple[str, EntriesOf]]:
        """The entries, each with the accumulator that they are added to."""
        targets = {target: acc for acc, target in self.stages.added}
        return [
            (targets[step.target], step.work)
            for step in self.stages.steps
            if isinstance(step.work, EntriesOf)
        ]

    @cached_property
    def front(self) -> list[Planned]:
        """What is made first."""
        owner, steps = self.owner, self.stages.steps
        return [
            owner.copy_across(step, WIDTH) if step.work == "across" else owner.step(step)
            for step in steps
            if not isinstance(step.work, EntriesOf)
        ]

    @property
    def cells(self) -> int:
        """Tiles of outputs."""
        return -(-self.owner.linear.outer // self.tiling.outputs)

    @property
    def programs(self) -> int:
        return self.cells * self.parts + sum(each.programs for each in self.front)

    @property
    def ranks(self) -> Iterator[tuple[Source, list[tuple[str, Term]]]]:
        """What follows the loop: products with what chains leave, as plain rows."""
        for source, looped in list(self.stages.loops.items())[1:]:
            plain = Source(self.whole(source), source.channels) if source.parts > 1 else source
            yield plain, looped

    def whole(self, source: Source) -> Scratch:
        """Return where the sum of the parts of a source is left."""
        assert isinstance(source.values, Scratch)
        shape = self.owner.rows, source.channels
        return Scratch(f"{source.values.name}_whole", self.stages.dtype, shape)

    def launch(self) -> Launch:
        """Write it."""
        for each in self.front:
            self.emit_opening(each.emission)
        main = self.main()
        roles = [each.role for each in (*self.front, main)]
        linear = self.owner.linear
        emission = combined("together", f"together: {linear.outer} x {linear.inner}", roles)
        self.owner.repack |= emission.repack
        grid = Cells(), Cells(self.programs), Cells()
        return emission.launch(main.rule, grid, self.tiling.warps, self.tiling.stages)

    def turns(self, emission: Emission) -> str:
        """Take what programs count in as a parameter: pieces that are made, then gates."""
        linear = self.owner.linear
        gpu = linear.region.target.gpu
        assert gpu is not None
        operand = linear.operand(linear.linears[0].inputs[1])
        make = partial(zeros, 1 + WAVE * gpu.multiprocessors)
        return emission.weight(operand, "turns_of_gates", torch.int32, make)

    def emit_opening(self, emission: Emission) -> None:
        """Write what follows a piece: the last one's program adds up what several have left, and
        opens the gates."""
        pieces, gates = sum(each.programs for each in self.front), self.cells * self.parts
        turns = self.turns(emission)
        emission.line(f"if turns.last({turns}, 0, {pieces}):")
        emission.depth += 1
        for source in list(self.stages.loops)[1:]:
            if source.parts > 1:
                self.emit_sum(emission, source)
        emission.line(f"turns.open({turns} + 1, {gates}, {1 << (gates - 1).bit_length()})")
        emission.depth -= 1

    def emit_sum(self, emission: Emission, source: Source) -> None:
        """Write the sum of the parts of a source."""
        channels, target = source.channels, self.whole(source)
        unit = 1 << (channels - 1).bit_length()
        x, whole = declare(emission, source), emission.array("whole", target, target.dtype)
        emission.line(f"places = inputs.places(rows, {channels}, 1, 1)")
        emission.line(
            f"total = inputs.summed_tile({x}, places, 0, ROWS * {channels}, {source.parts}, "
            f"{channels}, {unit}, {emission.dtype_name})"
        )
        out = f"products.outputs(0, {unit}, {channels})"
        emission.line(
            f"products.store({whole}, total, {out}, places, live, 0, {channels}, 1, {unit})"
        )

    def main(self) -> Planned:
        """Write the loop and what follows it."""
        owner, tiling, parts = self.owner, self.tiling, self.parts
        emission = owner.emission("linear", tiling, owner.linear.outer, 1)
        loops = [(acc, EntryLoop(emission, work, tiling)) for acc, work in self.entries]
        for _, loop in loops:
            loop.emit_bounds()
        early = [line for _, loop in loops for line in self.asked(loop)]
        owner.emit_products(
            emission, *next(iter(self.stages.loops.items())), tiling, parts, early=early
        )
        emission.join()
        gate = "cell" if parts == 1 else f"cell * {parts} + part"
        emission.line(f"turns.enter({self.turns(emission)} + 1, {gate})")
        if parts == 1:
            self.emit_end(emission, loops)
        else:
            self.emit_entries(emission, loops)
            emit_finish(owner, emission, tiling, parts, lambda finish: self.emit_end(finish, []))
        rule = f"linear_{self.stages.rules}"
        return Planned(emission, rule, tiling, owner.linear.outer, parts)

    def asked(self, loop: EntryLoop) -> Iterator[str]:
        """Yield statements that ask for the entries of a tile."""
        assert loop.stored is not None
        place = loop.each.place
        count = place.specs[f"{place.prefix}.columns"].shape[0] * self.tiling.outputs
        lines = 1 << (-(-count // (place.outer * LINE))).bit_length()
        for array in loop.stored:
            where = f"tl.min({loop.start}, 0), tl.max({loop.stop}, 0)"
            yield f"launches.ask({array}, {where}, {lines})"

    def emit_end(self, emission: Emission, loops: list[tuple[str, EntryLoop]]) -> None:
        """Write what is added to the products of the loop, and the epilogue."""
        loaded = self.owner.load_extras(emission)
        for source, looped in self.ranks:
            emit_loop(emission, source, looped, 1, self.tiling.width)
        self.emit_entries(emission, loops)
        self.owner.emit_epilogue(emission, self.owner.accs, loaded)

    def emit_entries(self, emission: Emission, loops: list[tuple[str, EntryLoop]]) -> None:
        """Write the products of entries, this part's share of them."""
        tiling = self.tiling
        shares = max(1, 8 * 32 * tiling.warps // (tiling.outputs * tiling.rows))
        together = max(1, 2 * HELD * 32 * tiling.warps // (shares * tiling.outputs * tiling.rows))
        for acc, loop in loops:
            assert loop.stored is not None
            x, (columns, values) = declare(emission, loop.each.source), loop.stored
            emission.line(
                f"{acc} = entries.across({acc}, {x}, {loop.start}, {loop.stop}, {columns}, "
                f"{values}, part, {self.parts}, {shares}, {together})"
            )
