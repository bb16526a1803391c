"""The generic term: any decode expression as vector code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.layout import BLOCK
from qc.backends.tvm.linear.panels import add_tile, clear_outputs, new_panel, reader_of
from qc.backends.tvm.linear.plan import BLOCK_INDEX, VectorPlan, plan_vectors
from qc.backends.tvm.linear.rendering import StoredArray, VectorRendering
from qc.backends.tvm.linear.skeleton import Signature, accumulator
from qc.backends.tvm.linear.term import STORED_NAMES, Place, Products, TermKernel, held
from qc.backends.tvm.linear.vectors import float_lanes, span, splat, sum_of_lanes
from qc.ir.weights.expression import COL, ROW, Const, Expr, is_structural
from qc.ir.weights.factored import STEP, FormPart, factored

CHAINS = 4  # independent sums of a step: hides the latency of multiply-add


@dataclass(frozen=True, eq=False)
class DecodedKernel(TermKernel):
    """Decode in registers, as the plan says."""

    rule: ClassVar[str] = "decoded"
    place: Place
    plan: VectorPlan

    @property
    def lanes(self) -> int:
        return self.plan.lanes

    @property
    def work(self) -> float:
        return self.plan.work

    def declare(self, signature: Signature) -> None:
        for name, layout in self.plan.layouts.items():
            kind = STORED_NAMES[layout.dtype]
            self.place.declare(signature, name, kind, layout.shape, partial(self.repack, name))

    def repack(self, name: str, arrays: Mapping[str, Tensor]) -> Tensor:
        """Lay one stored array out."""
        return held(self.plan.layouts[name].repack(arrays[name]).contiguous())

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        inputs.need_values()

    def rendering(self, signature: Signature, block: Any) -> VectorRendering:
        """Return a rendering in one block of outputs."""
        arrays = {
            name: StoredArray(self.place.buffer(signature, name), layout.dtype, layout.shape)
            for name, layout in self.plan.layouts.items()
        }
        return VectorRendering(arrays, {BLOCK_INDEX: block}, self.lanes, self.place.target)

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        rendering = self.rendering(signature, block)
        panel = self.decode(rendering, block) if many else None

        def add(row: Any, height: int, sums: Any) -> None:
            if panel is not None:
                read = reader_of(panel, self.lanes)
                add_tile(inputs.values, self.place.inner, read, self.lanes, row, height, sums)
            elif self.plan.along_outputs:
                self.add_row(rendering, inputs.values, row, sums[0])
            else:
                self.add_row_along_inputs(rendering, inputs.values, block, row, sums[0])

        return add

    # ---- lanes along the outputs

    def add_row(self, rendering: VectorRendering, x: Any, row: Any, sums: Any) -> None:
        """Multiply one row of x by a block of outputs."""
        width = self.plan.width
        if self.plan.steps:
            with T.serial(T.int64(0), T.int64(self.plan.steps)) as step:
                self.add_columns(rendering.within({STEP: step}), x, row, STEP * width, width, sums)
        if self.plan.rest:
            first = Const(self.plan.steps * width)
            self.add_columns(rendering, x, row, first, self.plan.rest, sums)

    def add_columns(
        self, rendering: VectorRendering, x: Any, row: Any, first: Expr, count: int, sums: Any
    ) -> None:
        """Add the products of `count` columns to a block of sums."""
        start = rendering.scalar_index(first)
        inputs = [T.Bind(x[row, start + column]) for column in range(count)]
        total: list[Any] = []

        def sum_of_inputs() -> Any:
            if not total:
                total.append(T.Bind(sum(inputs[1:], inputs[0])))
            return total[0]

        for part in range(BLOCK // self.lanes):
            inner = rendering.within({})
            at = span(part * self.lanes, self.lanes)
            for form in factored(self.plan.columns(first, count, part)):
                if form.values is None:
                    product = splat(sum_of_inputs(), self.lanes)
                else:
                    product = self.dot(inner, form.values, inputs)
                T.buffer_store(sums, sums[at] + self.scaled(inner, form, product), [at])

    def dot(self, rendering: VectorRendering, values: tuple[Expr, ...], inputs: list[Any]) -> Any:
        """Return the sum of values * inputs, in independent chains."""
        chains: list[Any] = [None] * CHAINS
        for number, (value, x) in enumerate(zip(values, inputs, strict=True)):
            product = rendering.vector(value) * splat(x, self.lanes)
            known = chains[number % CHAINS]
            chains[number % CHAINS] = T.Bind(product if known is None else known + product)
        known = [chain for chain in chains if chain is not None]
        return T.Bind(sum(known[1:], known[0]))

    def scaled(self, rendering: VectorRendering, form: FormPart, product: Any) -> Any:
        """Multiply by the factor of a part."""
        return product if form.factor is None else rendering.vector(form.factor) * product

    # ---- lanes along the inputs

    def add_row_along_inputs(
        self, rendering: VectorRendering, x: Any, block: Any, row: Any, sums: Any
    ) -> None:
        """Multiply one row of x by the rows of a block, one after the other."""
        found = accumulator(self.lanes)
        with T.serial(T.int64(0), self.rows_of(block)) as number:
            inner = rendering.within({ROW: T.Bind(block * BLOCK + number)})
            whole = accumulator(self.lanes, size=self.lanes)
            width = self.plan.width
            if self.plan.steps:
                with T.serial(T.int64(0), T.int64(self.plan.steps)) as step:
                    self.add_vectors(inner.within({STEP: step}), x, row, STEP * width, width, whole)
            rest = self.plan.rest // self.lanes * self.lanes
            if rest:
                first = Const(self.plan.steps * width)
                self.add_vectors(inner, x, row, first, rest, whole)
            value = T.Bind(sum_of_lanes(whole[span(0, self.lanes)]))
            T.buffer_store(found, value + self.tail(inner, x, row), [number])
        for first_lane in range(0, BLOCK, self.lanes):
            at = span(first_lane, self.lanes)
            T.buffer_store(sums, sums[at] + found[at], [at])

    def rows_of(self, block: Any) -> Any:
        """Return how many outputs a block has."""
        if self.place.outer % BLOCK == 0:
            return T.int64(BLOCK)
        return T.min(T.int64(BLOCK), T.int64(self.place.outer) - block * BLOCK)

    def add_vectors(
        self, rendering: VectorRendering, x: Any, row: Any, first: Expr, count: int, sums: Any
    ) -> None:
        """Add the products of `count` columns to one sum in each lane."""
        start, lanes = rendering.scalar_index(first), self.lanes
        inputs = [T.Bind(x[row, span(start + at, lanes)]) for at in range(0, count, lanes)]
        at = span(0, lanes)
        for form in factored(self.plan.columns(first, count, 0)):
            if form.values is None:
                product = sum(inputs[1:], inputs[0])
            else:
                pairs = zip(form.values, inputs, strict=True)
                products = [rendering.vector(value) * each for value, each in pairs]
                product = sum(products[1:], products[0])
            T.buffer_store(sums, sums[at] + self.scaled(rendering, form, product), [at])

    def tail(self, rendering: VectorRendering, x: Any, row: Any) -> Any:
        """Return the products of the columns that fill no vector."""
        total: Any = T.float32(0)
        single = one_lane(rendering)
        for column in range(self.place.inner - self.place.inner % self.lanes, self.place.inner):
            value = single.within({COL: T.int64(column)}).value(self.plan.decode)
            total = T.Bind(total + value * x[row, T.int64(column)])
        return total

    # ---- panels

    def decode(self, rendering: VectorRendering, block: Any) -> Any:
        """Decode a block of outputs to a panel."""
        panel, width = new_panel(self.place.inner), self.plan.width

        def columns(inner: VectorRendering, first: Expr, count: int) -> None:
            if self.plan.along_outputs:
                self.store_columns(inner, panel, first, count)
            else:
                self.store_vectors(inner, panel, block, first, count)

        def all_columns(inner: VectorRendering) -> None:
            if self.plan.steps:
                with T.serial(T.int64(0), T.int64(self.plan.steps)) as step:
                    columns(inner.within({STEP: step}), STEP * width, width)
            if self.plan.rest:
                columns(inner, Const(self.plan.steps * width), self.plan.rest)

        if self.plan.along_outputs:
            all_columns(rendering)
            return panel
        with T.serial(T.int64(0), self.rows_of(block)) as number:
            all_columns(rendering.within({ROW: T.Bind(block * BLOCK + number)}))
        if self.place.outer % BLOCK:
            clear_outputs(panel, self.place.inner, self.rows_of(block))
        return panel

    def store_columns(
        self, rendering: VectorRendering, panel: Any, first: Expr, count: int
    ) -> None:
        """Store decoded columns of 16 outputs."""
        start = T.Bind(rendering.scalar_index(first) * BLOCK)
        for part in range(BLOCK // self.lanes):
            inner = rendering.within({})
            for column, value in enumerate(self.plan.columns(first, count, part)):
                at = span(start + (column * BLOCK + part * self.lanes), self.lanes)
                T.buffer_store(panel, inner.vector(value), [at])

    def store_vectors(
        self, rendering: VectorRendering, panel: Any, block: Any, first: Expr, count: int
    ) -> None:
        """Store decoded inputs of one output."""
        start, lanes = rendering.scalar_index(first), self.lanes
        output = T.Bind(rendering.indices[ROW] - block * BLOCK)
        whole = count // lanes * lanes
        for number, value in enumerate(self.plan.columns(first, whole, 0)):
            at = (start + number * lanes) * BLOCK + output
            T.buffer_store(panel, rendering.vector(value), [T.ramp(at, T.int64(BLOCK), lanes)])
        single = one_lane(rendering)
        for column in range(self.place.inner - count + whole, self.place.inner):
            value = single.within({COL: T.int64(column)}).value(self.plan.decode)
            T.buffer_store(panel, value, [T.int64(column * BLOCK) + output])


def one_lane(rendering: VectorRendering) -> VectorRendering:
    """Return a rendering of single elements."""
    return VectorRendering(rendering.arrays, rendering.indices, 1, rendering.target)


def decoded_term(place: Place) -> TermKernel | None:
    """Decode element by element, vectorised; sums inside an element are not taken."""
    decode = place.format.decode(place.shape, ROW, COL)
    if is_structural(decode) or place.inner == 0:
        return None
    plan = plan_vectors(decode, place.shape, place.specs, float_lanes(place.target))
    return None if plan is None else DecodedKernel(place, plan)
