"""Weights that a code of their own and shared factors make: 32 codes at a time, from bytes to
float32, with lanes along the outputs.

One row of x multiplies the values as they are widened; factors that a segment of columns shares
multiply the sum of a segment, those of the whole row the sum of all, and those of single columns go
into the inputs. Several rows share a block that is decoded once to a panel f32[inner, 16].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.code_lanes import CodeLanes, LaneReader
from qc.backends.tvm.linear.code_products import CodePart, CodeProducts, code_products
from qc.backends.tvm.linear.code_values import CodeValues, Planes, choose_values
from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.layout import BLOCK, STEP
from qc.backends.tvm.linear.panels import add_tile, new_panel, reader_of
from qc.backends.tvm.linear.plan import (
    BLOCK_INDEX,
    ArrayLayout,
    VectorPlan,
    blocked_layouts,
    packed,
)
from qc.backends.tvm.linear.rendering import StoredArray, VectorRendering
from qc.backends.tvm.linear.skeleton import Signature, accumulator
from qc.backends.tvm.linear.stored import laid_out
from qc.backends.tvm.linear.term import STORED_NAMES, Place, Products, TermKernel
from qc.backends.tvm.linear.vectors import float_lanes, span, splat, sum_of_lanes
from qc.ir.weights.affine import simplify
from qc.ir.weights.expression import (
    COL,
    LANE,
    ROW,
    Code,
    Const,
    Expr,
    Load,
    is_structural,
    substitute_indices,
    walk,
)
from qc.ir.weights.factored import STEP as NUMBER

CHAINS = 2  # sums of each vector of outputs: with two or four vectors, enough to hide latency

CODES, TABLES = "lanes", "planes"


@dataclass(frozen=True, eq=False)
class CodedKernel(TermKernel):
    """Widen codes in registers."""

    rule: ClassVar[str] = "coded"
    place: Place
    products: CodeProducts
    values: CodeValues
    along_rows: Mapping[str, ArrayLayout]
    """The arrays of group factors, in blocks of 16 rows where they have rows."""
    along_columns: Mapping[str, ArrayLayout]
    """The arrays of column factors, as they are stored."""

    @property
    def work(self) -> float:
        return 2.0 + 0.5 * len(self.products.parts)  # counted on AVX2, for 3 planes

    @property
    def lanes(self) -> int:
        return float_lanes(self.place.target)

    @cached_property
    def codes(self) -> CodeLanes:
        """The layout of the codes."""
        code = self.products.code
        return CodeLanes(
            code.array, code.width, self.place.outer, self.place.inner, self.values.order
        )

    # ---- arrays

    def declare(self, signature: Signature) -> None:
        codes, values = self.codes, self.values
        shape = (codes.blocks, codes.block_bytes)
        self.place.declare(signature, CODES, "uint8", shape, codes.repack)
        if isinstance(values, Planes):
            tables = (codes.blocks if values.by_block else 1, values.count, 16 * values.parts)
            repack = partial(values.tables, bits=codes.bits, blocks=codes.blocks)
            self.place.declare(signature, TABLES, "uint8", tables, repack)
        for prefix, layouts in (("rows.", self.along_rows), ("columns.", self.along_columns)):
            for name, layout in layouts.items():
                kind, repack = STORED_NAMES[layout.dtype], partial(laid_out, name, layout)
                self.place.declare(signature, prefix + name, kind, layout.shape, repack)

    def arrays(
        self, signature: Signature, prefix: str, layouts: Mapping[str, ArrayLayout]
    ) -> dict[str, StoredArray]:
        """Return declared arrays of factors."""
        return {
            name: StoredArray(
                self.place.buffer(signature, prefix + name), layout.dtype, layout.shape
            )
            for name, layout in layouts.items()
        }

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        inputs.need_values()

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        at_block = self.at_block(signature, block)
        panel = at_block.panel() if many else None

        def add(row: Any, height: int, sums: Any) -> None:
            if panel is None:
                RowOfBlock(at_block, inputs.values, row, sums[0]).emit()
            else:
                read = reader_of(panel, self.lanes)
                add_tile(inputs.values, self.place.inner, read, self.lanes, row, height, sums)

        return add

    def at_block(self, signature: Signature, block: Any) -> CodedBlock:
        """Return how one block of outputs is read."""
        place, values = self.place, self.values
        rows = self.arrays(signature, "rows.", self.along_rows)
        columns = self.arrays(signature, "columns.", self.along_columns)
        planes = []
        if isinstance(values, Planes):
            planes = values.load(place.buffer(signature, TABLES), block)
        indices = {BLOCK_INDEX: block}
        return CodedBlock(
            self,
            LaneReader(self.codes, place.buffer(signature, CODES), block, values.size),
            planes,
            VectorRendering(rows, indices, self.lanes, place.target),
            VectorRendering(columns, indices, self.lanes, place.target),
        )


@dataclass(frozen=True, eq=False)
class CodedBlock:
    """A block of 16 outputs: its codes and factors."""

    kernel: CodedKernel
    reader: LaneReader
    planes: list[Any]
    by_rows: VectorRendering
    by_columns: VectorRendering

    @property
    def lanes(self) -> int:
        return self.kernel.lanes

    @property
    def parts(self) -> Sequence[CodePart]:
        return self.kernel.products.parts

    def columns(self, step: Any) -> Iterator[list[Any]]:
        """Yield the widened values of 32 columns, each 16 outputs in vectors."""
        values, vectors = self.kernel.values, BLOCK // self.lanes
        for quad in self.reader.quads(step, values.up):
            floats: list[Any] = []
            for codes in quad:
                floats += values.widen(codes, self.planes)
                while len(floats) >= vectors:
                    yield floats[:vectors]
                    floats = floats[vectors:]

    def group(self, part: CodePart, rendering: VectorRendering, first: Expr) -> list[Any] | None:
        """Return the group factor of the segment that starts at a column; None is 1."""
        if part.group is None:
            return None
        plan = VectorPlan(
            part.group, self.kernel.place.shape, self.lanes, STEP, self.kernel.along_rows, True
        )
        found = [plan.columns(first, 1, vector)[0] for vector in range(BLOCK // self.lanes)]
        return [rendering.vector(each) for each in found]

    def column(self, column: Expr, rendering: VectorRendering, first: Expr, lanes: int) -> Any:
        """Return a column factor of `lanes` columns."""
        at = first + LANE if lanes > 1 else first
        moved = substitute_indices(column, {COL: at, ROW: BLOCK_INDEX * BLOCK})
        value = simplify(moved, {LANE: lanes})
        if lanes == self.lanes:
            return rendering.vector(value)
        single = VectorRendering(rendering.arrays, rendering.indices, 1, rendering.target)
        return single.value(value)

    def each_step(self) -> list[tuple[int, int]]:
        """Return (first step, columns of a step) of the full steps and of what follows them."""
        full, rest = divmod(self.kernel.place.inner, STEP)
        return [(0, STEP)] * bool(full) + [(full, rest)] * bool(rest)

    # ---- several rows

    def panel(self) -> Any:
        """Decode to a panel."""
        panel, full = new_panel(self.kernel.place.inner), self.kernel.place.inner // STEP
        for start, count in self.each_step():
            if count < STEP:
                self.decode_step(panel, Const(start), count)
                continue
            with T.serial(T.int64(0), T.int64(full)) as step:
                inner = CodedBlock(
                    self.kernel, self.reader, self.planes,
                    self.by_rows.within({NUMBER: step}), self.by_columns.within({NUMBER: step}),
                )  # fmt: skip
                inner.decode_step(panel, NUMBER, count)
        return panel

    def decode_step(self, panel: Any, step: Expr, count: int) -> None:
        """Store the columns of a step."""
        number = self.by_rows.scalar_index(step)
        columns, segment = self.columns(number), self.kernel.products.segment
        for start in range(0, count, segment):
            rows = self.by_rows.within({})
            groups = [self.group(part, rows, step * STEP + start) for part in self.parts]
            for k in range(start, min(start + segment, count)):
                for vector, each in enumerate(next(columns)):
                    value = self.element(each, groups, vector, step * STEP + k)
                    at = span((number * STEP + k) * BLOCK + vector * self.lanes, self.lanes)
                    T.buffer_store(panel, value, [at])

    def element(self, value: Any, groups: list[list[Any] | None], vector: int, at: Expr) -> Any:
        """Return the weights of one vector of outputs."""
        total: Any = None
        for part, group in zip(self.parts, groups, strict=True):
            factors = [] if part.value is None else [value]
            if part.value is not None and self.kernel.values.factor != 1.0:
                factors.append(splat(T.float32(self.kernel.values.factor), self.lanes))
            if group is not None:
                factors.append(group[vector])
            if part.column is not None:
                single = self.column(part.column, self.by_columns, at, 1)
                factors.append(splat(single, self.lanes))
            whole = splat(T.float32(1), self.lanes) if not factors else factors[0]
            for factor in factors[1:]:
                whole = whole * factor
            total = whole if total is None else total + whole
        return total


@dataclass(frozen=True, eq=False)
class RowOfBlock:
    """The products of one row of x with a block, added to float32[16] sums."""

    block: CodedBlock
    x: Any
    row: Any
    sums: Any

    @property
    def lanes(self) -> int:
        return self.block.lanes

    @property
    def parts(self) -> Sequence[CodePart]:
        return self.block.parts

    def emit(self) -> None:
        """Emit all steps; what all columns share multiplies the sums at the end."""
        wholes = [
            [accumulator(self.lanes) for _ in range(CHAINS)] if part.is_whole else None
            for part in self.parts
        ]
        full = self.block.kernel.place.inner // STEP
        for start, count in self.block.each_step():
            if count < STEP:
                rows, columns = self.block.by_rows, self.block.by_columns
                self.emit_step(Const(start), rows, columns, count, wholes)
                continue
            with T.serial(T.int64(0), T.int64(full)) as step:
                self.block.reader.prefetch(step)
                at = {NUMBER: step}
                rows, columns = self.block.by_rows.within(at), self.block.by_columns.within(at)
                self.emit_step(NUMBER, rows, columns, count, wholes)
        for part, chains in zip(self.parts, wholes, strict=True):
            if chains is not None:
                self.finish(part, chains)

    def finish(self, part: CodePart, chains: list[Any]) -> None:
        """Add the sums of all columns, times what they share."""
        vectors = BLOCK // self.lanes
        ats = [span(vector * self.lanes, self.lanes) for vector in range(vectors)]
        products = [sum((chain[at] for chain in chains[1:]), chains[0][at]) for at in ats]
        if part.value is None:
            whole = T.Bind(sum_of_lanes(sum(products[1:], products[0])))
            products = [splat(whole, self.lanes)] * vectors
        group = self.block.group(part, self.block.by_rows, Const(0))
        for vector, (at, value) in enumerate(zip(ats, products, strict=True)):
            scaled = self.scaled(part, value, None if group is None else group[vector])
            T.buffer_store(self.sums, self.sums[at] + scaled, [at])

    def scaled(self, part: CodePart, value: Any, group: Any) -> Any:
        """Multiply a sum by what its columns share."""
        factor = self.block.kernel.values.factor
        if part.value is not None and factor != 1.0:
            value = value * splat(T.float32(factor), self.lanes)
        return value if group is None else value * group

    def emit_step(
        self,
        step: Expr,
        rows: VectorRendering,
        columns: VectorRendering,
        count: int,
        wholes: list[list[Any] | None],
    ) -> None:
        """Add the products of `count` columns."""
        number = rows.scalar_index(step)
        first = T.Bind(number * STEP)
        scaled = {
            part.column: self.scaled_inputs(part.column, columns, step, first, count)
            for part in self.parts
            if part.column is not None
        }
        values = self.block.columns(number)
        segment = self.block.kernel.products.segment
        for start in range(0, count, segment):
            size = min(segment, count - start)
            inner, multiplied = rows.within({}), []
            for part, chains in zip(self.parts, wholes, strict=True):
                x, at = (self.x, first) if part.column is None else (scaled[part.column], None)
                inputs = InputsOfStep(x, self.row, at)
                if part.value is None:
                    self.add_inputs(part, inner, inputs, step, start, size, chains)
                else:
                    multiplied.append(Multiplied(part, inputs, chains, self.lanes))
            for k in range(start, start + size):
                column = next(values)
                for each in multiplied:
                    each.add(k, column)
            for each in multiplied:
                if each.wholes is None:
                    self.add_segment(each, inner, step * STEP + start)
                else:
                    each.store()

    def add_segment(self, each: Multiplied, rows: VectorRendering, first: Expr) -> None:
        """Add the products of a segment, times what its columns share."""
        group = self.block.group(each.part, rows, first)
        for vector, total in enumerate(each.totals()):
            at = span(vector * self.lanes, self.lanes)
            scaled = self.scaled(each.part, total, None if group is None else group[vector])
            T.buffer_store(self.sums, self.sums[at] + scaled, [at])

    def scaled_inputs(
        self, column: Expr, rendering: VectorRendering, step: Expr, first: Any, count: int
    ) -> Any:
        """Return the inputs of a step times their column factors, float32[32] in scratch memory."""
        scaled = T.alloc_buffer((STEP,), "float32", layout=None)
        whole = count - count % self.lanes
        for start in range(0, whole, self.lanes):
            inner = rendering.within({})
            factor = self.block.column(column, inner, step * STEP + start, self.lanes)
            value = self.x[self.row, span(first + start, self.lanes)] * factor
            T.buffer_store(scaled, value, [span(start, self.lanes)])
        for k in range(whole, count):
            factor = self.block.column(column, rendering.within({}), step * STEP + k, 1)
            T.buffer_store(scaled, self.x[self.row, first + k] * factor, [T.int64(k)])
        return scaled

    def add_inputs(
        self, part: CodePart, rows: VectorRendering, inputs: InputsOfStep,
        step: Expr, start: int, size: int, wholes: list[Any] | None,
    ) -> None:  # fmt: skip
        """Add the inputs of one segment, where weights have a part without a code."""
        vectors = size // self.lanes
        parts = [inputs.several(start + n * self.lanes, self.lanes) for n in range(vectors)]
        rest = [inputs.one(k) for k in range(start + vectors * self.lanes, start + size)]
        if wholes is not None:
            for number, value in enumerate(parts):
                at = span(number * self.lanes % BLOCK, self.lanes)
                T.buffer_store(wholes[0], wholes[0][at] + value, [at])
            for value in rest:
                T.buffer_store(wholes[1], wholes[1][T.int64(0)] + value, [T.int64(0)])
            return
        singles = [sum_of_lanes(sum(parts[1:], parts[0]))] if parts else []
        whole = T.Bind(sum([*singles, *rest][1:], [*singles, *rest][0]))
        group = self.block.group(part, rows, step * STEP + start)
        for vector in range(BLOCK // self.lanes):
            at = span(vector * self.lanes, self.lanes)
            value = splat(whole, self.lanes)
            scaled = self.scaled(part, value, None if group is None else group[vector])
            T.buffer_store(self.sums, self.sums[at] + scaled, [at])


@dataclass
class Multiplied:
    """Sums of products of widened columns with inputs, for one part of a weight.

    `wholes` hold the sums of all segments; without them, sums start in each segment.
    """

    part: CodePart
    inputs: InputsOfStep
    wholes: list[Any] | None
    lanes: int
    chains: list[list[Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.chains = [
            [None if self.wholes is None else self.wholes[chain][at] for chain in range(CHAINS)]
            for at in self.spans()
        ]

    def spans(self) -> list[Any]:
        """Return where the vectors of outputs lie."""
        return [span(first, self.lanes) for first in range(0, BLOCK, self.lanes)]

    def add(self, k: int, column: list[Any]) -> None:
        """Add the products of one column."""
        x = T.Bind(splat(self.inputs.one(k), self.lanes))
        for chains, value in zip(self.chains, column, strict=True):
            known, product = chains[k % CHAINS], value * x
            chains[k % CHAINS] = T.Bind(product if known is None else known + product)

    def totals(self) -> list[Any]:
        """Return the sums of each vector of outputs."""
        known = [[chain for chain in chains if chain is not None] for chains in self.chains]
        return [sum(chains[1:], chains[0]) for chains in known]

    def store(self) -> None:
        """Keep the sums for the next segment."""
        assert self.wholes is not None
        for chains, at in zip(self.chains, self.spans(), strict=True):
            for whole, value in zip(self.wholes, chains, strict=True):
                T.buffer_store(whole, value, [at])


@dataclass(frozen=True)
class InputsOfStep:
    """The inputs of a step: x from column `first` on, or 32 of their own where that is None."""

    values: Any
    row: Any
    first: Any

    def one(self, k: int) -> Any:
        """Return one input."""
        if self.first is None:
            return self.values[T.int64(k)]
        return self.values[self.row, self.first + k]

    def several(self, k: int, lanes: int) -> Any:
        """Return consecutive inputs."""
        if self.first is None:
            return self.values[span(k, lanes)]
        return self.values[self.row, span(self.first + k, lanes)]


def coded_term(place: Place) -> TermKernel | None:
    """Widen codes of up to 8 bits that have a value of their own, at least a step of them."""
    decode = place.format.decode(place.shape, ROW, COL)
    if is_structural(decode) or place.inner < STEP:
        return None
    products = code_products(decode, place.shape)
    if products is None:
        return None
    values = choose_values(products.value, products.code, place.specs, place.target)
    groups = [part.group for part in products.parts if part.group is not None]
    columns = [part.column for part in products.parts if part.column is not None]
    along_rows = row_layouts(groups, place)
    if values is None or along_rows is None:
        return None
    return CodedKernel(place, products, values, along_rows, column_layouts(columns, place))


def row_layouts(factors: Sequence[Expr], place: Place) -> dict[str, ArrayLayout] | None:
    """Lay the arrays of group factors out; None where codes are not at known places."""
    if not factors:
        return {}
    together = factors[0]
    for each in factors[1:]:
        together = together + each
    specs = {name: spec for name, spec in place.specs.items() if name in names(together)}
    return blocked_layouts(together, specs, STEP)


def column_layouts(factors: Sequence[Expr], place: Place) -> dict[str, ArrayLayout]:
    """Lay the arrays of column factors out as they are stored; packed codes are read in words."""
    codes = {name for factor in factors for name in packed(factor)}
    return {
        name: ArrayLayout(place.specs[name], unit=8 if name in codes else None)
        for name in sorted({name for factor in factors for name in names(factor)})
    }


def names(expr: Expr) -> set[str]:
    """Return the arrays that an expression reads."""
    return {each.array for each in walk(expr) if isinstance(each, Load | Code)}
