"""Terms that are decoded output by output, lanes along the inputs: the loops around a reader."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.bit_serial_reader import shuffled
from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.layout import BLOCK
from qc.backends.tvm.linear.panels import add_tile, clear_outputs, new_panel, reader_of
from qc.backends.tvm.linear.plan import BLOCK_INDEX, ArrayLayout, VectorPlan, blocked_layouts
from qc.backends.tvm.linear.rendering import StoredArray, VectorRendering
from qc.backends.tvm.linear.skeleton import Signature, accumulator
from qc.backends.tvm.linear.stored import laid_out
from qc.backends.tvm.linear.term import STORED_NAMES, Place, Products, TermKernel
from qc.backends.tvm.linear.vectors import (
    added,
    float_lanes,
    prefetch,
    span,
    splat,
    sum_of_lanes,
)
from qc.ir.weights.expression import Code, Const, Expr, Load, walk

CHAINS = 8  # sums of an output: two additions a cycle, each ready after four

PREFETCH_BYTES = 2048
"""How far ahead codes are asked for: a few rows. A row's codes are read in too small bites for the
processor to run ahead of them by itself."""


def prefetch_codes(codes: Any, output: Any, start: Any, size: int) -> None:
    """Ask for the codes that follow those of a step of `size` bytes, some steps later."""
    for line in range(0, size, 64):
        prefetch(T.address_of(codes[output, start + (PREFETCH_BYTES + line)]))


class OutputReader(Protocol):
    """The weights of one output."""

    def vectors(self, step: Any, count: int) -> Iterator[list[Any]]:
        """Yield what the float32 vectors of the first `count` columns of a step are sums of; the
        last one may reach beyond them."""


@dataclass(frozen=True, eq=False)
class AlongInputs(TermKernel):
    """Read the weights of an output in steps of `width` columns, times the `factor` of its row."""

    place: Place
    factor: Expr | None
    factor_layouts: Mapping[str, ArrayLayout]
    """The arrays of the factor, in blocks of 16 rows where they have rows."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Columns of a step."""

    @abstractmethod
    def reader(self, signature: Signature) -> Callable[[Any], OutputReader]:
        """Return how an output is read."""

    @property
    def lanes(self) -> int:
        return float_lanes(self.place.target)

    def declare(self, signature: Signature) -> None:
        for name, layout in self.factor_layouts.items():
            dtype, repack = STORED_NAMES[layout.dtype], partial(laid_out, name, layout)
            self.place.declare(signature, f"rows.{name}", dtype, layout.shape, repack)

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        inputs.need_values()

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        factors = self.factors(signature, block)
        read = self.reader(signature)
        panel = self.panel(read, factors, block) if many else None

        def add(row: Any, height: int, sums: Any) -> None:
            if panel is None:
                self.add_row(read, factors, inputs.values, block, row, sums[0])
            else:
                weights = reader_of(panel, self.lanes)
                add_tile(inputs.values, self.place.inner, weights, self.lanes, row, height, sums)

        return add

    def factors(self, signature: Signature, block: Any) -> list[Any]:
        """Return what multiplies the outputs of a block, in vectors."""
        count = BLOCK // self.lanes
        if self.factor is None:
            return [splat(T.float32(1), self.lanes)] * count
        arrays = {
            name: StoredArray(
                self.place.buffer(signature, f"rows.{name}"), layout.dtype, layout.shape
            )
            for name, layout in self.factor_layouts.items()
        }
        rendering = VectorRendering(arrays, {BLOCK_INDEX: block}, self.lanes, self.place.target)
        plan = VectorPlan(
            self.factor, self.place.shape, self.lanes, BLOCK, self.factor_layouts, True
        )
        return [rendering.vector(plan.columns(Const(0), 1, each)[0]) for each in range(count)]

    def outputs(self, block: Any) -> Any:
        """Return how many outputs a block has."""
        if self.place.outer % BLOCK == 0:
            return T.int64(BLOCK)
        return T.min(T.int64(BLOCK), T.int64(self.place.outer) - block * BLOCK)

    def each_vector(
        self, read: OutputReader, emit: Callable[[list[Any], Any, int, int], None]
    ) -> None:
        """Emit (parts, column, lanes that count, number in its step) of all vectors."""
        steps, rest = divmod(self.place.inner, self.width)
        if steps:
            with T.serial(T.int64(0), T.int64(steps)) as step:
                for number, parts in enumerate(read.vectors(step, self.width)):
                    emit(parts, step * self.width + number * self.lanes, self.lanes, number)
        if rest:
            for number, parts in enumerate(read.vectors(T.int64(steps), rest)):
                first = number * self.lanes
                column = T.int64(steps * self.width + first)
                emit(parts, column, min(self.lanes, rest - first), number)

    def add_row(
        self,
        read: Callable[[Any], OutputReader],
        factors: Sequence[Any],
        x: Any,
        block: Any,
        row: Any,
        sums: Any,
    ) -> None:
        """Multiply one row of x by the outputs of a block, one after the other."""
        found, lanes, at = accumulator(self.lanes), self.lanes, span(0, self.lanes)
        with T.serial(T.int64(0), self.outputs(block)) as number:
            chains = [accumulator(lanes, size=lanes) for _ in range(CHAINS)]
            tail = accumulator(1, size=1)

            def add(parts: list[Any], column: Any, count: int, vector: int) -> None:
                if count < lanes:
                    value = T.Bind(added(parts))
                    for lane in range(count):
                        product = shuffled([value], [lane]) * x[row, column + lane]
                        T.buffer_store(tail, tail[T.int64(0)] + product, [T.int64(0)])
                    return
                inputs = T.Bind(x[row, span(column, lanes)])
                for part, value in enumerate(parts):
                    chain = chains[(vector * len(parts) + part) % CHAINS]
                    T.buffer_store(chain, chain[at] + value * inputs, [at])

            self.each_vector(read(T.Bind(block * BLOCK + number)), add)
            whole = sum_of_lanes(T.Bind(added([chain[at] for chain in chains])))
            T.buffer_store(found, whole + tail[T.int64(0)], [number])
        for vector, factor in enumerate(factors):
            where = span(vector * lanes, lanes)
            T.buffer_store(sums, sums[where] + found[where] * factor, [where])

    def panel(self, read: Callable[[Any], OutputReader], factors: Sequence[Any], block: Any) -> Any:
        """Decode a block of outputs to a panel."""
        panel, lanes = new_panel(self.place.inner), self.lanes
        of_rows = accumulator(lanes)
        for vector, factor in enumerate(factors):
            T.buffer_store(of_rows, factor, [span(vector * lanes, lanes)])
        with T.serial(T.int64(0), self.outputs(block)) as number:
            scale = T.Bind(of_rows[number])

            def store(parts: list[Any], column: Any, count: int, vector: int) -> None:
                value = T.Bind(added(parts) * splat(scale, lanes))
                if count < lanes:
                    for lane in range(count):
                        one = shuffled([value], [lane])
                        T.buffer_store(panel, one, [(column + lane) * BLOCK + number])
                    return
                place = T.ramp(column * BLOCK + number, T.int64(BLOCK), lanes)
                T.buffer_store(panel, value, [place])

            self.each_vector(read(T.Bind(block * BLOCK + number)), store)
        if self.place.outer % BLOCK:
            clear_outputs(panel, self.place.inner, self.outputs(block))
        return panel


def factor_layouts(factor: Expr | None, place: Place) -> dict[str, ArrayLayout] | None:
    """Lay the arrays of a factor out; None where codes are not at known places."""
    if factor is None:
        return {}
    read = {each.array for each in walk(factor) if isinstance(each, Load | Code)}
    return blocked_layouts(factor, {n: s for n, s in place.specs.items() if n in read}, BLOCK)
