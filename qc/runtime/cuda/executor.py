"""Run a program on a GPU: every step is a launch, and calls that come again are one graph.

What changes from call to call, the tokens and what depends on how many came before, lies in memory
that the launches read: so a graph stays valid while sizes and addresses do.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qc.errors import ArtifactError
from qc.runtime.cuda.driver import LIBRARY, Driver, Function, find_driver
from qc.runtime.cuda.launch import Launch
from qc.runtime.cuda.memory import DeviceMemory, DeviceState, Staging, round_up
from qc.runtime.cuda.order import Access, Span, dependencies, late_starts
from qc.runtime.cuda.sampling import Sampler
from qc.runtime.dtypes import DType
from qc.runtime.executor import Binding, Executor, Program, StepList
from qc.runtime.expression import Expression, parse_expression
from qc.runtime.manifest import (
    PAST,
    WEIGHTS,
    Binary,
    Code,
    Dim,
    KernelStep,
    Manifest,
    Scalar,
    Step,
    Value,
    ValueArg,
)
from qc.runtime.safetensors_file import SafetensorsFile

__all__ = ["TURNS", "CudaExecutor", "CudaProgram", "open_cuda_program"]

SLOT = 16
"""Bytes from one size in memory to the next: kernels count on addresses that are multiples."""
TURNS = ".turns"
"""What zeros beside a weight are called in which programs count: a launch writes them."""
_FIRST_TO_OVERLAP = 90
_RUNS_BEFORE_GRAPH = 1
"""A call that came once may not come again; recording one costs about as much as running it."""


def open_cuda_program(folder: Path, manifest: Manifest) -> CudaProgram:
    """Read what needs no GPU; the first call looks for one."""
    weights = SafetensorsFile(folder / WEIGHTS) if WEIGHTS in manifest.files else {}
    return CudaProgram(folder, manifest, weights)


class CudaProgram(Program):
    """Hold what was loaded and never changes."""

    library_name: str | Sequence[str] = LIBRARY
    """The driver to load: the first that there is."""
    driver: type[Driver] = Driver

    def __init__(
        self, folder: Path, manifest: Manifest, weights: Mapping[str, NDArray[Any]]
    ) -> None:
        super().__init__(manifest, weights, None)
        self.folder = folder
        self._opening = threading.Lock()

    @property
    def device(self) -> Device:
        """The GPU with kernels and weights on it, found when it is first needed.

        ArtifactError where there is none, or one that the kernels are not for.
        """
        with self._opening:
            return self._device

    @cached_property
    def _device(self) -> Device:
        driver = find_driver(self.library_name, self.driver)
        images: dict[str, bytes] = {}
        chosen = {
            name: fitting_binary(driver, name, code) for name, code in self.manifest.code.items()
        }
        functions = {
            name: load_code(driver, self.folder, chosen[name], code, images)
            for name, code in self.manifest.code.items()
        }
        overlapping = all(
            code.overlaps and begins_launches_early(chosen[name])
            for name, code in self.manifest.code.items()
        )
        memory, addresses = upload_weights(driver, self.weights)
        return Device(driver, functions, memory, addresses, overlapping)

    def executor(self) -> CudaExecutor:
        return CudaExecutor(self)

    def make_listing(self, steps: Sequence[Step]) -> StepList:
        """Prepare steps for every call that takes them."""
        return StepList(self, steps)


@dataclass(frozen=True)
class Device:
    """A GPU, the kernels that are loaded on it, and the addresses of the weights by value.
    `overlapping`: all kernels wait by themselves for the launches in front of them."""

    driver: Driver
    functions: Mapping[str, Function]
    memory: DeviceMemory
    addresses: Mapping[int, int]
    overlapping: bool = False


def upload_weights(
    driver: Driver, weights: Mapping[int, NDArray[Any]]
) -> tuple[DeviceMemory, dict[int, int]]:
    """Copy all weights to the device; return the memory and the address of each value."""
    memory = DeviceMemory(driver, sum(round_up(array.nbytes) for array in weights.values()))
    addresses, at = {}, 0
    for index, array in weights.items():
        memory.write(array, at)
        addresses[index] = memory.address + at
        at += round_up(array.nbytes)
    return memory, addresses


def begins_launches_early(binary: Binary) -> bool:
    """Say whether machine code was made for GPUs that begin a launch before the last has ended."""
    kind, _, number = binary.architecture.rpartition("_")
    return kind == "sm" and int(number) >= _FIRST_TO_OVERLAP


def load_code(
    driver: Driver, folder: Path, binary: Binary, code: Code, images: dict[str, bytes]
) -> Function:
    """Load a kernel from its file for this GPU. Raises ArtifactError."""
    if binary.file not in images:
        try:
            images[binary.file] = (folder / binary.file).read_bytes()
        except OSError as error:
            raise ArtifactError(f"cannot read {folder / binary.file}: {error.strerror}") from None
    image = images[binary.file] + b"\0"  # PTX is a text that ends so; other code says its length
    return driver.load_function(image, code.function, driver.wave * code.warps, binary.shared)


def fitting_binary(driver: Driver, name: str, code: Code) -> Binary:
    """Return the code of a kernel for this GPU: its own architecture's, an older one's of the same
    generation, or what the driver translates. Raises ArtifactError."""
    ranked = [
        (rank, binary)
        for binary in code.binaries
        if binary.shared <= driver.most_shared
        and (rank := driver.rank(binary.architecture)) is not None
    ]
    if not ranked:
        known = ", ".join(binary.architecture for binary in code.binaries) or "nothing"
        raise ArtifactError(
            f"the kernel {name} was compiled for {known}; the GPU here ({driver.name}) is "
            f"{driver.architecture}: compile the model for "
            f"{'cuda' if driver.vendor == 'NVIDIA' else 'rocm'}:{driver.architecture}"
        )
    return max(ranked, key=lambda each: each[0])[1]


class CudaExecutor(Executor):
    """Run a `CudaProgram` with its own state. One call at a time: `lock` is the caller's."""

    program: CudaProgram

    def __init__(self, program: CudaProgram) -> None:
        super().__init__(program)
        self._device_state: DeviceState | None = None
        self._scratch: DeviceMemory | None = None

    def reserve(self, batch: int, positions: int) -> None:
        self.program.device.driver.activate()
        super().reserve(batch, positions)

    def bind(self, sizes: Mapping[str, int]) -> Binding:
        self.program.device.driver.activate()
        return super().bind(sizes)

    def reset(self) -> None:
        self.program.device.driver.activate()
        super().reset()

    def make_state(self, layout: Sequence[tuple[DType, tuple[int, ...]]]) -> Any:
        """Return zeros for the state."""
        return DeviceState(self.program.device.driver, layout)

    def make_binding(self, listing: StepList, sizes: Mapping[str, int]) -> Binding:
        """Return a listing with every argument in place."""
        state: Any = self._state
        indices = [i for i, v in enumerate(self.program.manifest.values) if v.kind == "state"]
        addresses = state.addresses if state is not None else []
        return CudaBinding(
            self.program, listing, sizes, dict(zip(indices, addresses, strict=True)), self
        )

    def scratch(self, size: int) -> DeviceMemory:
        """Return memory that all bindings share; one that was too small lives with its bindings."""
        if self._scratch is None or size > self._scratch.size:
            self._scratch = DeviceMemory(self.program.device.driver, size)
        return self._scratch


class CudaBinding(Binding):
    """Hold steps for certain sizes, ready to run. `inputs` and `outputs` are arrays by name: fill
    the former, run, read the latter, which the next run overwrites."""

    def __init__(
        self,
        program: CudaProgram,
        listing: StepList,
        sizes: Mapping[str, int],
        state: Mapping[int, int],
        executor: CudaExecutor,
    ) -> None:
        # Nothing of the native tables is needed, so the base class is not initialised.
        self._driver, self._overlapping = program.device.driver, program.device.overlapping
        self._symbols = dict(sizes) | {PAST: 0}
        self._memo: dict[Dim, int] = {}
        self._program = program
        self._sampler: Sampler | None = None
        self._runs = {False: 0, True: 0}
        self._graphs: dict[bool, ctypes.c_void_p] = {}
        """By whether tokens are chosen."""
        placement = listing.place(self._size)
        self.arena_bytes = placement.arena
        self._arena = executor.scratch(placement.arena)
        values = program.manifest.values
        self._moving_sizes = [parse_expression(text) for text in moving_sizes(listing.steps)]
        given = [i for i, value in enumerate(values) if value.kind == "input"]
        taken = [i for i, value in enumerate(values) if value.kind == "output"]
        shapes = placement.shapes
        moving = np.dtype(np.int32), (len(self._moving_sizes), SLOT // 4)
        self._in = Staging(self._driver, [moving, *(layout(values[i], shapes[i]) for i in given)])
        self._out = Staging(self._driver, [layout(values[i], shapes[i]) for i in taken])
        self._addresses = {
            **program.device.addresses,
            **state,
            **{i: self._arena.address + at for i, at in placement.offsets.items()},
            **dict(zip(given, self._in.addresses[1:], strict=True)),
            **dict(zip(taken, self._out.addresses, strict=True)),
        }
        self.inputs = {values[i].name: a for i, a in zip(given, self._in.arrays[1:], strict=True)}
        self.outputs = {values[i].name: a for i, a in zip(taken, self._out.arrays, strict=True)}
        places = {
            each.text: self._in.addresses[0] + SLOT * number
            for number, each in enumerate(self._moving_sizes)
        }
        writer = LaunchWriter(program, self._size, self._addresses, places)
        self._launches = list(writer.launches(listing.steps))

    def run(self, past: int = 0) -> None:
        """Run all steps with `past` tokens in the state, and wait. Raises ArtifactError."""
        self._execute(past, None)

    @property
    def can_choose(self) -> bool:
        generate = self._program.manifest.generate
        if generate is None or not generate.sampler:
            return False
        return self.outputs[generate.logits].shape[1] == 1

    def choose(self, settings: NDArray[np.int32], past: int) -> list[int]:
        if self._sampler is None:
            self._sampler = self._make_sampler()
        self._sampler.settings[...] = settings
        self._execute(past, self._sampler)
        chosen: list[int] = self._sampler.chosen.tolist()
        return chosen

    def _make_sampler(self) -> Sampler:
        """Return what chooses among this binding's logits."""
        generate = self._program.manifest.generate
        assert generate is not None
        address = self._addresses[self._program.manifest.value_index(generate.logits)]
        rows, _, vocabulary = self.outputs[generate.logits].shape
        functions = self._program.device.functions
        return Sampler(self._driver, functions, generate.sampler, address, rows, vocabulary)

    def _execute(self, past: int, sampler: Sampler | None) -> None:
        """Run all steps, and those that choose tokens; wait."""
        self._driver.activate()
        self._set_sizes(past)
        chooses = sampler is not None
        if chooses not in self._graphs and self._runs[chooses] >= _RUNS_BEFORE_GRAPH:
            self._graphs[chooses] = self._record(sampler)
        if chooses in self._graphs:
            self._driver.launch_graph(self._graphs[chooses])
        else:
            self._enqueue(sampler)
        self._runs[chooses] += 1
        self._driver.synchronize()

    def _set_sizes(self, past: int) -> None:
        self._symbols[PAST] = past
        self._in.arrays[0][:, 0] = [each(self._symbols) for each in self._moving_sizes]

    def _upload(self, sampler: Sampler | None) -> list[Launch]:
        """Copy what the launches read; return them."""
        self._in.upload()
        if sampler is None:
            return self._launches
        sampler.taken.upload()
        return [*self._launches, *sampler.launches]

    def _download(self, sampler: Sampler | None) -> None:
        """Copy what is asked for: all outputs, or the chosen tokens alone."""
        (self._out if sampler is None else sampler.given).download()

    def _enqueue(self, sampler: Sampler | None) -> None:
        """Put everything on the stream."""
        for launch in self._upload(sampler):
            launch.enqueue(self._driver)
        self._download(sampler)

    def _record(self, sampler: Sampler | None) -> ctypes.c_void_p:
        """Make a graph of everything, in which launches wait only for what they need."""
        self._driver.begin_capture()
        try:
            launches = self._upload(sampler)
            if self._overlapping:
                self._record_line(launches)
            else:
                self._record_branches(launches)
            self._download(sampler)
        except BaseException:
            into = ctypes.byref(ctypes.c_void_p())
            self._driver.refused("cuStreamEndCapture", self._driver.stream, into)
            raise
        return self._driver.end_capture()

    def _record_line(self, launches: Sequence[Launch]) -> None:
        """Record launches that wait by themselves: each begins while the one in front ends."""
        order = [launch.access for launch in launches]
        for number, (launch, late) in enumerate(zip(launches, late_starts(order), strict=True)):
            launch.enqueue(self._driver, beside=number > 0, late=late)

    def _record_branches(self, launches: Sequence[Launch]) -> None:
        """Record launches that begin when those have ended that touch the same memory."""
        driver, nodes = self._driver, list[int]()
        order = [launch.access for launch in launches]
        first = driver.recorded()
        for launch, waits in zip(launches, dependencies(order), strict=True):
            driver.wait_for([nodes[number] for number in sorted(waits)] or first)
            launch.enqueue(driver)
            nodes += driver.recorded()
        driver.wait_for(nodes or first)

    def profile(self, past: int = 0) -> NDArray[np.float64]:
        """Run all steps like `run`, one by one, and return the seconds that each took."""
        self._driver.activate()
        self._set_sizes(past)
        self._in.upload()
        events = [self._driver.event() for _ in range(len(self._launches) + 1)]
        self._driver.record(events[0])
        for launch, event in zip(self._launches, events[1:], strict=True):
            launch.enqueue(self._driver)
            self._driver.record(event)
        self._out.download()
        self._driver.synchronize()
        times = [self._driver.seconds_between(a, b) for a, b in pairwise(events)]
        for event in events:
            self._driver.refused("cuEventDestroy_v2", event)
        return np.array(times)

    @property
    def steps(self) -> Sequence[Step]:
        """The steps that a run takes."""
        return [launch.step for launch in self._launches]

    def __del__(self) -> None:
        for graph in getattr(self, "_graphs", {}).values():
            self._driver.refused("cuGraphExecDestroy", graph)


@dataclass(frozen=True)
class LaunchWriter:
    """Puts the arguments of steps where the driver reads them.

    `addresses` are those of values; `moving` those of sizes that depend on how many tokens came
    before.
    """

    program: CudaProgram
    size: Callable[[Dim], int]
    addresses: Mapping[int, int]
    moving: Mapping[str, int]

    def launches(self, steps: Sequence[Step]) -> Iterator[Launch]:
        """Yield a launch for every step that has any programs to run."""
        for step in steps:
            assert isinstance(step, KernelStep)
            code = self.program.manifest.code[step.kernel]
            slots = [
                self.slot(step, argument, kind)
                for argument, kind in zip(step.args, code.parameters, strict=True)
            ]
            grid = tuple(self.size(dim) for dim in step.grid)
            if 0 not in grid:
                function = self.program.device.functions[step.kernel]
                yield Launch(step, function, grid, slots, self.access(step))

    def access(self, step: KernelStep) -> Access:
        """Return the memory of the values that a step reads and writes."""

        def spans(indices: Sequence[int], late: bool) -> tuple[Span, ...]:
            return tuple(self.span(i) for i in indices if (i in step.late) == late)

        values = self.program.manifest.values
        counted = [i for i in step.reads if values[i].kind == "weight" and TURNS in values[i].name]
        return Access(
            spans(step.reads, False), spans((*step.writes, *counted), False),
            spans(step.reads, True), spans((*step.writes, *counted), True),
        )  # fmt: skip

    def span(self, index: int) -> tuple[int, int]:
        """Return where a value lies."""
        value, start = self.program.manifest.values[index], self.addresses[index]
        return start, start + self.count(value.shape) * value.element.bytes

    def slot(self, step: KernelStep, argument: ValueArg | Scalar, kind: str) -> Any:
        """Return one argument as the driver takes it."""
        if isinstance(argument, ValueArg):
            return ctypes.c_uint64(self.address(step, argument))
        if kind == "pointer":
            return ctypes.c_uint64(self.moving[parse_expression(argument.symbol).text])
        return integer_slot(kind, self.size(argument.symbol), step)

    def address(self, step: KernelStep, argument: ValueArg) -> int:
        """Return where an array argument starts, within its value."""
        value = self.program.manifest.values[argument.value]
        offset = self.size(argument.offset)
        shape = value.shape if argument.shape is None else argument.shape
        needed, room = self.count(shape) + offset, self.count(value.shape)
        if needed > room:
            raise ArtifactError(
                f"{step.kernel} uses {needed} elements of value {value.name!r}, which has {room} "
                "in this call",
                origin=step.origin or None,
            )
        return self.addresses[argument.value] + offset * value.element.bytes

    def count(self, shape: Sequence[Dim]) -> int:
        """Multiply sizes."""
        return prod(self.size(dim) for dim in shape)


def layout(value: Value, shape: tuple[int, ...]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return how a value lies in memory."""
    return value.element.numpy, shape


def moving_sizes(steps: Sequence[Step]) -> list[str]:
    """List the sizes that depend on how many tokens came before."""
    found: dict[str, None] = {}
    for step in steps:
        for argument in step.args if isinstance(step, KernelStep) else ():
            if isinstance(argument, Scalar):
                size: Expression = parse_expression(argument.symbol)
                if PAST in size.symbols:
                    found[size.text] = None
    return list(found)


def integer_slot(kind: str, value: int, step: KernelStep) -> Any:
    """Return an integer argument. Raises ArtifactError where it has too many bits."""
    bits = 31 if kind == "i32" else 63
    if not -(1 << bits) <= value < 1 << bits:
        raise ArtifactError(f"{step.kernel} takes {kind}, and a size in this call is {value}")
    return ctypes.c_int32(value) if kind == "i32" else ctypes.c_int64(value)
