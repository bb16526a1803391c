"""The last rule: any format, one element after the other, through its decode expression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.layout import BLOCK
from qc.backends.tvm.linear.panels import add_tile, new_panel, reader_of
from qc.backends.tvm.linear.rendering import VectorRendering
from qc.backends.tvm.linear.skeleton import Signature
from qc.backends.tvm.linear.stored import declare_plain, plain_arrays
from qc.backends.tvm.linear.term import Place, Products, TermKernel
from qc.backends.tvm.linear.vectors import float_lanes
from qc.ir.weights.expression import COL, ROW, Expr, walk


@dataclass(frozen=True, eq=False)
class ScalarKernel(TermKernel):
    """Decode a block of outputs to a panel, element by element."""

    rule: ClassVar[str] = "scalar"
    place: Place
    decode: Expr

    @property
    def work(self) -> float:
        return float(8 * len(walk(self.decode)))

    def declare(self, signature: Signature) -> None:
        declare_plain(signature, self.place, self.decode)

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        inputs.need_values()

    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        arrays = plain_arrays(signature, self.place, self.decode)
        panel, outer, inner = new_panel(self.place.inner), self.place.outer, self.place.inner
        rows = T.min(T.int64(BLOCK), T.int64(outer) - block * BLOCK)
        with (
            T.serial(T.int64(0), T.int64(inner)) as column,
            T.serial(T.int64(0), T.int64(BLOCK)) as number,
        ):
            at = column * BLOCK + number
            T.buffer_store(panel, T.float32(0), [at])
            with T.If(number < rows), T.Then():
                indices = {ROW: T.Bind(block * BLOCK + number), COL: column}
                rendering = VectorRendering(arrays, indices, 1, self.place.target)
                T.buffer_store(panel, rendering.value(self.decode), [at])
        lanes = float_lanes(self.place.target)
        read = reader_of(panel, lanes)

        def add(row: Any, height: int, sums: Any) -> None:
            add_tile(inputs.values, inner, read, lanes, row, height, sums)

        return add


def scalar_term(place: Place) -> TermKernel:
    """Take every format and every size."""
    return ScalarKernel(place, place.format.decode(place.shape, ROW, COL))
