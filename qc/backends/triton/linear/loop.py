"""The loop over channels: tiles of x, and the terms that multiply them one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch

from qc.backends.region import ArrayArgument
from qc.backends.triton.emit import Emission
from qc.backends.triton.kernel import Scratch


@dataclass(frozen=True)
class Source:
    """Rows that are multiplied: `channels` of each, in float16. The kinds:

    rows       [rows, channels], or with before and after a view [.., before, channels, after]
    quantized  int8 codes and float32 scales, one for `group` channels
    codes      the codes alone, as int8
    selected   the channels that an array names
    summed     the sum of `parts` float32 arrays [rows, channels]
    """

    values: ArrayArgument | Scratch
    channels: int
    kind: str = "rows"
    before: int = 1
    after: int = 1
    scale: ArrayArgument | None = None
    group: int = 0
    index: tuple[int, str, torch.dtype, int] | None = None
    """Of `selected`: the operand, the array, its dtype, the channels of `values`."""
    parts: int = 1

    @property
    def stride(self) -> int:
        """The channels that `values` has."""
        return self.channels if self.index is None else self.index[3]


class Term(ABC):
    """What is multiplied in the loop. `width` channels a step, in tiles of `unit`."""

    rule: ClassVar[str]

    @property
    @abstractmethod
    def width(self) -> int: ...

    @property
    @abstractmethod
    def unit(self) -> int: ...

    def load(self, emission: Emission, loop: Loop) -> None:  # noqa: B027  optional
        """Write what can be loaded before x is known, where there is one step alone."""

    @abstractmethod
    def emit(self, emission: Emission, loop: Loop, acc: str) -> None:
        """Write what adds the products of one step to an accumulator."""


AHEAD = 1
"""Steps that factors are loaded ahead. Triton loads what tensor cores multiply ahead by itself,
through shared memory; factors stand behind the product, so they wait in registers. One step, for
Triton pipelines no loop that passes values on further."""


@dataclass
class Loop:
    """One loop while it is written. `out` holds the outputs of the tile, `block` the number of its
    first block of 16."""

    source: Source
    width: int
    unit: int
    out: str = "out"
    block: str = "block"
    tiles: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    first: str = "0"
    last: str = "0"
    ahead: list[str] = field(default_factory=list)
    """Statements in front of the loop: what is loaded ahead for its first steps."""
    moves: list[str] = field(default_factory=list)
    """Statements at the end of its body, which pass on what was loaded ahead."""

    @property
    def even(self) -> bool:
        return self.source.channels % self.width == 0

    @property
    def steps(self) -> int:
        return -(-self.source.channels // self.width)

    def at(self, start: int) -> str:
        """Return channel `start` of the step."""
        return f"k + {start}" if start else "k"

    def x(self, start: int) -> str:
        """Return the tile of x from channel `start` of the step on."""
        return self.tiles[start // self.unit]

    def group(self, step: str, size: int, number: int, surely: bool) -> str:
        """Return the number of a group of `size` channels: of a step's, the number'th. Where the
        step is not `surely` one of the loop's, the last group at most."""
        per_step = self.width // size
        at = step if per_step == 1 else f"({step}) * {per_step}"
        at = f"{at} + {number}" if number else at
        last = -(-self.source.channels // size) - 1
        return at if self.even and surely else f"tl.minimum({at}, {last})"

    def loaded_ahead(self, emission: Emission, size: int, number: int, call: str) -> str:
        """Write a load for a group, AHEAD steps before it is used: a cache miss then costs no
        time. `call` has {} in place of the group."""
        if self.steps <= AHEAD:
            return emission.bind(call.format(self.group("step", size, number, True)))
        emission.bound += 1
        names = [f"t{emission.bound}_{n}" for n in range(AHEAD + 1)]
        for n, name in enumerate(names[:-1]):
            step = f"{self.first} + {n}" if n else self.first
            self.ahead.append(f"{name} = {call.format(self.group(step, size, number, False))}")
        at = self.group(f"step + {AHEAD}", size, number, False)
        emission.line(f"{names[-1]} = {call.format(at)}")
        self.moves += [f"{a} = {b}" for a, b in pairwise(names)]
        return names[0]

    def sums(self, emission: Emission, start: int, size: int) -> str:
        """Write the sums of x over channels of the step, once; the same for all outputs."""
        key = f"sums {start} {size}"
        if key not in self.known:
            result = None
            for at in range(start, start + size, self.unit):
                ones = f"fragments.ones(BN, {self.unit}, {self.x(at)}.dtype)"
                call = f"product({ones}" if result is None else f"more({result}, {ones}"
                result = emission.bind(f"fragments.{call}, {self.x(at)})")
            assert result is not None
            self.known[key] = result
        return self.known[key]


def emit_loop(
    emission: Emission, source: Source, terms: Sequence[tuple[str, Term]], parts: int, least: int,
    begin: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write the loop over all channels, or over this program's part of them; `least` channels a
    step where there are so many. `begin` are statements that stand in front of it, and behind what
    needs nothing of other launches."""
    width = step_width(source, [term for _, term in terms], least)
    loop = Loop(source, width, min(term.unit for _, term in terms))
    if loop.steps == 1 and parts == 1:
        emission.line("k = 0")
        for _, term in terms:
            term.load(emission, loop)
    if isinstance(source.values, Scratch):
        emission.join()
    for line in begin:
        emission.line(line)
    x = declare(emission, source)
    loop.first, loop.last = "0", str(loop.steps)
    if parts > 1:
        each = -(-loop.steps // parts)
        loop.first = f"part * {each}"
        loop.last = f"tl.minimum(part * {each} + {each}, {loop.steps})"
    emission.line(f"places = inputs.places(rows, {source.stride}, {source.before}, {source.after})")
    looped, before = loop.steps > 1, emission.lines
    emission.lines = []
    if looped:
        emission.line(f"for step in tl.range({loop.first}, {loop.last}):")
        emission.depth += 1
    else:
        emission.line("step = 0")
    if looped or parts > 1:
        emission.line(f"k = step * {width}")
    for start in range(0, width, loop.unit):
        tile = tile_call(emission, source, x, loop.at(start), loop.unit, loop.even)
        loop.tiles.append(emission.bind(tile))
    for acc, term in terms:
        term.emit(emission, loop, acc)
    for line in loop.moves:
        emission.line(line)
    emission.depth = 1
    body, emission.lines = emission.lines, before
    for line in loop.ahead:
        emission.line(line)
    emission.lines += body


def step_width(source: Source, terms: Sequence[Term], least: int) -> int:
    """Return the channels of a step: what the terms need, or `least` where that divides better."""
    width = max(term.width for term in terms)
    wide = max(width, least)
    return wide if source.channels % wide == 0 else width


def declare(emission: Emission, source: Source) -> str:
    """Take what a source reads as parameters; return the name of its values."""
    bytes = dict.fromkeys(("quantized", "codes"), torch.int8)
    dtype = {**bytes, "summed": torch.float32}.get(source.kind, torch.float16)
    number = sum(1 for name in emission.parameters if name.startswith("x"))
    return emission.array(f"x{number}", source.values, dtype)


def tile_call(emission: Emission, source: Source, x: str, at: str, unit: int, even: bool) -> str:
    """Return the call that loads a tile of x from channel `at` on."""
    channels = source.channels
    match source.kind:
        case "quantized":
            assert source.scale is not None
            scale = emission.array(f"{x}_scale", source.scale, torch.float32)
            return (
                f"inputs.quantized_tile({x}, {scale}, rows, places, {at}, {channels}, "
                f"{source.group}, {unit}, tl.float16)"
            )
        case "selected":
            assert source.index is not None
            operand, array, dtype, _ = source.index
            index = emission.weight(operand, array, dtype)
            return f"inputs.selected_tile({x}, {index}, places, {at}, {channels}, {unit})"
        case "summed":
            return (
                f"inputs.summed_tile({x}, places, {at}, ROWS * {channels}, {source.parts}, "
                f"{channels}, {unit}, tl.float16)"
            )
    return f"inputs.tile({x}, places, {at}, {channels}, {source.after}, {unit}, {even})"
