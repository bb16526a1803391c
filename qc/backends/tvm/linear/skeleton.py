"""What all linear kernels share: arguments, the loop over blocks of outputs, the epilogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from qc.backends.tvm.kernel import RESULT, Argument, ArrayArgument, Kernel, Repack
from qc.backends.tvm.linear.matching import LinearRegion, is_vector
from qc.backends.tvm.linear.vectors import index, span, splat
from qc.backends.tvm.vector_math import render
from qc.ir import ops
from qc.ir.node import Node
from qc.ir.types import Dim
from qc.ir.weights.dense import DenseFormat
from qc.ir.weights.weight import Weight, WeightFormat

# One core does about 32 multiply-adds a cycle, and waking the others costs a few thousand cycles.
SERIAL_BELOW = 1 << 16

FLOAT32 = WeightFormat((DenseFormat(torch.float32),))


@dataclass
class Signature:
    """The arguments of the function being built, declared in call order."""

    linear: LinearRegion
    rows: Any
    arguments: list[Argument] = field(default_factory=list)
    repack: dict[int, Repack] = field(default_factory=dict)
    buffers: dict[tuple[int, str], Any] = field(default_factory=dict)

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
            by_row = not is_vector(node, outer)
            array = "values"
            if format == FLOAT32:
                array = "0.values"
            elif format is not None:
                self.repack[operand] = float_values
            self.declare(operand, array, "float32", (outer,), by_row)
        self.declare(RESULT, "values", "float32", (outer,), by_row=True)

    def x(self, array: str = "values") -> Any:
        """Return one of the buffers of x."""
        return self.buffers[self.linear.operand(self.linear.x), array]

    def extra(self, node: Node) -> Any:
        """Return the buffer of an extra operand."""
        operand = self.linear.operand(node)
        return next(b for (number, _), b in self.buffers.items() if number == operand)

    @property
    def result(self) -> Any:
        return self.buffers[RESULT, "values"]


def float_values(weight: Weight) -> dict[str, torch.Tensor]:
    """Lay a vector out as float32 values."""
    return {"values": weight.dense().float().contiguous()}


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
    """Emit `emit(block)` for all blocks of outputs, on all threads where that is worth it."""
    work = signature.linear.outer * signature.linear.inner
    if work > SERIAL_BELOW:
        with T.parallel(T.int64(0), T.int64(blocks)) as block:
            emit(block)
        return
    with T.If(signature.rows * work <= SERIAL_BELOW):
        with T.Then(), T.serial(T.int64(0), T.int64(blocks)) as block:
            emit(block)
        with T.Else(), T.parallel(T.int64(0), T.int64(blocks)) as block:
            emit(block)


def for_each_tile(
    signature: Signature, height: int, emit: Callable[[Any, int], None]
) -> None:
    """Emit `emit(row, height)` for tiles of rows, or `emit(row, 1)` where there are fewer.

    The last tile is moved up to end at the last row: rows in the overlap are computed twice, to
    the same values, so the result must not share memory with an operand.
    """
    rows = signature.rows
    with T.If(rows < height):
        with T.Then(), T.serial(T.int64(0), rows) as row:
            emit(row, 1)
        with T.Else(), T.serial(T.int64(0), T.floordiv(rows + (height - 1), height)) as tile:
            emit(T.Bind(T.min(tile * height, rows - height)), height)


def finished(
    signature: Signature, products: Mapping[Node, Any], row: Any, column: Any, lanes: int
) -> Any:
    """Render the epilogue for `lanes` outputs of one row, from the bare products."""
    values: dict[Node, Any] = {}

    def read(node: Node) -> Any:
        if isinstance(node.op, ops.Scalar):
            return splat(T.float32(float(node.op.value)), lanes)
        if isinstance(node.op, ops.Linear):
            biases = [values[bias] for bias in node.inputs[2:]]
            return sum(biases, products[node])
        if node in signature.linear.extras:
            at = span(column, lanes)
            vector = is_vector(node, signature.linear.outer)
            return signature.extra(node)[at] if vector else signature.extra(node)[row, at]
        return render(node.op, [values[i] for i in node.inputs], lanes)

    linear = signature.linear
    for node in linear.region.body.nodes:
        if node is not linear.x and node not in linear.weights:
            values[node] = T.Bind(read(node))
    return values[linear.region.root]


def store_block(
    signature: Signature, accumulators: Mapping[Node, Any], row: Any, block: Any, lanes: int
) -> None:
    """Finish and store 16 outputs of one row from float32[16] accumulators.

    Only the last block can be narrower; it goes through memory, lane by lane, so that the
    accumulators of all others stay in registers.
    """
    outer = signature.linear.outer
    narrow = outer % 16

    def store_vectors() -> None:
        for start in range(0, 16, lanes):
            products = {node: a[span(start, lanes)] for node, a in accumulators.items()}
            column = block * 16 + start
            value = finished(signature, products, row, column, lanes)
            T.buffer_store(signature.result, value, [row, span(column, lanes)])

    def store_lanes() -> None:
        copies = {node: T.alloc_buffer((16,), "float32", layout=None) for node in accumulators}
        for node, copy in copies.items():
            for start in range(0, 16, lanes):
                value = accumulators[node][span(start, lanes)]
                T.buffer_store(copy, value, [span(start, lanes)])
        with T.serial(T.int64(0), T.int64(narrow)) as lane:
            products = {node: copy[lane] for node, copy in copies.items()}
            column = T.Bind(block * 16 + lane)
            value = finished(signature, products, row, column, 1)
            T.buffer_store(signature.result, value, [row, column])

    if not narrow:
        store_vectors()
        return
    with T.If(block < index(outer // 16)):
        with T.Then():
            store_vectors()
        with T.Else():
            store_lanes()


def accumulator(lanes: int, dtype: str = "float32", size: int = 16) -> Any:
    """Allocate zeroed accumulators that LLVM keeps in registers."""
    buffer = T.alloc_buffer((size,), dtype, layout=None)
    zero = T.float32(0) if dtype == "float32" else T.int32(0)
    for start in range(0, size, lanes):
        T.buffer_store(buffer, splat(zero, lanes), [span(start, lanes)])
    return buffer
