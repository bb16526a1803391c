"""What all linear kernels share: arguments, the loop over blocks of outputs, the epilogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from qc.backends.linear_region import LinearRegion, is_number, is_vector
from qc.backends.region import RESULT, ArrayArgument, Repack
from qc.backends.tvm.kernel import Argument, Kernel
from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.vectors import index, span, splat
from qc.backends.tvm.vector_math import render
from qc.ir import ops
from qc.ir.node import Node
from qc.ir.types import Dim
from qc.ir.weights.dense import DenseFormat
from qc.ir.weights.weight import Weight, WeightFormat

# Elements of a weight. One core does about 20 multiply-adds a cycle; a parallel launch takes about
# 5000 cycles.
SERIAL_BELOW = 1 << 15

FLOAT32 = WeightFormat((DenseFormat(torch.float32),))


@dataclass
class Signature:
    """The arguments of the function being built, declared in call order."""

    linear: LinearRegion
    rows: Any
    arguments: list[Argument] = field(default_factory=list)
    repack: dict[tuple[int, str], Repack] = field(default_factory=dict)
    buffers: dict[tuple[int, str], Any] = field(default_factory=dict)
    scratch: dict[object, Any] = field(default_factory=dict)
    """What terms have prepared once a call, for their blocks."""

    def declare(
        self,
        operand: int,
        array: str,
        dtype: str,
        shape: Sequence[int],
        by_row: bool = False,
    ) -> Any:
        """Declare a buffer of `shape`, or of one such row for each row of x."""
        seen: tuple[Dim, ...] = (self.linear.rows, *shape) if by_row else tuple(shape)
        sizes = [self.rows, *map(T.int64, shape)] if by_row else list(map(T.int64, shape))
        name = f"{'result' if operand == RESULT else f'operand{operand}'}_{array}"
        buffer = T.arg(name.replace(".", "_"), T.Buffer(sizes, dtype, layout=None))
        self.arguments.append(ArrayArgument(operand, array, seen))
        self.buffers[operand, array] = buffer
        return buffer

    def declare_x(self) -> None:
        """Declare the arrays of x."""
        operand, inner = self.linear.operand(self.linear.x), self.linear.inner
        format = self.linear.activation
        if format is None:
            self.declare(operand, "values", "float32", (inner,), by_row=True)
            return
        groups = -(-inner // (format.group or inner))
        self.declare(operand, "codes", "int8", (inner,), by_row=True)
        self.declare(operand, "scale", "float32", (groups,), by_row=True)
        self.declare(operand, "total", "float32", (groups,), by_row=True)

    def declare_extras(self) -> None:
        """Declare what the epilogue reads, then the result."""
        outer = self.linear.outer
        for node in self.linear.extras:
            operand, format = self.linear.operand(node), self.linear.region.format_of(node)
            by_row = not (is_number(node) or is_vector(node, outer))
            array = "values"
            if format == FLOAT32:
                array = "0.values"
            elif format is not None:
                self.repack[operand, array] = float_values
            size = 1 if is_number(node) else outer
            self.declare(operand, array, "float32", (size,), by_row)
        self.declare(RESULT, "values", "float32", (outer,), by_row=True)

    def declare_weight(
        self, operand: int, array: str, dtype: str, shape: Sequence[int], repack: Repack
    ) -> None:
        """Declare a repacked array of a weight, once where two linears share it."""
        if (operand, array) not in self.repack:
            self.repack[operand, array] = repack
            self.declare(operand, array, dtype, shape)

    def inputs(self) -> Inputs:
        """Return what the weights multiply."""
        linear = self.linear
        x = {
            array: buffer
            for (operand, array), buffer in self.buffers.items()
            if operand == linear.operand(linear.x)
        }
        return Inputs(self.rows, linear.inner, linear.region.target, format=linear.activation, **x)

    def read_extra(self, node: Node, row: Any, column: Any, lanes: int) -> Any:
        """Load what the epilogue of `lanes` outputs of one row reads of an extra operand."""
        operand = self.linear.operand(node)
        buffer = next(b for (number, _), b in self.buffers.items() if number == operand)
        if is_number(node):
            return splat(buffer[0], lanes)
        at = span(column, lanes)
        return buffer[at] if is_vector(node, self.linear.outer) else buffer[row, at]

    @property
    def result(self) -> Any:
        return self.buffers[RESULT, "values"]


def float_values(weight: Weight) -> torch.Tensor:
    """Lay a vector out as float32 values."""
    return weight.dense().float().contiguous()


def build_kernel(
    rule: str,
    linear: LinearRegion,
    declare_weights: Callable[[Signature], None],
    body: Callable[[Signature], None],
) -> Kernel:
    """Build the function: arguments in the order x, weights, extras, result, then `body`."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("linear")
        rows = T.int64(linear.rows) if isinstance(linear.rows, int) else T.int64()
        signature = Signature(linear, rows)
        signature.declare_x()
        declare_weights(signature)
        signature.declare_extras()
        T.func_attr({"tirx.noalias": True})
        body(signature)
    return Kernel(rule, builder.get(), tuple(signature.arguments), signature.repack)


def for_each_block(signature: Signature, blocks: int, emit: Callable[[Any], None]) -> None:
    """Emit `emit(block)` for all blocks of outputs, on all threads unless the weight is tiny."""
    tiny = signature.linear.outer * signature.linear.inner <= SERIAL_BELOW
    loop = T.serial if tiny else T.parallel
    with loop(T.int64(0), T.int64(blocks)) as block:
        emit(block)


def choose_height(
    signature: Signature, heights: Sequence[int], emit: Callable[[int], None]
) -> None:
    """Emit the greatest of the ascending `heights` that the rows fill, or 1, chosen at run time.

    The choice stands outside of the loop over blocks: memory that a block needs for tall tiles is
    allocated in every iteration of a loop that mentions it.
    """
    height, *taller = heights
    if not taller:
        emit(height)
        return
    with T.If(signature.rows < taller[0]):
        with T.Then():
            emit(height)
        with T.Else():
            choose_height(signature, taller, emit)


def for_each_tile(signature: Signature, height: int, emit: Callable[[Any, int], None]) -> None:
    """Emit `emit(first row, height)` for tiles of `height` rows.

    The last tile is moved up to end at the last row: rows in the overlap are computed twice, to the
    same values, so the result must not share memory with an operand.
    """
    rows = signature.rows
    if height == 1:
        with T.serial(T.int64(0), rows) as row:
            emit(row, 1)
        return
    with T.serial(T.int64(0), T.floordiv(rows + (height - 1), height)) as tile:
        emit(T.Bind(T.min(tile * height, rows - height)), height)


def finished(
    linear: LinearRegion,
    products: Mapping[Node, Any],
    read_extra: Callable[[Node], Any],
    lanes: int,
) -> Any:
    """Render the epilogue for vectors of `lanes` values, from the bare products."""
    body = linear.region.body
    values: dict[Node, Any] = {}

    def read(node: Node) -> Any:
        if isinstance(node.op, ops.Scalar):
            return splat(T.float32(float(node.op.value)), lanes)
        if isinstance(node.op, ops.Linear):
            return sum((values[bias] for bias in node.inputs[2:]), products[node])
        if node in linear.extras:
            return read_extra(node)
        return render(node.op, [values[i] for i in node.inputs], lanes)

    for node in body.nodes:
        if node is not linear.x and node not in linear.weights:
            shared = len(body.users[node]) > 1
            values[node] = T.Bind(read(node)) if shared else read(node)
    return values[linear.region.root]


def store_one(signature: Signature, products: Mapping[Node, Any], row: Any, column: Any) -> None:
    """Finish and store a single output.

    It is computed in a vector of equal lanes: TVM's simplifier gives up on the integer scalars
    inside exp ("conflicts with previous binding").
    """
    lanes = 4
    spread = {node: splat(value, lanes) for node, value in products.items()}

    def read(node: Node) -> Any:
        return splat(signature.read_extra(node, row, column, 1), lanes)

    copy = T.alloc_buffer((lanes,), "float32", layout=None)
    T.buffer_store(copy, finished(signature.linear, spread, read, lanes), [span(0, lanes)])
    T.buffer_store(signature.result, copy[0], [row, column])


def store_tile(
    signature: Signature,
    accumulators: Mapping[Node, Sequence[Any]],
    row: Any,
    block: Any,
    lanes: int,
) -> None:
    """Finish and store 16 outputs of a tile of rows from one float32[16] accumulator a row.

    The sums go through memory, so that the epilogue is compiled once a tile and not once a
    vector, and so that the accumulators, never indexed by a variable, stay in registers.
    """
    height = len(next(iter(accumulators.values())))
    copies = {}
    for node, rows in accumulators.items():
        copies[node] = T.alloc_buffer((height * 16,), "float32", layout=None)
        for at in range(0, height * 16, lanes):
            value = rows[at // 16][span(at % 16, lanes)]
            T.buffer_store(copies[node], value, [span(at, lanes)])
    store_sums(signature, copies, height, row, block, lanes)


def store_sums(
    signature: Signature, sums: Mapping[Node, Any], height: int, row: Any, block: Any, lanes: int
) -> None:
    """Finish and store 16 outputs of `height` rows from float32[height * 16] sums."""
    outer = signature.linear.outer

    def store_vectors() -> None:
        steps = height * 16 // lanes
        with T.serial(T.int64(0), T.int64(steps)) as step:
            at = step * lanes
            products = {node: each[span(at, lanes)] for node, each in sums.items()}
            r = T.Bind(row + T.floordiv(at, T.int64(16)))
            column = T.Bind(block * 16 + T.floormod(at, T.int64(16)))
            read = partial(signature.read_extra, row=r, column=column, lanes=lanes)
            value = finished(signature.linear, products, read, lanes)
            T.buffer_store(signature.result, value, [r, span(column, lanes)])

    def store_lanes() -> None:
        with (
            T.serial(T.int64(0), T.int64(height)) as r,
            T.serial(T.int64(0), T.int64(outer % 16)) as lane,
        ):
            products = {node: each[r * 16 + lane] for node, each in sums.items()}
            store_one(signature, products, row + r, block * 16 + lane)

    if outer % 16 == 0:
        store_vectors()
        return
    with T.If(block < index(outer // 16)):
        with T.Then():
            store_vectors()
        with T.Else():
            store_lanes()


def zeros_in_memory(size: int, lanes: int) -> Any:
    """Allocate zeros that are too many for registers."""
    buffer = T.alloc_buffer((size,), "float32", layout=None)
    with T.serial(T.int64(0), T.int64(size // lanes)) as number:
        T.buffer_store(buffer, splat(T.float32(0), lanes), [span(number * lanes, lanes)])
    return buffer


def accumulator(lanes: int, dtype: str = "float32", size: int = 16) -> Any:
    """Allocate zeroed accumulators that LLVM keeps in registers."""
    buffer = T.alloc_buffer((size,), dtype, layout=None)
    zero = T.float32(0) if dtype == "float32" else T.int32(0)
    for start in range(0, size, lanes):
        T.buffer_store(buffer, splat(zero, lanes), [span(start, lanes)])
    return buffer
