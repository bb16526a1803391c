"""The loop over channels: tiles of x, and the terms that multiply them one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from qc.backends.region import ArrayArgument
from qc.backends.triton.emit import Emission
from qc.backends.triton.kernel import Scratch


@dataclass(frozen=True)
class Source:
    """Rows that are multiplied: `channels` of each, in float16 or bfloat16. The kinds:

    rows       [rows, channels], or with before and after a view [.., before, channels, after]
    quantized  codes, int8 or e4m3, and float32 scales, one for `group` channels; or e2m1, two in a
               byte, with scales of e4m3 and a float32 `factor` for each row
    codes      the codes alone, as bytes
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
    code: str = "int8"
    """What codes are: int8, e4m3 or e2m1."""
    factor: ArrayArgument | None = None

    @property
    def stride(self) -> int:
        """The elements of a row of `values`."""
        channels = self.channels if self.index is None else self.index[3]
        return channels // self.share

    @property
    def share(self) -> int:
        """The channels that share an element of `values`."""
        return 2 if self.code == "e2m1" else 1


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


@dataclass
class Loop:
    """One loop while it is written. In what it writes, `out` holds the outputs of the tile, `block`
    the number of its first block of 16."""

    source: Source
    width: int
    unit: int
    lanes: int = 1
    """Stretches of channels that a tile holds: see device/lanes.py."""
    registers: bool = False
    """Codes, too, wait in registers, the first ones from before the launches in front end."""
    tiles: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    first: str = "0"
    last: str = "0"
    ahead: list[str] = field(default_factory=list)
    """Statements in front of the loop: what is loaded ahead for its first steps."""
    loads: list[str] = field(default_factory=list)
    """Statements at the start of its body: what is loaded for the step after it."""
    moves: list[str] = field(default_factory=list)
    """Statements at the end of its body, which pass on what was loaded ahead."""
    begins: list[str] = field(default_factory=list)
    """Statements in front of the loop, behind those that clear accumulators."""
    ends: list[str] = field(default_factory=list)
    """Statements behind the loop."""

    @property
    def channels(self) -> int:
        """The channels of a lane."""
        return self.source.channels // self.lanes

    @property
    def even(self) -> bool:
        return self.channels % self.width == 0

    @property
    def steps(self) -> int:
        return -(-self.channels // self.width)

    @property
    def out(self) -> str:
        """The outputs of the rows of a tile."""
        return "out" if self.lanes == 1 else "lane_out"

    @property
    def live(self) -> str:
        """Which columns of a tile of x there are."""
        return "live" if self.lanes == 1 else "loaded"

    @property
    def size(self) -> str:
        """The number of rows of a tile."""
        return "BN" if self.lanes == 1 else f"BN * {self.lanes}"

    @property
    def tile(self) -> str:
        """The sizes of an accumulator."""
        return "BN, BM" if self.lanes == 1 else f"BN * {self.lanes}, BM * {self.lanes}"

    def at(self, start: int) -> str:
        """Return channel `start` of the step."""
        return f"k + {start}" if start else "k"

    def stored_at(self, at: str, columns: int) -> str:
        """Return a channel of a step as the place of `columns` stored codes: the last ones where a
        step is longer than what is left, for x is 0 there."""
        last = (-(-self.channels // columns) - 1) * columns
        return at if self.even else f"tl.minimum({at}, {last})"

    def x(self, start: int) -> str:
        """Return the tile of x from channel `start` of the step on."""
        return self.tiles[start // self.unit]

    def group(self, step: str, size: int, number: int, surely: bool) -> str:
        """Return the numbers of a group of `size` channels, one a row of a tile with lanes."""
        at = self.number(step, size, number, surely)
        count = -(-self.channels // size)
        return at if self.lanes == 1 else f"lanes.groups({at}, BN, {self.lanes}, {count})"

    def number(self, step: str, size: int, number: int, surely: bool) -> str:
        """Return the number of a group of `size` channels: of a step's, the number'th. Where the
        step is not `surely` one of the loop's, the last group at most."""
        per_step = self.width // size
        at = step if per_step == 1 else f"({step}) * {per_step}"
        at = f"{at} + {number}" if number else at
        count = -(-self.channels // size)
        return at if self.even and surely else f"tl.minimum({at}, {count - 1})"

    def loaded_ahead(self, emission: Emission, size: int, number: int, call: str) -> str:
        """Write a load for a group, a step before it is used: a cache miss then costs no time.
        `call` has {} in place of the group. Triton loads what tensor cores multiply ahead by
        itself, through shared memory; factors stand behind the product, so they wait in registers.
        One step, for Triton pipelines no loop that passes values on further."""
        first = call.format(self.group(self.first, size, number, False))
        after = call.format(self.group("step + 1", size, number, False))
        return self.carried(emission, first, after)

    def codes_ahead(
        self, emission: Emission, name: str, start: int, columns: int, sizes: str
    ) -> str:
        """Write the loads of the words of a plane from channel `start` of a step on: in registers,
        a step ahead."""
        pairs = self.pairs_ahead(emission, name, start, columns, sizes)
        return emission.bind(f"fragments.words({pairs})")

    def pairs_ahead(
        self, emission: Emission, name: str, start: int, columns: int, sizes: str
    ) -> str:
        """Write the loads of pairs of words of a plane, likewise."""
        sizes = f"{sizes}, BN, {self.lanes}"
        at, after = (
            self.stored_at(f"({step}) * {self.width} + {start}", columns)
            for step in (self.first, f"tl.minimum(step + 1, {self.steps - 1})")
        )
        at, after = (f"fragments.load_pairs({name}, block, {k}, {sizes})" for k in (at, after))
        return self.carried(emission, at, after)

    def before(self, emission: Emission, call: str) -> str:
        """Write what is the same for all steps in front of the loop; return its name."""
        emission.bound += 1
        name = f"t{emission.bound}_0"
        self.ahead.append(f"{name} = {call}")
        return name

    def carried(self, emission: Emission, first: str, after: str) -> str:
        """Write a load in front of the loop, and in a step that of the one after; return the name
        of what the step has."""
        emission.bound += 1
        name, then = f"t{emission.bound}_0", f"t{emission.bound}_1"
        self.ahead.append(f"{name} = {first}")
        if self.steps > 1:
            self.loads.append(f"{then} = {after}")
            self.moves.append(f"{name} = {then}")
        return name

    def beside(self, emission: Emission, value: str) -> str:
        """Begin an accumulator of a term's own; return its name."""
        emission.bound += 1
        self.begins.append(f"own{emission.bound} = {value}")
        return f"own{emission.bound}"

    def sums(self, emission: Emission, start: int, size: int) -> str:
        """Write the sums of x over channels of the step, once; the same for all outputs."""
        key = f"sums {start} {size}"
        if key not in self.known:
            result = None
            for at in range(start, start + size, self.unit):
                ones = f"fragments.ones({self.size}, {self.unit}, {self.x(at)}.dtype)"
                call = f"product({ones}" if result is None else f"more({result}, {ones}"
                result = emission.bind(f"fragments.{call}, {self.x(at)})")
            assert result is not None
            self.known[key] = result
        return self.known[key]


def emit_loop(
    emission: Emission, source: Source, terms: Sequence[tuple[str, Term]], parts: int, least: int,
    begin: Sequence[str] = (), lanes: int = 1, registers: bool = False, outer: int = 0,
    unit: int | None = None, early: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write the loop over all channels, or over this program's part of them; `least` channels a
    step where there are so many, `unit` at once, or what suits all terms. `early` and `begin` are
    statements that stand in front of it: where nothing is needed of other launches, and behind."""
    width = step_width(source.channels // lanes, [term for _, term in terms], least)
    unit = unit or min(term.unit for _, term in terms)
    loop = Loop(source, width, unit, lanes, registers)
    each = -(-loop.steps // parts)
    if parts > 1:
        loop.first = f"part * {each}"
        loop.last = f"tl.minimum(part * {each} + {each}, {loop.steps})"
    else:
        loop.first, loop.last = "0", str(loop.steps)
    alone = each == 1 and (loop.steps == 1 or not registers)
    if alone:
        emission.line(f"k = part * {width}" if parts > 1 else "k = 0")
        for _, term in terms:
            term.load(emission, loop)
    x = declare(emission, source)
    looped, before = loop.steps > 1 and not (alone and parts > 1), emission.lines
    emission.lines, emission.depth = [], emission.depth + looped
    for start in range(0, width, loop.unit):
        at = loop.at(start)
        tile = tile_call(emission, source, x, at, loop.unit, loop.even, loop.live)
        loop.tiles.append(emission.bind(tile))
    for acc, term in terms:
        term.emit(emission, loop, acc)
    for line in loop.moves:
        emission.line(line)
    body, emission.lines, emission.depth = emission.lines, before, emission.depth - looped
    if lanes > 1:
        emission.line(f"lane_out = lanes.outputs(cell, BN, {outer}, {lanes})")
    for line in (*loop.ahead, *early):
        emission.line(line)
    emission.begin()
    if isinstance(source.values, Scratch):
        emission.join()
    for line in (*begin, *loop.begins):
        emission.line(line)
    emission.line(places_of(source, lanes))
    if lanes > 1:
        emission.line(f"loaded = lanes.live(tile, BM, ROWS, {lanes})")
    if looped:
        emission.line(f"for step in tl.range({loop.first}, {loop.last}):")
        emission.depth += 1
    else:
        emission.line("step = part" if parts > 1 else "step = 0")
    if looped or parts > 1:
        emission.line(f"k = step * {width}")
    for line in loop.loads:
        emission.line(line)
    emission.lines += body
    emission.depth -= looped
    for line in loop.ends:
        emission.line(line)


def places_of(source: Source, lanes: int) -> str:
    """Return the statement that says where the rows of a tile of x start."""
    if lanes == 1:
        call = f"inputs.places(rows, {source.stride}, {source.before}, {source.after})"
    else:
        call = f"lanes.places(lanes.numbers(tile, BM, ROWS, {lanes}), BM, {source.stride}, {lanes})"
    return f"places = {call}"


def step_width(channels: int, terms: Sequence[Term], least: int) -> int:
    """Return the channels of a step: what the terms need, or `least` where that divides better."""
    width = max(term.width for term in terms)
    wide = max(width, least)
    return wide if channels % wide == 0 else width


def declare(emission: Emission, source: Source) -> str:
    """Take what a source reads as parameters; return the name of its values."""
    bytes = dict.fromkeys(
        ("quantized", "codes"), torch.int8 if source.code.startswith("int") else torch.uint8
    )
    dtype = {**bytes, "summed": torch.float32}.get(source.kind, emission.dtype)
    number = sum(1 for name in emission.parameters if name.startswith("x"))
    return emission.array(f"x{number}", source.values, dtype)


def tile_call(
    emission: Emission, source: Source, x: str, at: str, unit: int, even: bool, live: str = "live"
) -> str:  # fmt: skip
    """Return the call that loads a tile of x from channel `at` on."""
    channels = source.channels
    match source.kind:
        case "quantized" if source.code == "e2m1":
            assert source.scale is not None
            assert source.factor is not None
            scale = emission.array(f"{x}_scale", source.scale, torch.uint8)
            factor = emission.array(f"{x}_factor", source.factor, torch.float32)
            return (
                f"fp4.row_tile({x}, {scale}, {factor}, rows, places, {at}, {channels}, "
                f"{source.group}, {unit}, {emission.dtype_name})"
            )
        case "codes" if source.share > 1:
            share = source.share
            where = f"({at}) // {share}, {channels // share}, 1, {unit // share}"
            return f"inputs.tile({x}, places, {live}, {where}, {even})"
        case "quantized":
            assert source.scale is not None
            scale = emission.array(f"{x}_scale", source.scale, torch.float32)
            kind = "small_float" if source.code == "e4m3" else "quantized"
            return (
                f"inputs.{kind}_tile({x}, {scale}, rows, places, {live}, {at}, {channels}, "
                f"{source.group}, {unit}, {emission.dtype_name})"
            )
        case "selected":
            assert source.index is not None
            operand, array, dtype, _ = source.index
            index = emission.weight(operand, array, dtype)
            return f"inputs.selected_tile({x}, {index}, places, {at}, {channels}, {unit})"
        case "summed":
            return (
                f"inputs.summed_tile({x}, places, {at}, ROWS * {channels}, {source.parts}, "
                f"{channels}, {unit}, {emission.dtype_name})"
            )
    return f"inputs.tile({x}, places, {live}, {at}, {channels}, {source.after}, {unit}, {even})"
