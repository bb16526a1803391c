"""Float products: float32 activations with dense or grouped weights.

One row of x reads the weight as it is stored, and decodes it in registers. Several rows share
decoded weights: a block of outputs of a grouped weight is decoded once to a panel f32[inner, 16].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tvm.tirx.script import builder as T

from qc.backends.tvm.kernel import Kernel, Region
from qc.backends.tvm.linear.codes import StreamReader
from qc.backends.tvm.linear.layout import BLOCK, STEP, Stream, in_blocks, stream_of
from qc.backends.tvm.linear.matching import LinearRegion, match_linear
from qc.backends.tvm.linear.skeleton import (
    Signature,
    accumulator,
    build_kernel,
    for_each_block,
    for_each_tile,
    store_tile,
)
from qc.backends.tvm.linear.vectors import (
    bfloats_to_float,
    float_lanes,
    halves_to_float,
    prefetch,
    span,
    splat,
    sum_of_lanes,
)
from qc.ir.node import Node
from qc.ir.weights.dense import DenseFormat
from qc.ir.weights.weight import Weight, WeightFormat

TILES = {16: 3, 32: 6, 64: 12}
"""Rows of x in a tile, by bytes of a vector: 12 accumulators of 16 (or 32) registers."""

CHAINS = 4  # independent sums of one row: hides the latency of multiply-add
PREFETCH_BYTES = 2048

ReadWeight = Callable[[Any, int], Any]
"""(input, first of `lanes` outputs of the block) -> float32 vector."""


@dataclass(frozen=True)
class Storage(ABC):
    """How the weight of one linear is laid out, and how kernels read it."""

    node: Node
    linear: LinearRegion

    @property
    def lanes(self) -> int:
        return float_lanes(self.linear.region.target)

    @abstractmethod
    def declare(self, signature: Signature) -> None:
        """Declare the repacked weight."""

    @abstractmethod
    def emit_row(self, signature: Signature, block: Any, row: Any) -> Any:
        """Multiply one row of x by a block of outputs; return the accumulator."""

    @abstractmethod
    def panel(self, signature: Signature, block: Any) -> ReadWeight:
        """Emit what several tiles of rows share; return how to read the weight in a tile."""


@dataclass(frozen=True)
class DenseStorage(Storage):
    """Values [blocks, inner, 16] in the dtype they are stored in (halves as int16)."""

    dtype: torch.dtype

    def declare(self, signature: Signature) -> None:
        shape = (-(-self.linear.outer // BLOCK), self.linear.inner, BLOCK)
        name = "float32" if self.dtype == torch.float32 else "int16"
        signature.declare_weight(self.node, "panels", name, shape, packed_dense)

    def reader(self, signature: Signature, block: Any) -> ReadWeight:
        """Return how to read a block."""
        buffer, target = signature.weight(self.node, "panels"), self.linear.region.target

        def read(inner: Any, first: int) -> Any:
            stored = buffer[block, inner, span(first, self.lanes)]
            if self.dtype == torch.float32:
                return stored
            bits = T.reinterpret(f"uint16x{self.lanes}", stored)
            if self.dtype == torch.bfloat16:
                return bfloats_to_float(bits, self.lanes)
            return halves_to_float(bits, self.lanes, target)

        return read

    def panel(self, signature: Signature, block: Any) -> ReadWeight:
        return self.reader(signature, block)

    def emit_row(self, signature: Signature, block: Any, row: Any) -> Any:
        read, x = self.reader(signature, block), signature.x()
        buffer = signature.weight(self.node, "panels")
        sums = [accumulator(self.lanes) for _ in range(CHAINS)]
        full = self.linear.inner // CHAINS

        def add(total: Any, inner: Any) -> None:
            value = splat(x[row, inner], self.lanes)
            for first in range(0, BLOCK, self.lanes):
                at = span(first, self.lanes)
                T.buffer_store(total, total[at] + read(inner, first) * value, [at])

        with T.serial(T.int64(0), T.int64(full)) as step:
            for line in range(0, CHAINS * BLOCK * self.dtype.itemsize, 64):
                ahead = (PREFETCH_BYTES + line) // (BLOCK * self.dtype.itemsize)
                prefetch(T.address_of(buffer[block, step * CHAINS + ahead, T.int64(0)]))
            for chain, total in enumerate(sums):
                add(total, T.Bind(step * CHAINS + chain))
        with T.serial(T.int64(full * CHAINS), T.int64(self.linear.inner)) as inner:
            add(sums[0], inner)
        for first in range(0, BLOCK, self.lanes):
            at = span(first, self.lanes)
            T.buffer_store(sums[0], sum((s[at] for s in sums[1:]), sums[0][at]), [at])
        return sums[0]


@dataclass(frozen=True)
class StreamStorage(Storage):
    """A stream of grouped codes."""

    stream: Stream

    def declare(self, signature: Signature) -> None:
        shape = (self.stream.blocks, self.stream.block_bytes)
        signature.declare_weight(self.node, "stream", "uint8", shape, self.stream.repack)

    def reader(self, signature: Signature, block: Any) -> StreamReader:
        """Return how to read a block."""
        buffer, target = signature.weight(self.node, "stream"), self.linear.region.target
        return StreamReader(self.stream, buffer, block, target, self.lanes)

    def place(self, reader: StreamReader, step: Any) -> tuple[Any, Any]:
        """Return where the group of a step starts, and its codes."""
        steps = T.int64(self.stream.group // STEP)
        head = T.Bind(reader.head(T.floordiv(step, steps)))
        inside = T.floormod(step, steps) * self.stream.step_bytes
        return head, T.Bind(head + self.stream.head_bytes + inside)

    def emit_row(self, signature: Signature, block: Any, row: Any) -> Any:
        reader, lanes, x = self.reader(signature, block), self.lanes, signature.x()
        sums = accumulator(lanes)
        with T.serial(T.int64(0), T.int64(self.linear.inner // STEP)) as step:
            head, codes = self.place(reader, step)
            for line in range(0, self.stream.step_bytes + self.stream.head_bytes, 64):
                prefetch(T.address_of(reader.buffer[block, codes + (PREFETCH_BYTES + line)]))
            parts = [x[row, span(step * STEP + at, lanes)] for at in range(0, STEP, lanes)]
            total = T.Bind(sum_of_lanes(sum(parts[1:], parts[0])))
            for first in range(0, BLOCK, lanes):
                chains: list[Any] = [None, None]
                for k, code in enumerate(reader.floats(codes, first)):
                    product = code * splat(x[row, step * STEP + k], lanes)
                    known = chains[k % 2]
                    chains[k % 2] = T.Bind(product if known is None else known + product)
                at, scale = span(first, lanes), reader.scale(head, first)
                minimum = reader.minimum(head, first, scale)
                value = sums[at] + scale * (chains[0] + chains[1]) + minimum * splat(total, lanes)
                T.buffer_store(sums, value, [at])
        return sums

    def panel(self, signature: Signature, block: Any) -> ReadWeight:
        reader, lanes = self.reader(signature, block), self.lanes
        decoded = T.alloc_buffer((self.linear.inner * BLOCK,), "float32", layout=None)
        with T.serial(T.int64(0), T.int64(self.linear.inner // STEP)) as step:
            head, codes = self.place(reader, step)
            for first in range(0, BLOCK, lanes):
                scale = reader.scale(head, first)
                minimum = reader.minimum(head, first, scale)
                for k, code in enumerate(reader.floats(codes, first)):
                    at = span((step * STEP + k) * BLOCK + first, lanes)
                    T.buffer_store(decoded, code * scale + minimum, [at])
        return lambda inner, first: decoded[span(inner * BLOCK + first, lanes)]


def float_linear(region: Region) -> Kernel | None:
    """Multiply float32 values by weights that are dense, or grouped in steps of 32 inputs."""
    linear = match_linear(region)
    if linear is None or linear.activation is not None:
        return None
    found = [
        storage_of(node, linear, format)
        for node, format in zip(linear.linears, linear.formats, strict=True)
    ]
    storages = [storage for storage in found if storage is not None]
    if len(storages) != len(found):
        return None

    def declare(signature: Signature) -> None:
        for storage in storages:
            storage.declare(signature)

    def emit(signature: Signature) -> None:
        for_each_block(
            signature,
            -(-linear.outer // BLOCK),
            lambda block: emit_block(signature, storages, block),
        )

    return build_kernel("float_dot", linear, declare, emit)


def storage_of(node: Node, linear: LinearRegion, format: WeightFormat) -> Storage | None:
    """Choose how the weight of one linear is laid out."""
    match format.terms:
        case (DenseFormat(dtype),) if dtype in (torch.float32, torch.float16, torch.bfloat16):
            return DenseStorage(node, linear, dtype)
    stream = stream_of(format, linear.outer, linear.inner)
    return None if stream is None else StreamStorage(node, linear, stream)


def packed_dense(weight: Weight) -> dict[str, Tensor]:
    """Lay a dense weight out as [blocks, inner, 16]; halves as int16."""
    values = weight.arrays()["0.values"]
    if values.dtype != torch.float32:
        values = values.contiguous().view(torch.int16)
    return {"panels": in_blocks(values).transpose(1, 2).contiguous()}


def emit_block(signature: Signature, storages: list[Storage], block: Any) -> None:
    """Compute one block of 16 outputs of all rows."""
    lanes = float_lanes(signature.linear.region.target)
    panels: list[ReadWeight] = []

    def prepare() -> None:
        panels.extend(storage.panel(signature, block) for storage in storages)

    def emit(row: Any, height: int) -> None:
        if height == 1:
            sums = {s.node: [s.emit_row(signature, block, row)] for s in storages}
        else:
            sums = {
                s.node: emit_tile(signature, read, row, height)
                for s, read in zip(storages, panels, strict=True)
            }
        store_tile(signature, sums, row, block, lanes)

    for_each_tile(signature, TILES[4 * lanes], emit, prepare)


def emit_tile(signature: Signature, read: ReadWeight, row: Any, height: int) -> list[Any]:
    """Multiply `height` rows of x by a block of outputs; return an accumulator for each."""
    lanes, x = float_lanes(signature.linear.region.target), signature.x()
    sums = [accumulator(lanes) for _ in range(height)]
    with T.serial(T.int64(0), T.int64(signature.linear.inner)) as inner:
        weights = [T.Bind(read(inner, first)) for first in range(0, BLOCK, lanes)]
        for r, total in enumerate(sums):
            value = T.Bind(splat(x[row + r, inner], lanes))
            for number, weight in enumerate(weights):
                at = span(number * lanes, lanes)
                T.buffer_store(total, total[at] + weight * value, [at])
    return sums
