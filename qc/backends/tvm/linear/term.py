"""What a kernel does for one term of a weight, and the rules that choose how.

A linear kernel walks over blocks of 16 outputs. For each it adds up the products of all terms of
its weight, one after the other, into the same accumulators: a sum of terms is one kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from qc.backends.tvm.linear.inputs import Inputs
from qc.backends.tvm.linear.skeleton import Signature
from qc.ir.target import Target
from qc.ir.types import ActivationFormat
from qc.ir.weights.weight import ArraySpec, TermFormat, Weight

Accumulators = Sequence[Any]
"""One float32[16] buffer for each row of a tile, or, with `sums_in_memory`, one for all rows."""

Products = Callable[[Any, int, Accumulators], None]
"""(first row, rows of the tile, accumulators): emit the products and add them."""


@dataclass(frozen=True)
class Place:
    """A term in a kernel: the operand whose arrays start with `prefix`, and what it multiplies.

    `activation` says how the inputs are quantized that this term multiplies; None for float32.
    """

    operand: int
    prefix: str
    format: TermFormat
    shape: tuple[int, int]
    target: Target
    activation: ActivationFormat | None = None

    @property
    def outer(self) -> int:
        return self.shape[0]

    @property
    def inner(self) -> int:
        return self.shape[1]

    @cached_property
    def specs(self) -> dict[str, ArraySpec]:
        """The stored arrays, without the prefix."""
        return self.format.arrays(self.shape)

    def declare(
        self,
        signature: Signature,
        name: str,
        dtype: str,
        shape: Sequence[int],
        repack: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> None:
        """Declare an array made of the stored arrays of this term."""
        signature.declare_weight(
            self.operand, self.prefix + name, dtype, shape, partial(repacked, self.prefix, repack)
        )

    def buffer(self, signature: Signature, name: str) -> Any:
        """Return a declared array."""
        return signature.buffers[self.operand, self.prefix + name]


def repacked(
    prefix: str, repack: Callable[[Mapping[str, Tensor]], Tensor], weight: Weight
) -> Tensor:
    """Apply `repack` to the arrays of one term of a weight."""
    arrays = {
        name.removeprefix(prefix): array
        for name, array in weight.arrays().items()
        if name.startswith(prefix)
    }
    return repack(arrays).contiguous()


class TermKernel(ABC):
    """How one term, or several, are read and multiplied. `rule` names it in reports."""

    rule: ClassVar[str]

    @property
    def sums_in_memory(self) -> bool:
        """Say whether a tile has too many rows to keep its sums in registers."""
        return False

    @abstractmethod
    def declare(self, signature: Signature) -> None:
        """Declare the arrays that the kernel reads."""

    def prepare(self, signature: Signature, inputs: Inputs) -> None:
        """Emit what happens once a call, before the blocks."""
        return None

    def at_height(self, height: int) -> TermKernel:
        """Return what multiplies tiles of `height` rows: perhaps another kernel on these arrays."""
        return self

    @abstractmethod
    def block(self, signature: Signature, inputs: Inputs, block: Any, many: bool) -> Products:
        """Emit what happens once a block of outputs; return how products are added.

        `many`: tiles of rows follow, so that decoding the block first pays.
        """

    def finish(self) -> None:
        """Emit what happens after the last tile of a block."""
        return None

    @property
    @abstractmethod
    def work(self) -> float:
        """Instructions on vectors for each weight and row, times the lanes: for predictions."""


TermRule = Callable[[Place], TermKernel | None]
"""Place -> how to multiply there, or None: "not mine"."""

STORED_NAMES = {
    torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "uint16",
    torch.uint8: "uint8", torch.int8: "int8", torch.int16: "int16", torch.uint16: "uint16",
    torch.int32: "int32", torch.int64: "int64",
}  # fmt: skip
"""Element types of stored arrays in TIR: bfloat16 as its bits."""


def held(array: Tensor) -> Tensor:
    """Return an array as kernels hold it."""
    return array.view(torch.uint16) if array.dtype == torch.bfloat16 else array
