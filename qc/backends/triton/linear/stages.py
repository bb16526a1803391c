"""Which launches a linear needs: what is multiplied where, before any text is written.

The main launch loops over the channels of x, then over what chains leave (the inner side of a low
rank), adds single entries and runs the epilogue. In front of it stand the steps of chains but the
last, and copies of x where a term reads it in another form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from qc.backends.triton.kernel import Scratch
from qc.backends.triton.linear.affine import affine_term
from qc.backends.triton.linear.coded import coded_term
from qc.backends.triton.linear.decoded import Decoded
from qc.backends.triton.linear.fp4 import fp4_term, widened_term
from qc.backends.triton.linear.fp8 import fp8_term
from qc.backends.triton.linear.int8 import int8_term
from qc.backends.triton.linear.kept_layout import takes
from qc.backends.triton.linear.looked import looked_term
from qc.backends.triton.linear.loop import Source, Term
from qc.backends.triton.linear.place import Place, dtype_of
from qc.ir.types import Dim, as_dim
from qc.ir.weights.structure import Chain, Entries, Selected

FAST_RULES: tuple[Callable[[Place], Term | None], ...] = (
    affine_term,
    looked_term,
    coded_term,
    widened_term,
)
"""From the most special; without any of them everything still works, slower."""

TILE_OF_CHAIN = 128
"""Channels of a tile of a step of a chain: such steps have few outputs, and their programs wait for
memory once a tile."""
LONG_CHAIN = 512
"""Channels that one program adds up; more are split among several."""
MOST_PARTS = 8
MOST_PARTIAL = 512
"""Rows of partial sums of a chain, of all parts: every program of the main launch adds them up."""
FEW_ROWS = 4
SOME_ROWS, MOST_OUTPUTS = 16, 64
AT_ONCE, SHORT, LONG, LONGEST = 256, 1024, 2048, 6144
"""Channels of a part that is one step, loaded before x is there, for up to SOME_ROWS rows and
MOST_OUTPUTS outputs: of chains up to SHORT channels, and for one row from LONG to LONGEST. Others
hold up what runs beside them: their threads take many registers. Measured on an H200."""
MOST_ROWS, MOST_ROWS_OF_GROUPS = 64, 16
"""Rows that single entries, and groups of up to 64, are multiplied by at a time."""


@dataclass(frozen=True)
class EntriesOf:
    """Single entries, or groups of them, to add to an accumulator. `across`: the source comes
    tile by tile as [channels, rows of the tile]."""

    place: Place
    entries: Entries
    source: Source
    across: bool = False
    tile: int = 1
    """Rows that are multiplied at a time."""


@dataclass(frozen=True)
class Step:
    """A launch in front of the main one, into scratch: `work` times `source`; a copy of it (None);
    or a copy with the rows of each tile side by side ("across")."""

    source: Source
    work: Term | EntriesOf | Literal["across"] | None
    outer: int
    target: Scratch
    parts: int = 1
    tile: int = 0
    """Rows of a tile of a copy across."""
    width: int = TILE_OF_CHAIN
    """Channels of a step of a chain that is split into parts."""


@dataclass
class Stages:
    """The work of one linear region for one number of rows."""

    rows: Dim
    tile: int
    """Rows of a tile."""
    products: frozenset[str] = frozenset()
    """What the target's tensor cores multiply, int8, f8 and f4; nothing where no fast rules are
    wanted."""
    dtype: torch.dtype = torch.float16
    """Of copies, and of what chains leave."""
    steps: list[Step] = field(default_factory=list)
    loops: dict[Source, list[tuple[str, Term]]] = field(default_factory=dict)
    added: list[tuple[str, Scratch]] = field(default_factory=list)
    """Scratch [rows, out] that holds finished products."""

    @property
    def rules(self) -> str:
        """The names of the rules that multiply, for reports."""
        found = [term.rule for terms in self.loops.values() for _, term in terms]
        works = [step.work for step in self.steps]
        found += ["chain"] * any(isinstance(work, Term) for work in works)
        found += ["entries"] * any(isinstance(work, EntriesOf) for work in works)
        return "_".join(dict.fromkeys(found))

    def level(self, step: Step) -> int:
        """Return how many launches must have ended before a step can begin."""
        return self.level_of(
            step.source if not isinstance(step.work, EntriesOf) else step.work.source
        )

    def level_of(self, source: Source) -> int:
        """Return how many launches make a source."""
        for step in self.steps:
            if step.target == source.values:
                return 1 + self.level(step)
        return 0

    def add(self, acc: str, place: Place, source: Source) -> None:
        """Plan the product of a term with some rows."""
        match place.format.structure(place.shape):
            case None:
                self.add_product(acc, place, source)
            case Selected(index, part):
                self.add_selected(acc, place, index, place.part(part), self.plain(source))
            case Chain() as chain:
                self.add_chain(acc, place, chain, source)
            case Entries() as entries:
                self.add_entries(acc, place, entries, self.plain(source))

    def add_product(self, acc: str, place: Place, source: Source) -> None:
        """Multiply in the loop: bytes by bytes where both are, else in `dtype`."""
        term: Term | None = int8_term(place, source) if "int8" in self.products else None
        if term is None and "f8" in self.products:
            term = fp8_term(place, source)
        if term is None and "f4" in self.products:
            term = fp4_term(place, source)
        if term is not None:
            source = replace(source, kind="codes")
        elif source.kind == "quantized":
            source = self.plain(source)
        self.loops.setdefault(source, []).append((acc, term or multiplied(place, self.dtype)))

    def add_entries(self, acc: str, place: Place, entries: Entries, source: Source) -> None:
        """Entries are multiplied beside the loop, by programs that wait for memory while others
        keep the units busy. From some rows on they read a copy of x in which the rows of a channel
        are neighbours."""
        single = entries.width == 1
        tile = min(self.tile, MOST_ROWS if single else MOST_ROWS_OF_GROUPS)
        if tile <= (FEW_ROWS if single else 1) or (FAST_RULES and takes(place.format)):
            work = EntriesOf(place, entries, source, tile=tile)
        else:
            rows = Source(self.across(source, tile), source.channels)
            work = EntriesOf(place, entries, rows, across=True, tile=tile)
        target = Scratch(f"step{len(self.steps)}", torch.float32, (self.rows, place.outer))
        self.steps.append(Step(source, work, place.outer, target))
        self.added.append((acc, target))

    def across(self, source: Source, tile: int) -> Scratch:
        """Plan the copy [tiles, channels, rows of a tile], once."""
        for step in self.steps:
            if step.source == source and step.work == "across" and step.tile == tile:
                return step.target
        shape = (as_dim(self.rows + tile), source.channels)  # room for the last tile
        target = Scratch(f"step{len(self.steps)}", self.dtype, shape)
        self.steps.append(Step(source, "across", source.channels, target, tile=tile))
        return target

    def add_selected(self, acc: str, place: Place, index: str, part: Place, x: Source) -> None:
        array = place.operand, f"{place.prefix}.{index}", dtype_of(place, index), x.channels
        source = Source(x.values, part.inner, "selected", index=array)
        structured = part.format.structure(part.shape) is not None
        self.add(acc, part, self.plain(source) if structured else source)

    def add_chain(self, acc: str, place: Place, chain: Chain, source: Source) -> None:
        *first, last = chain.steps
        source = self.plain(source) if source.kind == "quantized" else source
        for step in first:
            source = self.step(place.part(step.part), viewed(source, step.before, step.after, self))
        source = viewed(source, last.before, last.after, self)
        if last.before == last.after == 1:
            self.add(acc, place.part(last.part), source)
            return
        final = self.step(place.part(last.part), source)
        assert isinstance(final.values, Scratch)
        self.added.append((acc, final.values))

    def step(self, place: Place, source: Source) -> Source:
        """Plan one step of a chain; return its result, seen as [rows, all of it]."""
        alone = source.before == source.after == 1
        most = max(2, min(MOST_PARTS, MOST_PARTIAL // self.tile))
        parts = min(most, -(-place.inner // LONG_CHAIN)) if alone else 1
        width = TILE_OF_CHAIN
        if parts > 1 and self.at_once(place):
            width = AT_ONCE
            parts = -(-place.inner // width)
        channels = source.before * place.outer * source.after
        shape, dtype = (self.rows, channels), self.dtype
        if parts > 1:
            shape, dtype = (as_dim(self.rows * parts), channels), torch.float32
        target = Scratch(f"step{len(self.steps)}", dtype, shape)
        term = multiplied(place, self.dtype)
        if isinstance(term, Decoded) and parts > 1:
            term = replace(term, size=width)
        self.steps.append(Step(source, term, place.outer, target, parts, width=width))
        kind = "summed" if parts > 1 else "rows"
        return Source(target, channels, kind, parts=parts)

    def at_once(self, place: Place) -> bool:
        """Say whether each part of a step of a chain is loaded at once."""
        if self.tile > SOME_ROWS or place.outer > MOST_OUTPUTS:
            return False
        return place.inner <= SHORT or (self.tile == 1 and LONG <= place.inner <= LONGEST)

    def plain(self, source: Source) -> Source:
        """Return the rows as an array of `dtype`, copied where they are something else."""
        if source.kind == "rows":
            return source
        for step in self.steps:
            if step.source == source and step.work is None:
                return Source(step.target, source.channels)
        target = Scratch(f"step{len(self.steps)}", self.dtype, (self.rows, source.channels))
        self.steps.append(Step(source, None, source.channels, target))
        return Source(target, source.channels)


def viewed(source: Source, before: int, after: int, stages: Stages) -> Source:
    """See rows [before * channels * after] as more rows of `channels`."""
    if before == after == 1:
        return source
    plain = stages.plain(source)
    return Source(plain.values, plain.channels // (before * after), "rows", before, after)


def multiplied(place: Place, dtype: torch.dtype) -> Term:
    """Choose how a term is multiplied: by the first rule that takes it, or element by element.
    Scales are not rounded to bfloat16: its 8 bits, the same for a group, would cost 1 %."""
    rules = (each for each in FAST_RULES if each != affine_term or dtype == torch.float16)
    found = (rule(place) for rule in rules)
    return next((term for term in found if term is not None), Decoded(place))
