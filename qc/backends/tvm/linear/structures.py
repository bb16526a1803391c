"""Terms that are built of smaller products: chains, and terms on some inputs.

The smaller matrices are terms like any other, multiplied by whatever rule takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.inputs import Inputs, for_each_row
from qc.backends.tvm.linear.layout import BLOCK
from qc.backends.tvm.linear.panels import FLOAT_TILES
from qc.backends.tvm.linear.rendering import VectorRendering
from qc.backends.tvm.linear.skeleton import Signature, accumulator
from qc.backends.tvm.linear.stored import declare_plain, plain_arrays, take
from qc.backends.tvm.linear.term import STORED_NAMES, Place, Products, TermKernel, TermRule
from qc.backends.tvm.linear.vectors import float_lanes, span, splat
from qc.ir.target import Target
from qc.ir.types import ActivationFormat
from qc.ir.weights.expression import COL, ROW, Expr
from qc.ir.weights.structure import Chain, Part, Selected, Step

PARALLEL_FROM = 1 << 17
"""Weights of a step of a chain from which a second launch costs less than it gains."""


def place_of(place: Place, part: Part, activation: ActivationFormat | None = None) -> Place:
    """Return the place of a matrix inside a term."""
    prefix = f"{place.prefix}{part.prefix}."
    return Place(place.operand, prefix, part.format, part.shape, place.target, activation)


# ---------------------------------------------------------------- chains


@dataclass(frozen=True, eq=False)
class ChainKernel(TermKernel):
    """Run the first steps into scratch memory; the last one is added block by block.

    A step on vectors that lie `after` apart runs into scratch memory too.
    """

    rule: ClassVar[str] = "chain"
    place: Place
    chain: Chain
    kernels: tuple[TermKernel | None, ...]
    """Of the steps with after = 1; the others are `StridedStep`s."""

    @property
    def work(self) -> float:
        weights = self.place.outer * self.place.inner
        return sum(
            (1.0 if kernel is None else kernel.work)
            * step.part.shape[0] * step.part.shape[1] * step.before * step.after
            for step, kernel in zip(self.chain.steps, self.kernels, strict=True)
        ) / max(1, weights)  # fmt: skip

    @property
    def ends_in_blocks(self) -> bool:
        """Say whether the last step is an ordinary product."""
        last = self.chain.steps[-1]
        return last.before == last.after == 1

    def declare(self, signature: Signature) -> None:
        for step, kernel in zip(self.chain.steps, self.kernels, strict=True):
            if kernel is None:
                self.strided(step).declare(signature)
            else:
                kernel.declare(signature)

    def strided(self, step: Step) -> StridedStep:
        """Return how a step with after > 1 is run."""
        return StridedStep(place_of(self.place, step.part), step)

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        *first, last = zip(self.chain.steps, self.kernels, strict=True)
        if not self.ends_in_blocks:
            first.append(last)
        for step, kernel in first:
            if kernel is None:
                inputs = self.strided(step).run(signature, inputs)
            else:
                inputs = product(signature, kernel, seen_as(inputs, step), step)
        if self.ends_in_blocks:
            step, kernel = last
            assert kernel is not None
            inputs = seen_as(inputs, step)
            kernel.prepare(signature, inputs)
        signature.scratch[self] = inputs

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        mine: Inputs = signature.scratch[self]
        last = self.kernels[-1]
        if self.ends_in_blocks and last is not None:
            return last.block(signature, mine, block, many)
        lanes = float_lanes(self.place.target)

        def add(row: Any, height: int, sums: Any) -> None:
            for r in range(height):
                for first in range(0, BLOCK, lanes):
                    at = span(first, lanes)
                    found = mine.values[row + r, span(block * BLOCK + first, lanes)]
                    T.buffer_store(sums[r], sums[r][at] + found, [at])

        return add


def seen_as(inputs: Inputs, step: Step) -> Inputs:
    """View rows of [before, in] as `before` times as many rows of [in]: a copy, for TVM plans
    memory by buffers and does not see that two of them are one."""
    if step.before == 1:
        return inputs
    inputs.need_values()
    inner = step.part.shape[1]
    rows = inputs.rows * T.int64(step.before)
    values = T.alloc_buffer((rows, T.int64(inner)), "float32", layout=None)
    with (
        T.serial(T.int64(0), inputs.rows) as row,
        T.serial(T.int64(0), T.int64(step.before)) as number,
        T.serial(T.int64(0), T.int64(inner)) as at,
    ):
        value = inputs.values[row, number * inner + at]
        T.buffer_store(values, value, [row * step.before + number, at])
    return Inputs(rows, inner, inputs.target, values=values)


def product(signature: Signature, kernel: TermKernel, inputs: Inputs, step: Step) -> Inputs:
    """Emit the product of all rows with a matrix, into scratch memory [rows, before * out]."""
    outer, inner = step.part.shape
    target, before = inputs.target, step.before
    height = FLOAT_TILES[target.vector_bytes]
    kernel.prepare(signature, inputs)
    blocks = -(-outer // BLOCK)
    rows = T.floordiv(inputs.rows, T.int64(before))
    width = -(-before * outer // BLOCK) * BLOCK
    result = T.alloc_buffer((rows, T.int64(width)), "float32", layout=None)

    def emit_block(block: Any) -> None:
        def tile(add: Products, row: Any, count: int) -> None:
            sums = [accumulator(float_lanes(target)) for _ in range(count)]
            add(row, count, sums)
            for r, each in enumerate(sums):
                store_block(result, each, row + r, block, step, target)

        with T.If(inputs.rows < height):
            with T.Then():
                add = kernel.block(signature, inputs, block, False)
                with T.serial(T.int64(0), inputs.rows) as row:
                    tile(add, row, 1)
            with T.Else():
                add = kernel.block(signature, inputs, block, True)
                tiles = T.floordiv(inputs.rows + (height - 1), height)
                with T.serial(T.int64(0), tiles) as number:
                    tile(add, T.Bind(T.min(number * height, inputs.rows - height)), height)

    loop = T.parallel if blocks > 1 and outer * inner >= PARALLEL_FROM else T.serial
    with loop(T.int64(0), T.int64(blocks)) as block:
        emit_block(block)
    return Inputs(rows, before * outer, target, values=result)


def store_block(result: Any, sums: Any, row: Any, block: Any, step: Step, target: Target) -> None:
    """Store 16 outputs of one row of [rows * before, out] where they belong in [rows, ...]."""
    outer, before, lanes = step.part.shape[0], step.before, float_lanes(target)
    place = row if before == 1 else T.Bind(T.floordiv(row, T.int64(before)))
    start = block * BLOCK
    if before > 1:
        start = T.Bind(start + T.floormod(row, T.int64(before)) * outer)
    if outer % BLOCK == 0 or before == 1:  # behind the last row there is room for a block
        for first in range(0, BLOCK, lanes):
            value = sums[span(first, lanes)]
            T.buffer_store(result, value, [place, span(start + first, lanes)])
        return
    copy = T.alloc_buffer((BLOCK,), "float32", layout=None)
    for first in range(0, BLOCK, lanes):
        T.buffer_store(copy, sums[span(first, lanes)], [span(first, lanes)])
    count = T.min(T.int64(BLOCK), T.int64(outer) - block * BLOCK)
    with T.serial(T.int64(0), count) as number:
        T.buffer_store(result, copy[number], [place, start + number])


@dataclass(frozen=True)
class StridedStep:
    """result[a, n, b] = sum over k of M[n, k] x[a, k, b], vectorised over b."""

    place: Place
    step: Step

    @cached_property
    def decode(self) -> Expr:
        return self.place.format.decode(self.place.shape, ROW, COL)

    def declare(self, signature: Signature) -> None:
        """Declare the matrix as it is stored."""
        declare_plain(signature, self.place, self.decode)

    def run(self, signature: Signature, inputs: Inputs) -> Inputs:
        """Emit the step for all rows."""
        inputs.need_values()
        outer, inner = self.place.shape
        before, after = self.step.before, self.step.after
        target = self.place.target
        size = before * outer * after
        width = -(-size // BLOCK) * BLOCK
        result = T.alloc_buffer((inputs.rows, T.int64(width)), "float32", layout=None)
        arrays = plain_arrays(signature, self.place, self.decode)
        lanes = float_lanes(target) if after % float_lanes(target) == 0 else 1

        def compute(row: Any, a: Any, n: Any) -> None:
            start = T.Bind((a * outer + n) * after)
            with T.serial(T.int64(0), T.int64(after // lanes)) as b:
                T.buffer_store(
                    result, splat(T.float32(0), lanes), [row, span(start + b * lanes, lanes)]
                )
            with T.serial(T.int64(0), T.int64(inner)) as k:
                rendering = VectorRendering(arrays, {ROW: n, COL: k}, 1, target)
                weight = T.Bind(rendering.value(self.decode))
                source = T.Bind((a * inner + k) * after)
                with T.serial(T.int64(0), T.int64(after // lanes)) as b:
                    at = span(start + b * lanes, lanes)
                    x = inputs.values[row, span(source + b * lanes, lanes)]
                    T.buffer_store(result, result[row, at] + splat(weight, lanes) * x, [row, at])

        flat = T.int64(before * outer)
        with T.serial(T.int64(0), inputs.rows) as row:
            loop = T.parallel if size * inner >= PARALLEL_FROM else T.serial
            with loop(T.int64(0), flat) as number:
                a = T.Bind(T.floordiv(number, T.int64(outer)))
                compute(row, a, T.Bind(T.floormod(number, T.int64(outer))))
        return Inputs(inputs.rows, size, target, values=result)


def chain_term(place: Place, choose: TermRule) -> TermKernel | None:
    """Run a chain, its matrices by the rules that take them."""
    chain = place.format.structure(place.shape)
    if not isinstance(chain, Chain):
        return None
    kernels = []
    for number, step in enumerate(chain.steps):
        plain = number == 0 and step.before == 1
        inner = place_of(place, step.part, place.activation if plain else None)
        kernels.append(choose(inner) if step.after == 1 else None)
    return ChainKernel(place, chain, tuple(kernels))


# ---------------------------------------------------------------- some inputs


@dataclass(frozen=True, eq=False)
class SelectedKernel(TermKernel):
    """Gather the inputs once a call, then multiply them by the inner term."""

    rule: ClassVar[str] = "selected"
    place: Place
    selected: Selected
    inner: TermKernel

    @property
    def work(self) -> float:
        return self.inner.work * self.selected.part.shape[1] / max(1, self.place.inner)

    def declare(self, signature: Signature) -> None:
        name = self.selected.index
        spec = self.place.specs[name]
        kind = STORED_NAMES[spec.dtype]
        self.place.declare(signature, name, kind, spec.shape, partial(take, name))
        self.inner.declare(signature)

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        inputs.need_values()
        count = self.selected.part.shape[1]
        index = self.place.buffer(signature, self.selected.index)
        values = T.alloc_buffer((inputs.rows, T.int64(count)), "float32", layout=None)

        def gather(row: Any) -> None:
            with T.serial(T.int64(0), T.int64(count)) as number:
                source = T.Cast("int64", index[number])
                if str(index.dtype) == "int16":  # the bits of an unsigned index
                    source = T.bitwise_and(source, T.int64(0xFFFF))
                T.buffer_store(values, inputs.values[row, source], [row, number])

        for_each_row(inputs.rows, gather)
        mine = Inputs(inputs.rows, count, inputs.target, values=values)
        self.inner.prepare(signature, mine)
        signature.scratch[self] = mine

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        return self.inner.block(signature, signature.scratch[self], block, many)


def selected_term(place: Place, choose: TermRule) -> TermKernel | None:
    """Multiply some inputs, by the rule that takes the inner term."""
    selected = place.format.structure(place.shape)
    if not isinstance(selected, Selected):
        return None
    inner = choose(place_of(place, selected.part))
    return None if inner is None else SelectedKernel(place, selected, inner)
