"""One TVM function being written: its arguments, its symbolic sizes, its loops.

Buffers are seen flat, row-major, so that any index arithmetic ends in one offset; only caches keep
their four axes. All index arithmetic is int64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import reduce
from math import prod
from typing import Any

import sympy
import torch
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from qc.backends.region import RESULT, ArrayArgument, Region, Repack, SizeArgument
from qc.backends.tvm.kernel import Argument, Kernel
from qc.backends.tvm.vector_math import TVM_NAMES, bind
from qc.ir.node import Node
from qc.ir.types import Dim, element_count, symbol
from qc.ir.weights.weight import Weight

PrimExpr = Any

# A launch costs 1-2 microseconds, in which one core does about this many simple operations.
SERIAL_BELOW = 1 << 14

SUM_LANES = 16
"""Lanes of a sum over a row, whatever vectors a machine has: so all of them add in one order."""

# Python unrolls what is shorter than this many vectors; longer rows become loops.
UNROLLED = 8


def integer(value: PrimExpr | int) -> PrimExpr:
    """Make an int64 of a Python int; expressions pass."""
    return tirx.const(value, "int64") if isinstance(value, int) else value


def span(start: PrimExpr | int, lanes: int, stride: int = 1) -> PrimExpr:
    """Index `lanes` elements from `start` on."""
    return integer(start) if lanes == 1 else T.ramp(integer(start), integer(stride), lanes)


def pieces(size: int, lanes: int) -> Iterator[tuple[int, int]]:
    """Cut a known size into (offset, width): full vectors, then halves of them, then scalars."""
    at = 0
    while at < size:
        while lanes > size - at:
            lanes //= 2
        yield at, lanes
        at += lanes


def tree_reduce(vector: PrimExpr, lanes: int, combine: Callable[[Any, Any], Any]) -> PrimExpr:
    """Combine all lanes of a vector by halving; LLVM's own float sum goes lane by lane."""
    while lanes > 1:
        half = lanes // 2
        vector = bind(vector)
        low = T.Shuffle([vector], [tirx.const(i, "int32") for i in range(half)])
        high = T.Shuffle([vector], [tirx.const(i + half, "int32") for i in range(half)])
        vector, lanes = combine(low, high), half
    return bind(vector)


def symbols_of(value: object) -> set[str]:
    """Return the names of the symbols in an attribute of an op or in a shape."""
    if isinstance(value, sympy.Expr):
        return {str(s) for s in value.free_symbols}
    if isinstance(value, tuple):
        return set().union(*(symbols_of(v) for v in value))
    return set()


def region_symbols(region: Region) -> list[str]:
    """Return every symbol that a body mentions."""
    found: set[str] = set()
    for node in region.body.nodes:
        found |= symbols_of(node.tensor.shape)
        if node.inputs or node.op.name != "input":
            found |= set().union(*(symbols_of(getattr(node.op, f.name)) for f in fields(node.op)))
    return sorted(found)


def dense_values(weight: Weight) -> torch.Tensor:
    """Decode a parameter that a kernel wants as plain values."""
    return weight.dense()


@dataclass
class Function:
    """The arguments declared so far, and what they are in the body."""

    region: Region
    arguments: list[Argument] = field(default_factory=list)
    repack: dict[tuple[int, str], Repack] = field(default_factory=dict)
    sizes: dict[str, PrimExpr] = field(default_factory=dict)
    buffers: dict[Node, Any] = field(default_factory=dict)

    @property
    def lanes(self) -> int:
        """How many float32 values fill a vector register."""
        return self.region.target.vector_bytes // 4

    def declare_sizes(self, *more: str) -> None:
        """Declare an argument for every symbol of the body."""
        for name in sorted({*region_symbols(self.region), *more}):
            self.sizes[name] = T.arg(name, T.int64())
            self.arguments.append(SizeArgument(symbol(name)))

    def dim(self, dim: Dim) -> PrimExpr:
        """Return a symbolic dimension as an int64 expression."""
        if isinstance(dim, int) or dim.is_Integer:
            return integer(int(dim))
        if isinstance(dim, sympy.Symbol):
            return self.sizes[dim.name]
        if isinstance(dim, sympy.Pow):
            return reduce(lambda a, b: a * b, [self.dim(dim.base)] * int(dim.exp))
        parts = [self.dim(part) for part in dim.args]
        if isinstance(dim, sympy.Add):
            return reduce(lambda a, b: a + b, parts)
        if isinstance(dim, sympy.Mul):
            return reduce(lambda a, b: a * b, parts)
        raise TypeError(f"{dim} is no polynomial")

    def declare(self, operand: int, array: str, dtype: str, shape: tuple[Dim, ...]) -> Any:
        """Declare a buffer argument seen under `shape`."""
        name = f"{'result' if operand == RESULT else f'x{operand}'}_{array}".replace(".", "_")
        sizes = [self.dim(d) for d in shape]
        self.arguments.append(ArrayArgument(operand, array, shape))
        return T.arg(name, T.Buffer(sizes, dtype, layout=None))

    def declare_inputs(self) -> None:
        """Declare every input of the body as a flat buffer."""
        for node in self.region.body.inputs:
            self.declare_input(node)

    def declare_input(self, node: Node) -> Any:
        """Declare one input of the body: a tensor, or a parameter as plain values."""
        operand = self.region.body.inputs.index(node)
        format = self.region.format_of(node)
        dtype, array = node.tensor.dtype, "values"
        if format is not None:
            shape = tuple(int(d) for d in node.tensor.shape)
            stored = format.arrays(shape)
            if list(stored) == ["0.values"]:
                array, dtype = "0.values", stored["0.values"].dtype
            else:
                self.repack[operand, "values"] = dense_values
        flat = (element_count(node.tensor.shape),)
        self.buffers[node] = self.declare(operand, array, TVM_NAMES[dtype], flat)
        return self.buffers[node]

    def declare_result(self) -> Any:
        """Declare the result as a flat buffer of the root's dtype."""
        type = self.region.root.tensor
        return self.declare(RESULT, "values", TVM_NAMES[type.dtype], (element_count(type.shape),))


def build(
    rule: str,
    region: Region,
    emit: Callable[[Function], None],
    more_sizes: tuple[str, ...] = (),
    in_place: int | None = None,
) -> Kernel:
    """Write a function by `emit` and return it as a kernel."""
    function = Function(region)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True})
        function.declare_sizes(*more_sizes)
        emit(function)
    return Kernel(rule, builder.get(), tuple(function.arguments), function.repack, in_place)


def product(dims: tuple[Dim, ...]) -> Dim:
    """Multiply dimensions."""
    return element_count(dims)


def known_product(dims: tuple[Dim, ...]) -> int | None:
    """Return the product where every dimension is known."""
    return prod(int(d) for d in dims) if all(isinstance(d, int) for d in dims) else None


def for_each(extent: PrimExpr | int, work: int, body: Callable[[PrimExpr], None]) -> None:
    """Run `body` for 0 <= i < extent, on all threads where it is worth a launch.

    `work` counts the simple operations of one iteration.
    """
    if isinstance(extent, int) and (extent == 1 or extent * work < SERIAL_BELOW):
        run_serially(extent, body)
        return
    if isinstance(extent, int):
        run_on_all_threads(extent, body)
        return
    least = max(2, -(-SERIAL_BELOW // max(1, work)))
    with T.If(extent >= integer(least)):
        with T.Then():
            run_on_all_threads(extent, body)
        with T.Else():
            run_serially(extent, body)


def run_serially(extent: PrimExpr | int, body: Callable[[PrimExpr], None]) -> None:
    """Loop on this thread."""
    with T.serial(integer(0), integer(extent)) as i:
        body(i)


def run_on_all_threads(extent: PrimExpr | int, body: Callable[[PrimExpr], None]) -> None:
    """Loop with the iterations spread evenly over the threads."""
    with T.parallel(integer(0), integer(extent)) as i:
        body(i)


def store(buffer: Any, at: PrimExpr, value: PrimExpr) -> None:
    """Write to a flat buffer."""
    T.buffer_store(buffer, value, [at])


def walk(start: PrimExpr, size: int, lanes: int, body: Callable[[PrimExpr, int], None]) -> None:
    """Call body(channel, width) for all channels from `start` on: vectors in a loop, the rest
    written out."""
    vectors = size // lanes
    if vectors > UNROLLED:
        with T.serial(integer(0), integer(vectors)) as i:
            body(start + i * integer(lanes), lanes)
    else:
        for i in range(vectors):
            body(start + integer(i * lanes), lanes)
    for offset, width in pieces(size - vectors * lanes, lanes):
        body(start + integer(vectors * lanes + offset), width)
