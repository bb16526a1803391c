"""Any body of element-by-element and index operations, as one loop over the result.

Each element of the result is traced back to the elements that it is made of. Along the last axis
a position is a run of consecutive positions, one a lane, wherever the index operations keep such
runs together; where they do not, the loop goes element by element.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import gcd
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from qc.backends.region import Region
from qc.backends.tvm.append import is_cache
from qc.backends.tvm.function import Function, build, for_each, integer, known_product, span, store
from qc.backends.tvm.kernel import Kernel, KernelRule
from qc.backends.tvm.linear.rendering import StoredArray, VectorRendering
from qc.backends.tvm.linear.stored import laid_out_of, plain_layouts
from qc.backends.tvm.linear.term import STORED_NAMES
from qc.backends.tvm.reductions import reduction
from qc.backends.tvm.vector_math import (
    ELEMENTWISE,
    TVM_NAMES,
    bind,
    branch_depth,
    convert,
    inside_branch,
    render,
    spread,
)
from qc.ir import ops
from qc.ir.axes import matching_axes
from qc.ir.node import Node
from qc.ir.types import Dim, as_dim, element_count
from qc.ir.weights.expression import COL, ROW, Expr
from qc.ir.weights.weight import ArraySpec

PrimExpr = Any

INDEXING = (
    ops.Reshape, ops.Permute, ops.Expand, ops.Slice, ops.Concat, ops.Arange, ops.Full,
    ops.Scalar, ops.Size, ops.Embedding,
)  # fmt: skip

# Work that one thread takes at a time where the leading axes give no loop to split.
FLAT_BLOCK = 4096


class NotVectorised(Exception):
    """A run of positions is torn apart: the loop must go element by element."""


@dataclass(frozen=True)
class Run:
    """Positions base, base + 1, ... one a lane; base is a multiple of `multiple`."""

    base: PrimExpr
    lanes: int
    multiple: int

    def shifted(self, offset: PrimExpr, multiple: int) -> Run:
        """Move by an offset that is a multiple of `multiple`."""
        return Run(self.base + offset, self.lanes, gcd(self.multiple, multiple))


Coordinate = Any
"""An int64 expression, the same for all lanes, or a Run."""


def divisor_of(dim: Dim) -> int:
    """Return a number that divides `dim` for all sizes of its symbols."""
    if isinstance(dim, int):
        return dim
    return gcd(*(int(c) for c in dim.as_coefficients_dict().values()))


@dataclass
class Elements:
    """Trace elements of a body back to its inputs.

    `tables` are the inputs that are decoded; `bound` what the loop being written has computed.
    """

    function: Function
    lanes: int
    tables: dict[Node, tuple[Expr, dict[str, StoredArray]]] = field(default_factory=dict)
    bound: dict[tuple[object, ...], PrimExpr] = field(default_factory=dict)

    def value(self, node: Node, index: tuple[Coordinate, ...]) -> PrimExpr:
        """Return the value of `node` at `index` in the node's dtype, a vector or a scalar.

        What several nodes read is computed once, by a binding in the loop that is being written.
        """
        if len(self.function.region.body.users[node]) < 2 or branch_depth.get():
            return self.computed(node, index)
        key = (node, *map(str, index))
        if key not in self.bound:
            self.bound[key] = bind(self.computed(node, index))
        return self.bound[key]

    def computed(self, node: Node, index: tuple[Coordinate, ...]) -> PrimExpr:
        """Write the computation of one element or of a run of them."""
        if not isinstance(node.op, ELEMENTWISE):
            return self.indexed(node, index)
        operands = [self.value(i, self.within(i, index)) for i in node.inputs]
        lanes = lanes_in(self.within(node, index))
        return convert(render(node.op, operands, lanes), TVM_NAMES[node.tensor.dtype])

    def within(self, operand: Node, index: tuple[Coordinate, ...]) -> tuple[Coordinate, ...]:
        """Return the index in an operand that is broadcast."""
        return broadcast(index, operand.tensor.shape)

    def indexed(self, node: Node, index: tuple[Coordinate, ...]) -> PrimExpr:
        """Return the value of a leaf or of an index operation."""
        name = TVM_NAMES[node.tensor.dtype]
        match node.op:
            case ops.Input():
                return self.load(node, index)
            case ops.Scalar(value) | ops.Full(_, value):
                return tirx.const(value, name)
            case ops.Size(dim):
                return self.function.dim(dim)
            case ops.Arange(_, start):
                return self.position(index[0]) + spread(
                    self.function.dim(start), lanes_in(index[:1])
                )
            case ops.Reshape():
                return self.value(node.inputs[0], self.reshaped(node, index))
            case ops.Permute(order):
                source = tuple(index[order.index(axis)] for axis in range(len(order)))
                return self.value(node.inputs[0], source)
            case ops.Expand():
                source = broadcast(index, node.inputs[0].tensor.shape)
                return self.value(node.inputs[0], source)
            case ops.Slice(axis, start, _, step):
                moved = self.sliced(index[axis], start, step)
                return self.value(node.inputs[0], (*index[:axis], moved, *index[axis + 1 :]))
            case ops.Concat(axis):
                return self.joined(node, axis, index)
            case ops.Embedding():
                return self.looked_up(node, index)
        raise TypeError(f"{node.op} is no index operation")

    def position(self, coordinate: Coordinate) -> PrimExpr:
        """Return a coordinate as an int64 value."""
        if isinstance(coordinate, Run):
            return span(coordinate.base, coordinate.lanes)
        return coordinate

    def load(self, node: Node, index: tuple[Coordinate, ...]) -> PrimExpr:
        """Read an input; its axes are laid out row-major."""
        offset, stride, lanes = self.offset(node.tensor.shape, index)
        buffer = self.function.buffers[node]
        loaded = buffer[span(offset, lanes, stride)]
        return convert(loaded, TVM_NAMES[node.tensor.dtype])

    def offset(
        self, shape: tuple[Dim, ...], index: tuple[Coordinate, ...]
    ) -> tuple[PrimExpr, int, int]:
        """Return the flat offset of `index`, and the stride and number of its lanes."""
        offset, stride, lanes = integer(0), 1, 1
        for axis, coordinate in enumerate(index):
            step = element_count(shape[axis + 1 :])
            if isinstance(coordinate, Run):
                if not isinstance(step, int):
                    raise NotVectorised
                stride, lanes = step, coordinate.lanes
            base = coordinate.base if isinstance(coordinate, Run) else coordinate
            offset = offset + base * self.function.dim(step)
        return offset, stride, lanes

    def sliced(self, coordinate: Coordinate, start: Dim, step: int) -> Coordinate:
        """Return the position in the whole axis of a position in a slice of it."""
        if isinstance(coordinate, Run):
            if step != 1:
                raise NotVectorised
            return coordinate.shifted(self.function.dim(start), divisor_of(start))
        return coordinate * integer(step) + self.function.dim(start)

    def reshaped(self, node: Node, index: tuple[Coordinate, ...]) -> tuple[Coordinate, ...]:
        """Return the index in the operand of a reshape: groups of axes with equal products are
        flattened and split again, each by itself."""
        result: list[Coordinate] = []
        old, new = node.inputs[0].tensor.shape, node.tensor.shape
        for inner, outer in matching_axes(old, new):
            dims = [new[a] for a in outer]
            result += self.split(self.flatten([index[a] for a in outer], dims),
                                 [old[a] for a in inner])  # fmt: skip
        return tuple(result)

    def flatten(self, index: list[Coordinate], dims: list[Dim]) -> Coordinate:
        """Combine positions along several axes into one."""
        total: Coordinate = integer(0)
        for axis, coordinate in enumerate(index):
            rest = tuple(dims[axis + 1 :])
            step = element_count(rest)
            if isinstance(coordinate, Run):
                if step != 1:
                    raise NotVectorised
                total = coordinate.shifted(total, divisor_of(dims[axis]) if axis else 0)
            elif isinstance(total, Run):
                raise NotVectorised
            else:
                total = total + coordinate * self.function.dim(step)
        return total

    def split(self, position: Coordinate, dims: list[Dim]) -> list[Coordinate]:
        """Split one position into positions along several axes."""
        if len(dims) <= 1:
            return [position] * len(dims)
        result: list[Coordinate] = []
        for dim in reversed(dims[1:]):
            size = self.function.dim(dim)
            if isinstance(position, Run):
                divisor = gcd(position.multiple, divisor_of(dim))
                if divisor % position.lanes:
                    raise NotVectorised
                result.append(Run(tirx.truncmod(position.base, size), position.lanes, divisor))
                position = tirx.truncdiv(position.base, size)
                continue
            result.append(tirx.truncmod(position, size))
            position = tirx.truncdiv(position, size)
        return [position, *reversed(result)]

    def joined(self, node: Node, axis: int, index: tuple[Coordinate, ...]) -> PrimExpr:
        """Choose the operand of a concatenation by position; only the chosen one is read."""
        at, start = index[axis], as_dim(0)
        parts: list[tuple[Dim, PrimExpr]] = []
        with inside_branch():
            for part in node.inputs:
                inner = at - self.function.dim(start) if not isinstance(at, Run) else at.shifted(
                    -self.function.dim(start), divisor_of(start))  # fmt: skip
                if isinstance(inner, Run) and inner.multiple % inner.lanes:
                    raise NotVectorised
                value = self.value(part, (*index[:axis], inner, *index[axis + 1 :]))
                start = as_dim(start + part.tensor.shape[axis])
                parts.append((start, spread(value, lanes_in(index))))
        base = at.base if isinstance(at, Run) else at
        result = parts[-1][1]
        for end, value in reversed(parts[:-1]):
            result = tirx.if_then_else(base < self.function.dim(end), value, result)
        return result

    def looked_up(self, node: Node, index: tuple[Coordinate, ...]) -> PrimExpr:
        """Read a row of a table. Ids outside the table are limited to it: memory stays safe."""
        ids, table = node.inputs
        if any(isinstance(c, Run) for c in index[:-1]):
            raise NotVectorised
        rows = self.function.dim(table.tensor.shape[0])
        row = convert(self.value(ids, index[:-1]), "int64")
        row = tirx.max(tirx.min(row, rows - integer(1)), integer(0))
        if table not in self.tables:
            return self.value(table, (row, index[-1]))
        if isinstance(index[-1], Run):
            raise NotVectorised
        decode, arrays = self.tables[table]
        indices = {ROW: row, COL: index[-1]}
        decoded = VectorRendering(arrays, indices, 1, self.function.region.target).value(decode)
        return convert(decoded, TVM_NAMES[node.tensor.dtype])


def lanes_in(index: tuple[Coordinate, ...]) -> int:
    """Return the lanes of the run in an index, 1 without one."""
    return next((c.lanes for c in index if isinstance(c, Run)), 1)


def broadcast(index: tuple[Coordinate, ...], shape: tuple[Dim, ...]) -> tuple[Coordinate, ...]:
    """Return the index in an operand of `shape` that is broadcast."""
    if not shape:
        return ()
    return tuple(
        integer(0) if dim == 1 else coordinate
        for dim, coordinate in zip(shape, index[-len(shape) :], strict=True)
    )


def elementwise(region: Region) -> Kernel | None:
    """A body of element-by-element and index operations."""
    inner = [n for n in region.body.nodes if not isinstance(n.op, ops.Input)]
    if not inner or not all(isinstance(n.op, (*ELEMENTWISE, *INDEXING)) for n in inner):
        return None
    if any(is_cache(operand) for operand in region.operands):
        return None
    for lanes in (region.target.vector_bytes // 4, 1):
        try:
            return build("elementwise", region, partial(emit, lanes=lanes))
        except NotVectorised:
            continue
    return None


def quantized_tables(region: Region) -> dict[Node, dict[str, ArraySpec]]:
    """Return the stored arrays of the embedding tables that must be decoded."""
    found = {}
    for node in region.body.nodes:
        if isinstance(node.op, ops.Embedding):
            table = node.inputs[1]
            format = region.format_of(table) if isinstance(table.op, ops.Input) else None
            shape = tuple(int(d) for d in table.tensor.shape) if format is not None else ()
            if format is not None and list(format.arrays(shape)) != ["0.values"]:
                found[table] = format.arrays(shape)
    return found


def declare_operands(function: Function) -> Elements:
    """Declare all inputs of the body, tables by their stored arrays."""
    elements = Elements(function, function.lanes)
    stored = quantized_tables(function.region)
    for position, node in enumerate(function.region.body.inputs):
        if node not in stored:
            function.declare_input(node)
            continue
        format = function.region.format_of(node)
        assert format is not None
        decode = format.decode(tuple(int(d) for d in node.tensor.shape), ROW, COL)
        arrays = {}
        for name, layout in plain_layouts(stored[node], decode).items():
            function.repack[position, name] = partial(laid_out_of, name, layout)
            kind = STORED_NAMES[layout.dtype]
            buffer = function.declare(position, name, kind, layout.shape)
            arrays[name] = StoredArray(buffer, layout.dtype, layout.shape)
        elements.tables[node] = (decode, arrays)
    return elements


def emit(function: Function, lanes: int) -> None:
    """Write the loop over the result."""
    elements = declare_operands(function)
    elements.lanes = lanes
    result = function.declare_result()
    shape = function.region.root.tensor.shape
    if is_flat(function.region):
        shape = (element_count(shape),)
        emit_flat(elements, result, shape[0], lanes)
        return
    last: Dim = shape[-1] if shape else 1
    leading = shape[:-1]
    extent = function.dim(element_count(leading))
    work = 8 * (last if isinstance(last, int) else 64)

    def row(outer: PrimExpr) -> None:
        index = elements.split(outer, list(leading))
        emit_row(elements, result, (*index,), outer * function.dim(last), last if shape else None,
                 lanes)  # fmt: skip

    known = known_product(leading)
    for_each(known if known is not None else extent, work, row)


def is_flat(region: Region) -> bool:
    """Say whether every value has the shape of the root or is a number: then axes do not matter."""
    shape = region.root.tensor.shape
    return all(
        n.tensor.shape == shape or n.tensor.shape == () for n in region.body.nodes
    ) and all(
        isinstance(n.op, (ops.Input, ops.Scalar, ops.Full, ops.Size, *ELEMENTWISE))
        for n in region.body.nodes
    )  # fmt: skip


def emit_flat(elements: Elements, result: Any, size: Dim, lanes: int) -> None:
    """Write one loop over all elements, a block a thread at a time."""
    function, root = elements.function, elements.function.region.root
    total = function.dim(size)
    flat = FlatElements(function, lanes)
    blocks = (total + integer(FLAT_BLOCK - 1)) // integer(FLAT_BLOCK)

    def block(i: PrimExpr) -> None:
        start = bind(i * integer(FLAT_BLOCK))
        length = bind(tirx.min(integer(FLAT_BLOCK), total - start))
        vectors = bind(length // integer(lanes))
        with T.serial(integer(0), vectors) as j:
            flat.bound.clear()
            at = Run(start + j * integer(lanes), lanes, lanes)
            store(result, span(at.base, lanes), spread(flat.value(root, (at,)), lanes))
        if lanes > 1:
            with T.serial(vectors * integer(lanes), length) as j:
                flat.bound.clear()
                store(result, start + j, flat.value(root, (start + j,)))

    count = -(-size // FLAT_BLOCK) if isinstance(size, int) else blocks
    for_each(count, 8 * FLAT_BLOCK, block)


class FlatElements(Elements):
    """Elements of values that all have one shape, by their flat position."""

    def within(self, operand: Node, index: tuple[Coordinate, ...]) -> tuple[Coordinate, ...]:
        """The position is the same in all values, and there is none in a number."""
        return index if operand.tensor.shape else ()

    def load(self, node: Node, index: tuple[Coordinate, ...]) -> PrimExpr:
        """Read an input at the flat position."""
        buffer = self.function.buffers[node]
        if node.tensor.shape == ():
            return convert(buffer[integer(0)], TVM_NAMES[node.tensor.dtype])
        loaded = buffer[self.position(index[0])]
        return convert(loaded, TVM_NAMES[node.tensor.dtype])


def emit_row(
    elements: Elements,
    result: Any,
    index: tuple[Coordinate, ...],
    base: PrimExpr,
    size: Dim | None,
    lanes: int,
) -> None:
    """Write the last axis of one row of the result; `size` is None for a result of rank 0."""
    root, function = elements.function.region.root, elements.function
    if size is None:
        elements.bound.clear()
        store(result, integer(0), elements.value(root, ()))
        return
    length = function.dim(size)
    vectors = length // integer(lanes)
    if not isinstance(size, int) or size >= lanes:
        with T.serial(integer(0), vectors) as j:
            elements.bound.clear()
            run: Coordinate = Run(j * integer(lanes), lanes, lanes) if lanes > 1 else j
            value = spread(elements.value(root, (*index, run)), lanes)
            store(result, span(base + j * integer(lanes), lanes), value)
    if lanes > 1 and not (isinstance(size, int) and size % lanes == 0):
        with T.serial(vectors * integer(lanes), length) as j:
            elements.bound.clear()
            store(result, base + j, elements.value(root, (*index, j)))


elementwise_rules: tuple[KernelRule, ...] = (elementwise, reduction)
