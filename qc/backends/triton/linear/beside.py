"""What a streamed launch adds to its products: a low rank, and listed entries.

A program has few tiles of outputs. What is to be added to all of them is computed at once, and left
in memory that only this program reads: listed entries while codes of the first tile are on their
way, a low rank behind the product of the first tile, for its sums over the channels come from other
programs (device/ranks.py). Tile by tile the same would wait for memory three times each, and take
the registers that codes wait in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch

from qc.backends.region import ArrayArgument
from qc.backends.triton.emit import Emission
from qc.backends.triton.glue import power_of_two
from qc.backends.triton.kernel import Scratch
from qc.backends.triton.linear.finished import zeros
from qc.backends.triton.linear.loop import Source, Term
from qc.backends.triton.linear.place import Place
from qc.backends.triton.linear.stages import EntriesOf, Stages, Step
from qc.ir.weights.expression import COL, ENTRY, ROW, Load, is_structural

PIECES = (256, 512, 1024, 2048, 4096)
"""Channels of a rank that a program multiplies."""
MOST_OUTPUTS = 64
"""Outputs of a program, at most."""
TOGETHER, ENTRIES = 64, 2048
"""Entries of an output, and of all outputs of a program, that are loaded at once."""


class Beside(Protocol):
    """Something that is added to products, while its launch is written. `every` names the outputs
    of all tiles of a program."""

    follows: ClassVar[bool]
    """Whether something is computed behind the first tile."""

    def load(self, emission: Emission, every: str) -> None:
        """Write what needs nothing of other launches."""

    def begin(self, emission: Emission, x: str) -> str | None:
        """Write what is computed as soon as x is there; return the name of sums, if there are."""

    def follow(self, emission: Emission, every: str, x: str) -> str | None:
        """Write what is computed behind the first tile; return the name of sums, if there are."""


@dataclass
class Listed:
    """Single entries of x, as they are stored."""

    work: EntriesOf
    together: int
    """Entries of an output that are loaded at once."""
    follows: ClassVar[bool] = False
    held: str = ""

    @property
    def arrays(self) -> tuple[str, str]:
        """The names of the arrays of columns and values."""
        column, value = self.work.entries.column, self.work.entries.value
        assert isinstance(column, Load)
        assert isinstance(value, Load)
        return column.array, value.array

    def load(self, emission: Emission, every: str) -> None:
        place, entries = self.work.place, self.work.entries
        bounds = (place.named(each) for each in (entries.start, entries.stop))
        calls = [place.function(emission, each, (ROW,)) for each in bounds]
        start, stop = (emission.bind(f"{name}({every}{arrays})") for name, arrays in calls)
        stored = ", ".join(place.stored(emission, each) for each in self.arrays)
        first = emission.bind(f"entries.first({start}, {stop}, {stored}, {self.together})")
        self.held = f"{start}, {stop}, {stored}, {first}[0], {first}[1], {self.together}"

    def begin(self, emission: Emission, x: str) -> str:
        return emission.bind(f"streams.gathered({x}, {self.held})")

    def follow(self, emission: Emission, every: str, x: str) -> None:
        """All is computed."""


@dataclass
class LowRank:
    """up (down x): each program multiplies `size` channels of a rank of `down` [rank, channels]."""

    down: Place
    up: Place
    programs: int
    size: int
    follows: ClassVar[bool] = True
    held: str = ""

    @property
    def rank(self) -> int:
        return self.down.outer

    @property
    def jobs(self) -> int:
        """Pieces of all ranks, a program each."""
        return self.rank * (self.down.inner // self.size)

    @property
    def sizes(self) -> str:
        """The arguments that say how slots are read."""
        ranks, parts = power_of_two(self.rank), power_of_two(self.down.inner // self.size)
        return f"{self.rank}, {self.jobs}, {ranks}, {parts}"

    def slots(self, emission: Emission) -> str:
        """Take what holds a sum a job as a parameter: zeros beside the weight at first."""
        make = partial(zeros, 2 * self.jobs)
        return emission.weight(self.down.operand, "turns_of_slots", torch.int32, make)

    def numbers(self, emission: Emission) -> str:
        """Take what holds the number of a launch, for each program, as a parameter."""
        make = partial(zeros, self.programs)
        return emission.weight(self.down.operand, "turns_of_programs", torch.int32, make)

    def at(self, job: str) -> tuple[str, str]:
        """Return the calls for the rank and the channels of a job."""
        which = f"{job}, {self.rank}, {self.jobs}"
        return f"ranks.rank({which})", f"ranks.channels({which}, {self.size})"

    def load(self, emission: Emission, every: str) -> None:
        decode, arrays = self.down.function(emission, self.down.decode, (ROW, COL))
        rank, channel = self.at("first")
        self.held = emission.bind(f"{decode}({rank}, {channel}{arrays})")

    def begin(self, emission: Emission, x: str) -> None:
        self.write_all(emission)
        numbers, slots = self.numbers(emission), self.slots(emission)
        emission.line(f"launch = ranks.number({numbers}, first)")
        _, channel = self.at("first")
        at = f"{slots}, first, launch, {self.held}, {x}, {channel}, {self.jobs}"
        emission.line(f"ranks.leave({at})")

    def write_all(self, emission: Emission) -> None:
        """Write a function that fills all slots."""
        decode, arrays = self.down.function(emission, self.down.decode, (ROW, COL))
        pointers = "".join(f", a{number}" for number in range(arrays.count(",")))
        rank, channel = self.at("job")
        emission.functions.append(
            f"""@triton.jit
def {emission.prefix}all_ranks(x, slots, launch{pointers}):
    for job in range(0, {self.jobs}):
        channel = {channel}
        down = {decode}({rank}, channel{pointers})
        ranks.leave(slots, job, launch, down, x, channel, {self.jobs})"""
        )

    def follow(self, emission: Emission, every: str, x: str) -> str:
        up, passed = self.up.function(emission, self.up.decode, (ROW, COL))
        ranks = f"ranks.numbers({power_of_two(self.rank)}, {self.rank})"
        held = emission.bind(f"{up}({every}[:, None], {ranks}{passed})")
        slots = self.slots(emission)
        emission.line(f"launch = ranks.kept({self.numbers(emission)}, begun)")
        look = f"word = ranks.look({slots}, launch, {self.sizes})"
        emission.line(look)
        emission.line(f"if ranks.missing(word, launch, {self.jobs}):")
        emission.depth += 1
        _, arrays = self.down.function(emission, self.down.decode, (ROW, COL))
        emission.line(f"{emission.prefix}all_ranks({x}, {slots}, launch{arrays})")
        emission.line("ranks.meet()")
        emission.line(look)
        emission.depth -= 1
        return emission.bind(f"ranks.multiplied({held}, word)")


def piece(rank: int, channels: int, programs: int) -> int | None:
    """Return the channels that each program multiplies, so many that all ranks have a program for
    each piece; None where there are too few programs."""
    sizes = (size for size in PIECES if channels % size == 0)
    return next((size for size in sizes if rank * (channels // size) <= programs), None)


def besides(
    stages: Stages, source: Source, programs: int, outputs: int
) -> list[Beside] | None:  # fmt: skip
    """Plan everything but the products of codes with `source`, for programs of so many outputs;
    None where it is something that a streamed launch does not do."""
    found: list[Beside] = []
    if stages.steps and outputs > MOST_OUTPUTS:
        return None
    others = {s.values: terms for s, terms in stages.loops.items() if s != source}
    for step in stages.steps:
        made = listed(step, source, outputs) or low_rank(step, source, others, programs)
        if made is None:
            return None
        found.append(made)
    once = len({type(each) for each in found}) == len(found)
    return found if once and not others else None


def listed(step: Step, source: Source, outputs: int) -> Listed | None:
    """View a step as single entries of the x of the loop, stored as they are, for so many outputs
    of a program."""
    work = step.work
    if not isinstance(work, EntriesOf) or work.across or work.source != source:
        return None
    match work.entries.value, work.entries.column:
        case Load(_, (at,)), Load(_, (also,)) if at == also == ENTRY and work.entries.width == 1:
            return Listed(work, min(TOGETHER, ENTRIES // outputs))
    return None


def low_rank(
    step: Step,
    source: Source,
    others: dict[ArrayArgument | Scratch, list[tuple[str, Term]]],
    programs: int,
) -> LowRank | None:
    """View a step as the first one of two of a chain, and take the second one out of `others`."""
    if not isinstance(step.work, Term) or step.source != source:
        return None
    terms = others.get(step.target, [])
    if len(terms) != 1:
        return None
    down, up = getattr(step.work, "place", None), getattr(terms[0][1], "place", None)
    if not isinstance(down, Place) or not isinstance(up, Place):
        return None
    if is_structural(down.decode) or is_structural(up.decode) or up.inner != down.outer:
        return None
    size = piece(down.outer, source.channels, programs)
    if size is None:
        return None
    del others[step.target]
    return LowRank(down, up, programs, size)
