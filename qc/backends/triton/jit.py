"""Run calls through Triton's own launcher: in its interpreter, or on a GPU that is there.

Artifacts do not come this way (they hold finished kernels); tests and benchmarks do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qc.backends.region import RESULT, SizeArgument
from qc.backends.triton.emit import load_function
from qc.backends.triton.kernel import Argument, Call, Launch, Scratch
from qc.ir.quantized import QuantizedTensor
from qc.ir.types import bind_dim
from qc.ir.weights.weight import Weight


class Prepared:
    """A call with its operands laid out, ready to be run again and again."""

    def __init__(
        self, call: Call, operands: Sequence[Any], sizes: Mapping[str, int], result: Tensor
    ) -> None:
        self.call, self.sizes, self.device = call, dict(sizes), result.device
        self.operands, self.result = operands, result
        self.arrays: dict[Argument, Any] = {}
        rows = bind_dim(call.dim, self.sizes)
        self.bound = [self.bind(launch) for launch in call.variant(rows).launches]

    def bind(self, launch: Launch) -> tuple[Any, tuple[int, ...], list[Any], dict[str, Any]]:
        """Return the function of a launch, its grid, arguments and options."""
        function = load_function(launch.source, launch.function)
        grid = tuple(cells.count(self.sizes) for cells in launch.grid)
        arguments = [self.argument(each.argument) for each in launch.parameters]
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        return function, grid, arguments, {**dict(launch.constants), **options}

    def argument(self, argument: Argument) -> Any:
        """Return the value of an argument; arrays are made once."""
        if isinstance(argument, SizeArgument):
            return bind_dim(argument.dim, self.sizes)
        if argument not in self.arrays:
            self.arrays[argument] = self.array(argument)
        return self.arrays[argument]

    def array(self, argument: Argument) -> Tensor:
        """Make the array of an argument."""
        if isinstance(argument, Scratch):
            shape = [bind_dim(dim, self.sizes) for dim in argument.shape]
            return torch.full(shape, float("nan"), dtype=argument.dtype, device=self.device)
        assert not isinstance(argument, SizeArgument)
        if argument.operand == RESULT:
            return self.result
        value = self.operands[argument.operand]
        if isinstance(value, Weight):
            repack = self.call.repack.get((argument.operand, argument.array))
            stored = value.arrays()[argument.array] if repack is None else repack(value)
            return stored.contiguous().to(self.device)
        if isinstance(value, QuantizedTensor):
            held = {"codes": value.codes, "scale": value.scale.float()}[argument.array]
            return held.contiguous().to(self.device)
        assert isinstance(value, Tensor)
        return value.contiguous().to(self.device)

    def run(self) -> None:
        """Launch everything, in order."""
        for function, grid, arguments, options in self.bound:
            function[grid](*arguments, **options)
