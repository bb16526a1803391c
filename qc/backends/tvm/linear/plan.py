"""How a decode expression is vectorised: lanes along the outputs, or along the inputs.

Along the outputs, arrays with one entry a row are stored in blocks of 16 rows, so that what one
column of a block needs is a vector. Along the inputs, arrays stay as they are, and consecutive
columns are a vector: for tables of their own for each row, or codebooks of several weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd

import torch
from torch import Tensor

from qc.backends.tvm.linear.layout import BLOCK
from qc.backends.tvm.linear.rendering import MOST_PERMUTED, reads_data, varies
from qc.ir.weights.affine import Affine, affine_of, simplify
from qc.ir.weights.expression import (
    COL,
    LANE,
    ROW,
    Code,
    Expr,
    Index,
    Load,
    minimum,
    rebuild,
    substitute_indices,
    walk,
)
from qc.ir.weights.factored import STEP, FormPart, columns_of_step, factored
from qc.ir.weights.weight import ArraySpec

WIDTHS = (32, 16, 8)
"""Columns of a step, from the most desirable."""

BLOCK_INDEX = Index("block")
PADDING = 16
"""Bytes, in whole rows, behind the last row of packed codes: they are read in words of up to 8,
and a word that reaches beyond its row finds the next one."""

CODE_WORK = 3.0
"""Instructions, more than one, to spread the bits of a word over lanes."""

SCALAR_WORK = 3.0
"""Instructions to read a value that all lanes share: load, widen, repeat."""

GATHER_WORK = 12.0
"""Instructions of a gather, for each lane, against one of arithmetic: measured on Zen 3."""

MOST_UNROLLED = 8192.0
"""Instructions of a step: 32 KB of them are what small cores hold in their first cache, and LLVM
takes more than twice as long for twice as many."""


@dataclass(frozen=True)
class ArrayLayout:
    """How a stored array lies in a kernel.

    `row_axis` is the axis of the rows, which goes into blocks of 16; None: as it is stored.
    `unit` are the bits of the words into which bytes of packed codes are joined; None: no codes.
    """

    spec: ArraySpec
    row_axis: int | None = None
    unit: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is read."""
        if self.unit is None or self.row_axis is None:
            return self.spec.dtype
        return {8: torch.uint8, 16: torch.int16, 32: torch.int32}[self.unit]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the kernel."""
        sizes = list(self.spec.shape)
        if self.row_axis is None:
            if self.unit is not None and len(sizes) == 1:
                sizes[-1] += PADDING
            elif self.unit is not None:
                sizes[-2] += -(-PADDING // max(1, sizes[-1]))
            return tuple(sizes)
        if self.unit is not None:
            sizes[-1] = -(-sizes[-1] * 8 // self.unit)
        rows = sizes.pop(self.row_axis)
        return (-(-rows // BLOCK), *sizes, BLOCK)

    def repack(self, array: Tensor) -> Tensor:
        """Lay a stored array out."""
        if self.row_axis is None:
            if array.ndim == 1:
                return torch.nn.functional.pad(array, (0, self.shape[-1] - len(array)))
            return torch.nn.functional.pad(array, (0, 0, 0, self.shape[-2] - array.shape[-2]))
        if self.unit is not None:
            more = -array.shape[-1] % (self.unit // 8)
            joined = torch.nn.functional.pad(array, (0, more))
            # Flat: a single row may keep any stride, and then its bytes cannot be viewed as words.
            array = joined.flatten().view(self.dtype).unflatten(0, (*array.shape[:-1], -1))
        rows_last = array.movedim(self.row_axis, -1)
        padded = torch.nn.functional.pad(rows_last, (0, -rows_last.shape[-1] % BLOCK))
        blocks: Tensor = padded.unflatten(-1, (-1, BLOCK)).movedim(-2, 0)
        return blocks


@dataclass(frozen=True)
class VectorPlan:
    """The columns of a step of `width` inputs, for vectors of `lanes` values."""

    decode: Expr
    shape: tuple[int, int]
    lanes: int
    width: int
    layouts: Mapping[str, ArrayLayout]
    along_outputs: bool

    @property
    def steps(self) -> int:
        """Full steps of a row."""
        return self.shape[1] // self.width

    @property
    def rest(self) -> int:
        """Columns behind the last full step."""
        return self.shape[1] % self.width

    def columns(self, first: Expr, count: int, part: int) -> list[Expr]:
        """Return what the vectors from column `first` on are made of.

        Along the outputs: `count` columns for the `part`-th vector of a block. Along the inputs:
        `count` columns in vectors of `lanes`, for row ROW.
        """
        sizes = {LANE: self.lanes}
        if not self.along_outputs:
            starts = range(0, count, self.lanes)
            return [
                simplify(substitute_indices(self.decode, {COL: first + LANE + at}), sizes)
                for at in starts
            ]
        rows = BLOCK_INDEX * BLOCK + LANE + part * self.lanes
        found = columns_of_step(self.decode, first, count, sizes)
        blocked = [self.in_blocks(each, part) for each in found]
        return [simplify(substitute_indices(each, {ROW: rows}), sizes) for each in blocked]

    def in_blocks(self, expr: Expr, part: int) -> Expr:
        """Read blocked arrays by block and lane."""

        def change(each: Expr) -> Expr:
            inner = rebuild(each, change)
            match inner:
                case Load(array, index) if self.layouts[array].row_axis is not None:
                    return Load(array, self.blocked_index(array, index, part))
                case Code(array, index, position, width) if (
                    self.layouts[array].row_axis is not None
                ):
                    return self.words(array, index, position, width, part)
            return inner

        return change(expr)

    def blocked_index(self, array: str, index: tuple[Expr, ...], part: int) -> tuple[Expr, ...]:
        """Return the index of a row's element in the blocked array."""
        axis = self.layouts[array].row_axis
        others = tuple(each for place, each in enumerate(index) if place != axis)
        return (BLOCK_INDEX, *others, LANE + part * self.lanes)

    def words(
        self, array: str, index: tuple[Expr, ...], position: Expr, width: int, part: int
    ) -> Expr:
        """Read packed codes from words that hold them at a constant place."""
        unit = self.layouts[array].unit
        assert unit is not None
        whole, shift = word_of(position, unit)

        def word(number: int) -> Load:
            return Load(array, self.blocked_index(array, (*index, whole + number), part))

        if shift is None:
            return self.moving_word(array, word, position, width)

        found: Expr | None = None
        taken, number = 0, 0
        while taken < width:
            bits = min(width - taken, unit - shift)
            piece: Expr = (word(number) >> shift) & ((1 << bits) - 1)
            if bits == unit:
                piece = word(number)
            piece = piece << taken
            found = piece if found is None else found | piece
            taken, number, shift = taken + bits, number + 1, 0
        assert found is not None
        return found

    def moving_word(
        self, array: str, word: Callable[[int], Load], position: Expr, width: int
    ) -> Expr:
        """Read a code that starts at another bit in every step, from two or three bytes."""
        last = self.layouts[array].shape[-2] - 1
        found: Expr = word(0)
        for number in range(1, (width + 14) // 8):
            following = word(number)
            *outer, at, lane = following.index
            inside = replace(following, index=(*outer, minimum(at, last), lane))
            found = found | (inside << (8 * number))
        return (found >> (position & 7)) & ((1 << width) - 1)

    @cached_property
    def parts(self) -> list[FormPart]:
        """The columns of a step, taken apart."""
        return factored(self.columns(STEP * self.width, self.width, 0))

    @property
    def nodes(self) -> set[Expr]:
        """What every step computes, each once; what is the same in all steps is done before."""
        values = {v for part in self.parts for v in part.values or ()}
        factors = {part.factor for part in self.parts if part.factor is not None}
        nodes = {each for value in values | factors for each in walk(value)}
        return {each for each in nodes if STEP in each.indices and not each.counts}

    def is_gather(self, read: Load) -> bool:
        """Say whether a load takes one instruction a lane."""
        *outer, last = read.index
        if any(varies(index) for index in outer):
            return True
        if not varies(last):
            return False
        affine = affine_of(last, {LANE: self.lanes})
        if affine is not None:
            return (
                dict(affine.factors).get(LANE) != 1
                or len([a for a, _ in affine.factors if varies(a)]) > 1
            )
        size = self.layouts[read.array].spec.shape[-1]
        return not (reads_data(last) and size <= MOST_PERMUTED and self.lanes >= 8)

    @cached_property
    def work(self) -> float:
        """Instructions on vectors for each vector of weights."""
        columns = self.width if self.along_outputs else self.width // self.lanes
        products = sum(len(part.values) for part in self.parts if part.values is not None)
        vectors = {each for each in self.nodes if varies(each)}
        scalars = [e for e in self.nodes - vectors if isinstance(e, Load | Code)]
        gathers = [e for e in vectors if isinstance(e, Load) and self.is_gather(e)]
        codes = [each for each in vectors if isinstance(each, Code)]
        more = GATHER_WORK * len(gathers) * self.lanes / 8 + CODE_WORK * len(codes)
        shared = BLOCK // self.lanes if self.along_outputs else 1
        more += SCALAR_WORK * len(scalars) / shared
        return (len(vectors) + products + len(self.parts) + more) / columns

    @property
    def unrolled(self) -> float:
        """Instructions of a step of a block of outputs, or of a row of one."""
        vectors = BLOCK * self.width if self.along_outputs else self.width
        return self.work * vectors / self.lanes


def plan_vectors(
    decode: Expr, shape: tuple[int, int], specs: Mapping[str, ArraySpec], lanes: int
) -> VectorPlan | None:
    """Choose the plan with the least work among those of moderate code; None where lanes do not fit
    the expression."""
    found = []
    for along_outputs in (True, False):
        for width in WIDTHS:
            layouts = (
                blocked_layouts(decode, specs, width)
                if along_outputs
                else {name: ArrayLayout(spec, unit=8 if name in packed(decode) else None)
                      for name, spec in specs.items()}
            )  # fmt: skip
            if layouts is None or width % lanes:
                continue
            found.append(VectorPlan(decode, shape, lanes, width, layouts, along_outputs))
    return min(found, key=lambda p: (max(p.unrolled, MOST_UNROLLED), p.work), default=None)


def packed(decode: Expr) -> set[str]:
    """Return the arrays of packed codes."""
    return {each.array for each in walk(decode) if isinstance(each, Code)}


def blocked_layouts(
    decode: Expr, specs: Mapping[str, ArraySpec], width: int
) -> dict[str, ArrayLayout] | None:
    """Lay the arrays out in blocks of rows; None where a row's codes are not at known places."""
    axes: dict[str, set[int | None]] = {name: set() for name in specs}
    units: dict[str, int] = {}
    for read in walk(decode):
        if isinstance(read, Load | Code):
            axes[read.array].add(row_axis(read))
        if isinstance(read, Code):
            units[read.array] = gcd(units.get(read.array, 32), unit_of(read, width))
    found = {}
    for name, spec in specs.items():
        axis = next(iter(axes[name])) if len(axes[name]) == 1 else None
        if name in units and axis is None:
            return None
        found[name] = ArrayLayout(spec, axis, units.get(name))
    return found


def row_axis(read: Load | Code) -> int | None:
    """Return the place of ROW among the indices, where only that one depends on it."""
    places = [place for place, index in enumerate(read.index) if ROW in index.indices]
    if isinstance(read, Code) and ROW in read.position.indices:
        return None
    if len(places) == 1 and read.index[places[0]] == ROW:
        return places[0]
    return None


def unit_of(read: Code, width: int) -> int:
    """Return the widest words in which the codes of a step start at constant bits; else bytes."""
    at = simplify(substitute_indices(read.position, {COL: STEP * width}), {})
    affine = affine_of(at, {})
    if affine is None:
        return 8
    return max(8, gcd(32, *(factor for _, factor in affine.factors)))


def word_of(position: Expr, unit: int) -> tuple[Expr, int | None]:
    """Return the word in which a code starts, and at which bit; None where it varies."""
    affine = affine_of(position, {})
    if affine is not None and all(factor % unit == 0 for _, factor in affine.factors):
        factors = tuple((atom, factor // unit) for atom, factor in affine.factors)
        return Affine(factors, affine.constant // unit).expression(), affine.constant % unit
    return position // unit, None
