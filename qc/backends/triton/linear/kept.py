"""Launches for a matrix of kept groups: see device/kept.py, and kept_layout.py for what is stored.

For one row threads multiply, and programs take equally many groups each: programs by tiles of
outputs would wait for the tile that keeps the most. For more rows tensor cores do, and groups that
are not kept are zeros.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qc.backends.triton.emit import Emission
from qc.backends.triton.kernel import Cells, Launch, Scratch
from qc.backends.triton.linear import stages as planned
from qc.backends.triton.linear.kept_layout import CHANNELS, GROUPS, OUT, KeptLayout, takes
from qc.backends.triton.linear.loop import declare, tile_call
from qc.backends.triton.linear.stages import EntriesOf, Stages, Step
from qc.backends.triton.linear.tiles import LARGEST, Tiling
from qc.ir.types import as_dim
from qc.ir.weights.grouped import GroupedFormat
from qc.ir.weights.kept_groups import KeptGroupsFormat
from qc.ir.weights.weight import Weight

if TYPE_CHECKING:
    from qc.backends.triton.linear.rule import LinearLaunches

STREAMS, TILES = 8, 8
"""Programs of a multiprocessor, for one row and for more: measured on an H200 among 2 to 16."""
MOST_STREAMED = 1
"""Rows up to which threads multiply."""
LEAST_STEPS = 4
"""Steps of a program that multiplies a part of the channels, at least."""
MIDDLE = 8
"""Of codes without a zero point."""


@dataclass
class KeptGroups(ABC):
    """The launch that multiplies by the kept groups of one term; `finished`: with the epilogue,
    for there is nothing else to do, or else into scratch."""

    owner: LinearLaunches
    step: Step
    work: EntriesOf
    layout: KeptLayout
    finished: bool = False

    @staticmethod
    def of(owner: LinearLaunches, step: Step) -> KeptGroups | None:
        """Plan it; None where groups are stored otherwise."""
        work, gpu = step.work, owner.linear.region.target.gpu
        if not isinstance(work, EntriesOf) or gpu is None or not planned.FAST_RULES:
            return None
        format, shape = work.place.format, work.place.shape
        if not takes(format):
            return None
        assert isinstance(format, KeptGroupsFormat)
        programs = min(STREAMS * gpu.multiprocessors, format.kept(shape) // (OUT * GROUPS))
        layout = KeptLayout(work.place.prefix, format, shape, max(1, programs))
        few = owner.bucket is not None and owner.bucket <= MOST_STREAMED
        return (KeptStream if few else KeptTiles)(owner, step, work, layout)

    @staticmethod
    def alone(owner: LinearLaunches, stages: Stages) -> KeptGroups | None:
        """Plan it as all that there is to do."""
        if stages.loops or len(stages.steps) != 1 or len(owner.accs) != 1:
            return None
        found = KeptGroups.of(owner, stages.steps[0])
        if found is not None:
            found.finished = True
        return found

    @property
    def inner(self) -> GroupedFormat:
        assert isinstance(self.layout.format.inner, GroupedFormat)
        return self.layout.format.inner

    @property
    def middle(self) -> str:
        """What is taken off codes that have no zero point of their own."""
        return repr(float(MIDDLE if self.inner.offset == "symmetric" else 0))

    @abstractmethod
    def launch(self) -> Launch:
        """Write it."""

    def array(
        self, emission: Emission, name: str, dtype: torch.dtype, repack: Callable[[Weight], Tensor]
    ) -> str:
        """Take one array of the layout."""
        place = self.work.place
        return emission.weight(place.operand, f"{place.prefix}.{name}/kept", dtype, repack)

    def numbers(self, emission: Emission, name: str) -> str:
        """Take a list of numbers of the layout."""
        return self.array(emission, name, torch.int32, getattr(self.layout, name))

    def groups(self, emission: Emission) -> dict[str, str]:
        """Take what groups have, but for their places."""
        layout = self.layout
        found = {
            "codes": self.array(emission, "codes", torch.int64, layout.codes),
            "scale": self.array(emission, "scales", torch.float16, layout.scales),
        }
        if self.inner.offset == "zero":
            found["zero"] = self.array(emission, "zeros", torch.uint8, layout.zeros)
        return found

    def emit_outputs(self, emission: Emission) -> None:
        """Write which outputs the slice has."""
        emission.line(f"out = kept.outputs({self.numbers(emission, 'order')}, cell, BN)")

    def emit_end(self, emission: Emission) -> None:
        """Write what becomes of the sums of a slice."""
        if self.finished:
            self.owner.emit_end(emission, ())
            return
        outer = self.owner.linear.outer
        target = emission.array("target", self.step.target, self.step.target.dtype)
        emission.line(f"places = inputs.places(rows, {outer}, 1, 1)")
        emission.line(f"products.store({target}, acc0, out, places, live, cell, {outer}, 1, BN)")

    def emit_last(
        self, emission: Emission, tiling: Tiling, pieces: int, cell: str, piece: str, count: str,
        first: Callable[[Emission], tuple[str, str]],
    ) -> None:  # fmt: skip
        """Write what leaves `sums` as a piece of slice `cell`, one of `pieces` in all, to the last
        program of that slice. It adds up all `count` in order; `first` writes which they are."""
        shape = (as_dim(pieces), tiling.rows * OUT)
        scratch = Scratch(f"{self.step.target.name}_pieces", torch.float32, shape)
        at = emission.array("sums_of", scratch, torch.float32)
        emission.line(f"kept.leave({at}, sums, {piece})")
        finish = self.owner.plain_emission("finish", tiling, self.owner.linear.outer, 1)
        finish.begun, finish.early = True, frozenset()
        self.emit_outputs(finish)
        at = finish.array("sums_of", scratch, torch.float32)
        start, number = first(finish)
        finish.line(f"acc0 = kept.summed({at}, {start}, {number}, BM, BN)")
        self.emit_end(finish)
        emission.line(f"if turns.last({self.numbers(emission, 'turns')}, {cell}, {count}):")
        emission.depth += 1
        emission.call(finish, "finish", f"tile, {cell}, part")
        emission.depth -= 1


class KeptStream(KeptGroups):
    """For few rows: a stream of equal steps, multiplied by threads."""

    def launch(self) -> Launch:
        owner, layout, source = self.owner, self.layout, self.work.source
        tiling = Tiling(OUT, owner.bucket or 1, 4, 1)
        emission = owner.plain_emission("stream", tiling, owner.linear.outer, 1)
        limits, begins, firsts = (
            self.numbers(emission, each) for each in ("limits", "begins", "firsts")
        )
        emission.line(f"start = kept.number({limits}, cell)")
        emission.line(f"stop = kept.number({limits}, cell + 1)")
        emission.line(f"at = kept.number({begins}, cell)")
        emission.line(f"last = kept.number({firsts}, at + 1)")
        held = self.load(emission, "start")
        emission.begin()
        emission.join()
        x = declare(emission, source)
        emission.line(f"acc = kept.zeros(BM, {GROUPS}, BN)")
        emission.line("for step in tl.range(start, stop, num_stages=1):")
        emission.depth += 1
        then = self.load(emission, "kept.following(step, stop)")
        emission.line(
            f"places = kept.places(rows, {held['place']}, {source.channels}, {layout.format.size})"
        )
        emission.line(f"total = kept.zeros(BM, {GROUPS}, BN)")
        for number in range(layout.words):
            codes = f"{held[f'word{number}']}, {held.get('zero', self.middle)}"
            emission.line(f"total = kept.dot(total, {x}, places, {codes}, {number})")
        emission.line(f"acc = kept.scaled(acc, total, {held['scale']})")
        emission.line("if kept.ends(step, last, stop):")
        emission.depth += 1
        emission.line("sums = kept.joined(acc)")
        pieces = self.numbers(emission, "pieces")
        emission.line(f"count = kept.number({pieces}, at * 2 + 1)")
        count = layout.programs + layout.slices
        self.emit_last(emission, tiling, count, "at", "at + cell", "count", self.first_and_count)
        emission.line(f"acc = kept.zeros(BM, {GROUPS}, BN)")
        emission.line("at += 1")
        emission.line(f"last = kept.number({firsts}, at + 1)")
        emission.depth -= 1
        for name, value in then.items():
            emission.line(f"{held[name]} = {value}")
        emission.depth -= 1
        grid = Cells(), Cells(layout.programs), Cells()
        return owner.launched_by(emission, "linear_kept", tiling, grid)

    def first_and_count(self, finish: Emission) -> tuple[str, str]:
        """Write which pieces a slice has."""
        pieces = self.numbers(finish, "pieces")
        first = finish.bind(f"kept.number({pieces}, cell * 2)")
        return f"{first} + cell", finish.bind(f"kept.number({pieces}, cell * 2 + 1)")

    def load(self, emission: Emission, step: str) -> dict[str, str]:
        """Write the loads of a step; return the names of what was loaded."""
        place, layout = self.work.place, self.layout
        dtype = place.specs[f"{place.prefix}.places"].dtype
        arrays = {**self.groups(emission), "place": ""}
        arrays["place"] = self.array(emission, "places", dtype, layout.places)
        codes = arrays.pop("codes")
        emission.line(f"number = {step}")
        found = {}
        for word in range(layout.words):
            at = f"{codes}, number, {GROUPS}, BN, {layout.words}, {word}"
            found[f"word{word}"] = emission.bind(f"kept.load({at})")
        for name, array in arrays.items():
            found[name] = emission.bind(f"kept.load({array}, number, {GROUPS}, BN, 1, 0)")
        return found


class KeptTiles(KeptGroups):
    """For more rows: slices times tiles of channels, multiplied by tensor cores."""

    def launch(self) -> Launch:
        owner, layout, source = self.owner, self.layout, self.work.source
        rows = max(16, min(LARGEST, owner.bucket or LARGEST))
        tiling, parts = Tiling(OUT, rows, 4, 2), self.parts()
        steps = -(-source.channels // CHANNELS)
        each = -(-steps // parts)
        emission = owner.plain_emission("kept_tiles", tiling, owner.linear.outer, 1)
        emission.line(f"first = kept.number({self.numbers(emission, 'firsts')}, cell)")
        masks = self.array(emission, "masks", torch.uint8, layout.masks)
        befores = self.array(emission, "befores", torch.int16, layout.befores)
        groups = self.groups(emission)
        emission.begin()
        emission.join()
        x = declare(emission, source)
        emission.line(f"places = inputs.places(rows, {source.stride}, 1, 1)")
        emission.line("acc0 = products.zeros(BN, BM)")
        end = f"tl.minimum(part * {each} + {each}, {steps})" if parts > 1 else str(steps)
        emission.line(f"for step in tl.range({f'part * {each}' if parts > 1 else 0}, {end}):")
        emission.depth += 1
        emission.line(f"k = step * {CHANNELS}")
        even = source.channels % CHANNELS == 0
        tile = emission.bind(tile_call(emission, source, x, "k", CHANNELS, even))
        size = f"step, cell, {layout.slices}, BN"
        mask = emission.bind(f"kept.bits({masks}, {size})")
        before = emission.bind(f"kept.bits({befores}, {size})")
        codes = f"{groups['codes']}, {groups['scale']}, {groups.get('zero', 'None')}, {self.middle}"
        sizes = f"{layout.format.size}, {GROUPS}, BN, {CHANNELS}"
        weights = emission.bind(f"kept.tile({codes}, first, {mask}, {before}, {sizes})")
        emission.line(f"acc0 = products.decoded(acc0, {weights}, {tile})")
        emission.depth -= 1
        if parts > 1:
            emission.line("sums = kept.turned(acc0)")
            piece, count = f"cell * {parts} + part", parts * layout.slices
            self.emit_last(
                emission, tiling, count, "cell", piece, str(parts),
                lambda _: (f"cell * {parts}", str(parts)),
            )  # fmt: skip
        else:
            self.emit_outputs(emission)
            self.emit_end(emission)
        grid = Cells(owner.rows, rows), Cells(layout.slices), Cells(parts)
        return owner.launched_by(emission, "linear_kept", tiling, grid)

    def parts(self) -> int:
        """Choose among how many programs the channels are split: one where there are many tiles of
        rows, for programs of one tile of them count themselves."""
        gpu, bucket = self.owner.linear.region.target.gpu, self.owner.bucket
        if bucket is None or bucket > LARGEST or gpu is None:
            return 1
        steps = -(-self.work.source.channels // CHANNELS)
        wanted = -(-TILES * gpu.multiprocessors // self.layout.slices)
        parts = max(1, min(wanted, steps // LEAST_STEPS))
        return -(-steps // -(-steps // parts))
