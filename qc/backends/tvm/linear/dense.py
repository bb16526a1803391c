"""Dense weights in blocks of 16 outputs: float32, float16, bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.layout import BLOCK, in_blocks
from qc.backends.tvm.linear.panels import ReadWeight, add_tile
from qc.backends.tvm.linear.rendering import StoredArray, widened
from qc.backends.tvm.linear.skeleton import Signature, accumulator
from qc.backends.tvm.linear.term import STORED_NAMES, Place, Products, TermKernel, held
from qc.backends.tvm.linear.vectors import float_lanes, prefetch, span, splat
from qc.ir.weights.dense import DenseFormat

CHAINS = 4  # independent sums of one row: hides the latency of multiply-add
PREFETCH_BYTES = 2048
UNROLLED = 64  # inputs up to which a row is multiplied without a loop


@dataclass(frozen=True, eq=False)
class DenseKernel(TermKernel):
    """Values [blocks, inner, 16] in the dtype they are stored in."""

    rule: ClassVar[str] = "dense"
    place: Place
    dtype: torch.dtype

    @property
    def work(self) -> float:
        return 1.0 if self.dtype == torch.float32 else 2.0

    def declare(self, signature: Signature) -> None:
        shape = (-(-self.place.outer // BLOCK), self.place.inner, BLOCK)
        self.place.declare(signature, "panels", STORED_NAMES[self.dtype], shape, packed_dense)

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        inputs.need_values()

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        lanes = float_lanes(self.place.target)
        buffer = self.place.buffer(signature, "panels")
        array = StoredArray(buffer, self.dtype, ())
        if not many and self.place.inner <= UNROLLED:
            row_bytes = BLOCK * self.dtype.itemsize
            for at in range(0, self.place.inner, max(1, 64 // row_bytes)):
                prefetch(T.address_of(buffer[block, T.int64(at), T.int64(0)]))

        def read(inner: Any, first: int) -> Any:
            return widened(array, buffer[block, inner, span(first, lanes)], self.place.target)

        def add(row: Any, height: int, sums: Any) -> None:
            if height > 1:
                add_tile(inputs.values, self.place.inner, read, lanes, row, height, sums)
            elif self.place.inner <= UNROLLED:
                self.add_short_row(inputs, read, row, sums[0])
            else:
                self.add_row(buffer, inputs, read, block, row, sums[0])

        return add

    def add_short_row(self, inputs: Inputs, read: ReadWeight, row: Any, total: Any) -> None:
        """Multiply one row of few inputs, such as the inner side of a low rank, without a loop."""
        lanes = float_lanes(self.place.target)
        values = [T.Bind(inputs.values[row, T.int64(at)]) for at in range(self.place.inner)]
        for first in range(0, BLOCK, lanes):
            where = span(first, lanes)
            chains: list[Any] = [total[where]]
            for at, value in enumerate(values):
                product = read(T.int64(at), first) * splat(value, lanes)
                if len(chains) < CHAINS:
                    chains.append(product)
                else:
                    chains[at % CHAINS] = chains[at % CHAINS] + product
            T.buffer_store(total, sum(chains[1:], chains[0]), [where])

    def add_row(
        self, buffer: Any, inputs: Inputs, read: ReadWeight, block: Any, row: Any, total: Any
    ) -> None:
        """Multiply one row, reading ahead."""
        lanes, inner = float_lanes(self.place.target), self.place.inner
        sums = [accumulator(lanes) for _ in range(CHAINS)]
        full = inner // CHAINS

        def add(sum: Any, at: Any) -> None:
            value = splat(inputs.values[row, at], lanes)
            for first in range(0, BLOCK, lanes):
                where = span(first, lanes)
                T.buffer_store(sum, sum[where] + read(at, first) * value, [where])

        with T.serial(T.int64(0), T.int64(full)) as step:
            for line in range(0, CHAINS * BLOCK * self.dtype.itemsize, 64):
                ahead = (PREFETCH_BYTES + line) // (BLOCK * self.dtype.itemsize)
                prefetch(T.address_of(buffer[block, step * CHAINS + ahead, T.int64(0)]))
            for chain, sum_ in enumerate(sums):
                add(sum_, T.Bind(step * CHAINS + chain))
        with T.serial(T.int64(full * CHAINS), T.int64(inner)) as at:
            add(sums[0], at)
        for first in range(0, BLOCK, lanes):
            where = span(first, lanes)
            T.buffer_store(total, sum((s[where] for s in sums), total[where]), [where])


def dense_term(place: Place) -> TermKernel | None:
    """Multiply by stored floats."""
    match place.format:
        case DenseFormat(dtype) if dtype in (torch.float32, torch.float16, torch.bfloat16):
            return DenseKernel(place, dtype)
    return None


def packed_dense(arrays: Mapping[str, Tensor]) -> Tensor:
    """Lay a dense weight out as [blocks, inner, 16]."""
    return held(in_blocks(arrays["values"]).transpose(1, 2).contiguous())
