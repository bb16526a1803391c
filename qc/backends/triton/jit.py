"""Run calls through Triton's own launcher: in its interpreter, or on a GPU that is there.

Artifacts do not come this way (they hold finished kernels); tests and benchmarks do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from qc.backends.region import RESULT, ArrayArgument, SizeArgument
from qc.backends.triton.emit import load_function
from qc.backends.triton.kernel import HIDDEN_PARAMETERS, Argument, Call, Cubin, Launch, Scratch
from qc.ir.quantized import QuantizedTensor
from qc.ir.types import bind_dim
from qc.ir.weights.weight import Weight
from qc.runtime.cuda.driver import Driver, Function
from qc.runtime.cuda.order import Access, Span, dependencies, late_starts


class Prepared:
    """A call with its operands laid out, ready to be run again and again."""

    def __init__(
        self, call: Call, operands: Sequence[Any], sizes: Mapping[str, int], result: Tensor
    ) -> None:
        self.call, self.sizes, self.device = call, dict(sizes), result.device
        self.operands, self.result = operands, result
        self.arrays: dict[Argument, Any] = {}
        self.launches = call.variant(bind_dim(call.dim, self.sizes)).launches
        self.bound = [self.bind(launch) for launch in self.launches]

    def function(self, launch: Launch) -> Any:
        """Return what runs a launch."""
        return load_function(launch.source, launch.function)

    def bind(self, launch: Launch) -> tuple[Any, tuple[int, ...], list[Any], dict[str, Any]]:
        """Return the function of a launch, its grid, arguments and options."""
        function = self.function(launch)
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
            return value.arrays[argument.array].contiguous().to(self.device)
        assert isinstance(value, Tensor)
        return value.contiguous().to(self.device)

    def run(self) -> None:
        """Launch everything, in order."""
        for function, grid, arguments, options in self.bound:
            function[grid](*arguments, **options)


class Loaded(Prepared):
    """A call whose compiled kernels a GPU has loaded; `driver` launches them on its own stream."""

    def __init__(
        self, call: Call, operands: Sequence[Any], sizes: Mapping[str, int], result: Tensor,
        driver: Driver, cubin_of: Callable[[Launch], Cubin],
    ) -> None:  # fmt: skip
        super().__init__(call, operands, sizes, result)
        self.driver = driver
        self.functions = [self.loaded(driver, cubin_of(launch)) for launch in self.launches]
        self.load()

    @staticmethod
    def loaded(driver: Driver, cubin: Cubin) -> Function:
        threads = 32 * cubin.num_warps
        return driver.load_function(cubin.binary, cubin.name, threads, cubin.shared_bytes)

    def load(self) -> None:
        """Lay out the arguments of all launches as the driver takes them."""
        self.slots: list[list[Any]] = []
        self.addresses: list[Any] = []
        for _, _, arguments, _ in self.bound:
            slots: list[Any] = [
                ctypes.c_uint64(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int32(a)
                for a in arguments
            ]
            slots += [ctypes.c_uint64(0)] * HIDDEN_PARAMETERS
            self.slots.append(slots)
            self.addresses.append((ctypes.c_void_p * len(slots))(*map(ctypes.addressof, slots)))

    def function(self, launch: Launch) -> Any:
        return None

    def copied(self, arrays: Mapping[Argument, Any]) -> Loaded:
        """Return the same call on other arrays, such as copies of its weights."""
        other = Loaded.__new__(Loaded)
        other.__dict__.update(self.__dict__)
        other.arrays = dict(arrays)
        other.bound = [other.bind(launch) for launch in self.launches]
        other.load()
        return other

    def is_weight(self, argument: Argument) -> bool:
        """Say whether an argument is an array of a stored weight."""
        if not isinstance(argument, ArrayArgument) or argument.operand == RESULT:
            return False
        return isinstance(self.operands[argument.operand], Weight)

    def run(self) -> None:
        """Launch everything, in order; the caller waits for the stream."""
        for number in range(len(self.launches)):
            self.run_launch(number)

    def run_launch(self, number: int, beside: bool = False, late: bool = False) -> None:
        """Put one launch on the stream; `beside`: it may begin while the one in front ends."""
        put = self.driver.launch_beside if beside else self.driver.launch
        flag = self.slots[number][-HIDDEN_PARAMETERS - 1]
        flag.value = int(late)
        put(self.functions[number], self.bound[number][1], self.addresses[number])
        flag.value = 0

    def accesses(self) -> list[Access]:
        """Return the memory that each launch reads and writes: it writes the scratch that it is
        the first to name."""
        written: set[str] = set()
        found = []
        for launch in self.launches:
            spans: dict[tuple[bool, bool], list[Span]] = {}
            first = set()
            for parameter in launch.parameters:
                argument, array = parameter.argument, self.arrays.get(parameter.argument)
                if not isinstance(array, Tensor) or self.is_weight(argument):
                    continue
                writes = array is self.result
                if isinstance(argument, Scratch):
                    writes = argument.name not in written
                    first.add(argument.name)
                span = array.data_ptr(), array.data_ptr() + array.nbytes
                spans.setdefault((parameter.name in launch.late, writes), []).append(span)
            written |= first
            groups = [
                tuple(spans.get((late, w), ())) for late, w in product((False, True), repeat=2)
            ]
            found.append(Access(*groups))
        return found


def record(driver: Driver, calls: Sequence[Loaded], overlapping: bool) -> Any:
    """Return a graph of calls, each of which waits for the last one, as if it read its result."""
    driver.begin_capture()
    last: list[int] = []
    for at, call in enumerate(calls):
        order = call.accesses()
        if overlapping:
            for number, late in enumerate(late_starts(order)):
                call.run_launch(number, beside=at + number > 0, late=late)
            continue
        nodes: list[int] = []
        for number, waits in enumerate(dependencies(order)):
            driver.wait_for([nodes[each] for each in sorted(waits)] or last)
            call.run_launch(number)
            nodes += driver.recorded()
        last = nodes[-1:]
    return driver.end_capture()
