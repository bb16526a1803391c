"""Run a program: bind it to sizes and memory once, then walk its steps with one native call.

    Program      what was loaded: manifest, weights, kernels. Immutable, shared by all threads.
    Listing      the steps that belong to a call of some kind, flattened to tables. Immutable.
    Binding      a listing for certain sizes, with every pointer in place.
    Executor     the state, the memory and the bindings of one session.

A binding is a table of arguments (TVMFFIAny), one of tensors (DLTensor) and one of steps, all as
native/qcrt.h lays them out. Between two tokens only what depends on "past" is rewritten.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qc.errors import ArtifactError, ContextLengthError, InputError
from qc.runtime.dtypes import DType
from qc.runtime.expression import Expression, parse_expression
from qc.runtime.library import Library
from qc.runtime.manifest import (
    BOUND_BY_EXECUTOR,
    CONTEXT,
    KEEP,
    PAST,
    Dim,
    KernelStep,
    Manifest,
    Scalar,
    Step,
    TorchStep,
    Value,
    ValueArg,
)
from qc.runtime.memory import Lifetime, StateMemory, aligned_bytes, plan_arena, round_up
from qc.runtime.torch_step import bind_torch_step

__all__ = ["Binding", "Executor", "Program"]

# The tables of native/qcrt.h.
_ANY = np.dtype([("type_index", "<i4"), ("zero", "<u4"), ("value", "<i8")])
_TENSOR = np.dtype(
    [
        ("data", "<u8"),
        ("device_type", "<i4"),
        ("device_id", "<i4"),
        ("ndim", "<i4"),
        ("dtype_code", "u1"),
        ("dtype_bits", "u1"),
        ("dtype_lanes", "<u2"),
        ("shape", "<u8"),
        ("strides", "<u8"),
        ("byte_offset", "<u8"),
    ]
)
_STEP = np.dtype([("function", "<u8"), ("args", "<u8"), ("nargs", "<i4"), ("zero", "<i4")])
_INTEGER, _TENSOR_POINTER, _CPU = 1, 7, 1

_KEPT_BINDINGS = 8
_CONTEXT_MULTIPLE = 64
"""Room for positions comes in this multiple, so that blocked layouts of the state divide evenly."""


class Program:
    """Hold what was loaded and never changes."""

    def __init__(
        self, manifest: Manifest, weights: Mapping[str, NDArray[Any]], library: Library | None
    ) -> None:
        self.manifest = manifest
        self.library = library
        self.weights = {
            index: _weight_array(value, weights)
            for index, value in enumerate(manifest.values)
            if value.kind == "weight"
        }
        self.kernels = {
            name: library.kernel_address(name)
            for name in {s.kernel for s in manifest.steps if isinstance(s, KernelStep)}
            if library is not None
        }
        self.has_state = any(value.kind == "state" for value in manifest.values)
        self._listings: dict[tuple[bool, ...], StepList] = {}

    def executor(self) -> Executor:
        """Return a new executor of this program, with no tokens in its state."""
        return Executor(self)

    def listing(self, sizes: Mapping[str, int]) -> StepList:
        """Return the steps that belong to a call of these sizes."""
        chosen = tuple(
            all(
                low <= parse_expression(size)(sizes) <= (2**62 if high is None else high)
                for size, (low, high) in step.when.items()
            )
            for step in self.manifest.steps
        )
        if chosen not in self._listings:
            steps = [s for s, use in zip(self.manifest.steps, chosen, strict=True) if use]
            self._listings[chosen] = self.make_listing(steps)
        return self._listings[chosen]

    def make_listing(self, steps: Sequence[Step]) -> StepList:
        """Prepare steps for every call that takes them."""
        return Listing(self, steps)

    def sizes_of(self, inputs: Mapping[str, NDArray[Any]], keep: int | None) -> dict[str, int]:
        """Find the symbols from the shapes of all inputs. Raises InputError."""
        sizes: dict[str, int] = {}
        shapes = {name: self.value(name).shape for name in self.manifest.inputs}
        for name, shape in shapes.items():
            for dim, size in zip(shape, inputs[name].shape, strict=False):
                expression = parse_expression(dim)
                if expression.is_symbol and expression.text not in BOUND_BY_EXECUTOR:
                    sizes.setdefault(expression.text, size)
        if keep is not None:
            sizes[KEEP] = keep
        else:
            sizes.setdefault(KEEP, sizes.get("seq", 1))
        for name, shape in shapes.items():
            given = inputs[name].shape
            expected = tuple(
                parse_expression(dim)(sizes)
                if parse_expression(dim).symbols <= sizes.keys()
                else None
                for dim in shape
            )
            if (
                len(given) != len(shape)
                or any(e not in (None, g) for e, g in zip(expected, given, strict=True))
                or 0 in given
            ):
                wanted = ", ".join(str(dim) for dim in shape)
                raise InputError(f"input {name!r} must have shape [{wanted}], not {list(given)}")
        return sizes

    @cached_property
    def _by_name(self) -> dict[str, Value]:
        return {value.name: value for value in self.manifest.values}

    def value(self, name: str) -> Value:
        """Return the value of this name."""
        return self._by_name[name]


def _weight_array(value: Value, weights: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Find the tensor of a weight value, check it, and align it if the file did not."""
    array = weights[value.tensor or value.name]
    shape = tuple(int(dim) for dim in value.shape)
    if array.dtype != value.element.numpy or array.size != prod(shape):
        raise ArtifactError(
            f"weight {value.name!r} is {value.dtype}{list(shape)} in the manifest and "
            f"{array.dtype}{list(array.shape)} in the weights file"
        )
    if array.ctypes.data % 64:
        copy = aligned_bytes(array.nbytes).view(array.dtype)
        copy[:] = array.reshape(-1)
        array = copy
    return array.reshape(shape)


@dataclass(frozen=True, slots=True)
class _TensorKey:
    """Identify one DLTensor: equal arguments of several steps share it."""

    value: int
    shape: tuple[Dim, ...]
    offset: Dim


class StepList:
    """Some steps of a program, and how long each scratch value is needed."""

    def __init__(self, program: Program, steps: Sequence[Step]) -> None:
        self.program = program
        self.steps = steps
        self.values = program.manifest.values
        self.lifetimes = self._find_lifetimes()

    def _find_lifetimes(self) -> dict[int, tuple[int, int]]:
        """Return the first and the last step that uses each scratch value."""
        spans: dict[int, tuple[int, int]] = {}
        for at, step in enumerate(self.steps):
            for index in step.reads:
                if self.values[index].kind == "scratch" and index not in spans:
                    raise ArtifactError(
                        f"step {at} reads {self.values[index].name!r} before any step writes it",
                        origin=step.origin,
                    )
            for index in (*step.reads, *step.writes):
                if self.values[index].kind == "scratch":
                    spans[index] = (spans.get(index, (at, at))[0], at)
        return spans

    def place(self, size: Callable[[Dim], int]) -> Placement:
        """Give every scratch value its place in one arena."""
        shapes = {
            index: tuple(size(dim) for dim in value.shape)
            for index, value in enumerate(self.values)
            if value.kind in ("input", "output") or index in self.lifetimes
        }
        sizes = {
            index: prod(shape) * self.values[index].element.bytes for index, shape in shapes.items()
        }
        planned = list(self.lifetimes.items())
        offsets, total = plan_arena(
            [Lifetime(first, last, sizes[index]) for index, (first, last) in planned]
        )
        places = {index: offset for (index, _), offset in zip(planned, offsets, strict=True)}
        return Placement(shapes, sizes, places, total)


@dataclass(frozen=True)
class Placement:
    """The shapes and bytes of what a call uses, by value; where scratch lies in the arena."""

    shapes: Mapping[int, tuple[int, ...]]
    bytes: Mapping[int, int]
    offsets: Mapping[int, int]
    arena: int


class Listing(StepList):
    """Flatten some steps of a program into tables that hold for all sizes."""

    def __init__(self, program: Program, steps: Sequence[Step]) -> None:
        super().__init__(program, steps)
        keys: dict[_TensorKey, int] = {}
        scalars: dict[str, list[int]] = {}
        types: list[int] = []
        tensor_of: list[int] = []
        counts: list[int] = []
        for step in steps:
            args = step.args if isinstance(step, KernelStep) else ()
            counts.append(len(args))
            for arg in args:
                if isinstance(arg, Scalar):
                    scalars.setdefault(parse_expression(arg.symbol).text, []).append(len(types))
                    types.append(_INTEGER)
                    tensor_of.append(0)
                else:
                    types.append(_TENSOR_POINTER)
                    tensor_of.append(keys.setdefault(self._key(arg), len(keys)))
        self.tensors = list(keys)
        self.types = np.array(types, np.int32)
        self.tensor_of = np.array(tensor_of, np.int64)
        self.counts = np.array(counts, np.int32)
        self.first_args = np.array([0, *accumulate(counts)][:-1], np.int64)
        self.functions = np.array(
            [program.kernels[s.kernel] if isinstance(s, KernelStep) else 0 for s in steps],
            np.uint64,
        )
        self.scalars = [(parse_expression(text), np.array(at)) for text, at in scalars.items()]

    def _key(self, arg: ValueArg) -> _TensorKey:
        shape = self.values[arg.value].shape if arg.shape is None else arg.shape
        return _TensorKey(arg.value, shape, arg.offset)

    def segments(self) -> Iterator[tuple[int, int, TorchStep | None]]:
        """Yield runs of kernels (start, end, None) and single torch steps (start, end, step)."""
        start = 0
        for at, step in enumerate(self.steps):
            if isinstance(step, TorchStep):
                if start < at:
                    yield start, at, None
                yield at, at + 1, step
                start = at + 1
        if start < len(self.steps):
            yield start, len(self.steps), None


class Binding:
    """Hold a listing for certain sizes, ready to run.

    `inputs` and `outputs` are arrays by name: fill the former, run, read the latter (they are
    overwritten by the next run). `arena_bytes` is the memory that all scratch values share.
    """

    def __init__(
        self,
        listing: Listing,
        sizes: Mapping[str, int],
        state: Mapping[int, NDArray[Any]],
        arena: Callable[[int], NDArray[np.uint8]],
    ) -> None:
        self._listing = listing
        self._library = listing.program.library
        self._symbols = dict(sizes) | {PAST: 0}
        self._memo: dict[Dim, int] = {}
        self._state = state
        self._place_values(arena)
        self._fill_tensors()
        self._fill_args()
        self._segments = [
            self._bind_segment(start, end, torch) for start, end, torch in listing.segments()
        ]

    def _size(self, dim: Dim) -> int:
        """Evaluate a size once; negative ones are refused."""
        if type(dim) is int:
            return dim
        if dim not in self._memo:
            self._memo[dim] = parse_expression(dim)(self._symbols)
            if self._memo[dim] < 0:
                raise ArtifactError(f'the size "{dim}" is {self._memo[dim]} in this call')
        return self._memo[dim]

    def _place_values(self, arena: Callable[[int], NDArray[np.uint8]]) -> None:
        """Give every value that is used its array."""
        values = self._listing.values
        placement = self._listing.place(self._size)
        self.arena_bytes = placement.arena
        memory = arena(placement.arena)
        raw = {
            index: memory[offset : offset + placement.bytes[index]]
            for index, offset in placement.offsets.items()
        }
        raw |= {
            index: aligned_bytes(size)
            for index, size in placement.bytes.items()
            if index not in raw
        }
        self._arrays = {
            index: raw[index].view(values[index].element.numpy).reshape(shape)
            for index, shape in placement.shapes.items()
        }
        self._arrays |= self._listing.program.weights
        self._arrays |= self._state
        self.inputs = {v.name: self._arrays[i] for i, v in enumerate(values) if v.kind == "input"}
        self.outputs = {v.name: self._arrays[i] for i, v in enumerate(values) if v.kind == "output"}

    def _fill_tensors(self) -> None:
        """Build the table of DLTensors, with their shapes in one pool behind it."""
        keys, values = self._listing.tensors, self._listing.values
        table = np.zeros(len(keys), _TENSOR)
        shapes = [tuple(self._size(dim) for dim in key.shape) for key in keys]
        elements = [values[key.value].element for key in keys]
        starts = [0, *accumulate(len(shape) for shape in shapes)]
        self._shape_pool = np.array([size for shape in shapes for size in shape] or [0], np.int64)
        address = {index: array.ctypes.data for index, array in self._arrays.items()}
        data: list[int] = []
        moving: dict[str, list[tuple[int, int]]] = {}  # offset -> (row, greatest offset allowed)
        for row, (key, shape) in enumerate(zip(keys, shapes, strict=True)):
            data.append(address[key.value])
            room = self._arrays[key.value].size - prod(shape)
            offset = parse_expression(key.offset)
            if PAST in offset.symbols:
                moving.setdefault(offset.text, []).append((row, room))
                continue
            at = offset(self._symbols)
            if not 0 <= at <= room:
                raise ArtifactError(
                    f"a step uses elements {at}..{at + prod(shape)} of value "
                    f"{values[key.value].name!r}, which has {room + prod(shape)} in this call"
                )
            data[row] += at * elements[row].bytes
        table["data"] = data
        table["device_type"] = _CPU
        table["ndim"] = [len(shape) for shape in shapes]
        table["dtype_code"] = [element.dlpack_code for element in elements]
        table["dtype_bits"] = [8 * element.bytes for element in elements]
        table["dtype_lanes"] = 1
        table["shape"] = self._shape_pool.ctypes.data + 8 * np.array(starts[:-1], np.int64)
        self._tensors = table
        self._data = table["data"]
        self._moving = [
            (
                parse_expression(text),
                np.array([row for row, _ in rows]),
                np.array([data[row] for row, _ in rows], np.uint64),
                np.array([elements[row].bytes for row, _ in rows], np.uint64),
                min(room for _, room in rows),
            )
            for text, rows in moving.items()
        ]

    def _fill_args(self) -> None:
        """Build the tables of arguments and of steps."""
        listing = self._listing
        args = np.zeros(max(len(listing.types), 1), _ANY)
        args["type_index"][: len(listing.types)] = listing.types
        tensors = np.flatnonzero(listing.types == _TENSOR_POINTER)
        args["value"][tensors] = (
            self._tensors.ctypes.data + _TENSOR.itemsize * listing.tensor_of[tensors]
        )
        self._args = args
        self._arg_values = args["value"]
        self._moving_scalars: list[tuple[Expression, NDArray[np.int64]]] = []
        for expression, rows in listing.scalars:
            if PAST in expression.symbols:
                self._moving_scalars.append((expression, rows))
            else:
                self._arg_values[rows] = expression(self._symbols)
        steps = np.zeros(len(listing.steps), _STEP)
        steps["function"] = listing.functions
        steps["args"] = args.ctypes.data + _ANY.itemsize * listing.first_args
        steps["nargs"] = listing.counts
        self._steps = steps

    def _bind_segment(
        self, start: int, end: int, torch: TorchStep | None
    ) -> tuple[int, int, int, Callable[[Mapping[str, int]], None] | None]:
        address = self._steps.ctypes.data + _STEP.itemsize * start
        if torch is None:
            return start, end, address, None
        run = bind_torch_step(torch, self._listing.values, self._arrays.__getitem__, self._symbols)
        return start, end, address, run

    def _set_past(self, past: int) -> None:
        symbols = self._symbols
        symbols[PAST] = past
        for expression, rows in self._moving_scalars:
            self._arg_values[rows] = expression(symbols)
        for expression, rows, base, size, room in self._moving:
            offset = expression(symbols)
            if not 0 <= offset <= room:
                raise ArtifactError(
                    f'the offset "{expression.text}" is {offset}, room is for {room}'
                )
            self._data[rows] = base + size * np.uint64(offset)

    def run(self, past: int = 0) -> None:
        """Run all steps with `past` tokens in the state. Raises ArtifactError if one fails."""
        self._set_past(past)
        for start, end, address, torch in self._segments:
            if torch is not None:
                torch(self._symbols)
            elif self._library is not None:
                failed = self._library.run(address, end - start)
                if failed >= 0:
                    self._fail(start + failed)

    @property
    def can_choose(self) -> bool:
        """Say whether `choose` works: tokens are chosen where the logits are."""
        return False

    def choose(self, settings: NDArray[np.int32], past: int) -> list[int]:
        """Run all steps like `run` and return a token for each row of logits, chosen as
        `Sampling.settings` says; -1 where logits are no numbers. `outputs` do not hold then."""
        raise NotImplementedError

    def profile(self, past: int = 0) -> NDArray[np.float64]:
        """Run all steps like `run` and return the seconds that each took."""
        self._set_past(past)
        seconds = np.zeros(len(self._listing.steps))
        for start, end, address, torch in self._segments:
            if torch is not None:
                begin = perf_counter()
                torch(self._symbols)
                seconds[start] = perf_counter() - begin
            elif self._library is not None:
                into = seconds.ctypes.data + 8 * start
                failed = self._library.profile(address, end - start, into)
                if failed >= 0:
                    self._fail(start + failed)
        return seconds

    @property
    def steps(self) -> Sequence[Step]:
        """The steps that a run takes."""
        return self._listing.steps

    def _fail(self, at: int) -> None:
        step = self._listing.steps[at]
        name = step.kernel if isinstance(step, KernelStep) else step.torch
        reason = self._library.last_error() if self._library is not None else ""
        raise ArtifactError(f"kernel {name!r} failed: {reason}", origin=step.origin or None)


class Executor:
    """Run a program with its own memory and state. One call at a time: `lock` is the caller's."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.lock = threading.RLock()
        self.past = 0
        self._state: StateMemory | None = None
        self._batch = 0
        self.capacity = 0
        self._bindings: OrderedDict[tuple[tuple[str, int], ...], Binding] = OrderedDict()
        self._arena = aligned_bytes(0)

    def reserve(self, batch: int, positions: int) -> None:
        """Make room in the state for `positions` tokens, keeping what it holds.

        Raises ContextLengthError. A batch other than before needs an empty state.
        """
        program = self.program
        limit = program.manifest.context_length
        if limit is not None and positions > limit:
            raise ContextLengthError(
                f"{positions} tokens are needed, but the context of this model holds {limit}"
            )
        if not program.has_state:
            return
        if batch == self._batch and positions <= self.capacity:
            return
        if batch != self._batch and self.past:
            raise InputError(f"this session has {self._batch} rows; {batch} came")
        capacity = max(positions, 2 * self.capacity if batch == self._batch else 0)
        capacity = round_up(min(capacity, limit or capacity), _CONTEXT_MULTIPLE)
        symbols = {"batch": batch, CONTEXT: capacity}
        state = self.make_state(
            [
                (value.element, tuple(parse_expression(dim)(symbols) for dim in value.shape))
                for value in program.manifest.values
                if value.kind == "state"
            ]
        )
        if self.past and self._state is not None:
            state.copy_from(self._state)
        self._state, self._batch, self.capacity = state, batch, capacity
        self._bindings.clear()

    def reset(self) -> None:
        """Forget all tokens; the room stays reserved."""
        self.past = 0
        if self._state is not None:
            self._state.clear()

    def bind(self, sizes: Mapping[str, int]) -> Binding:
        """Return the binding for these sizes, made now or before."""
        key = tuple(sizes.items())
        binding = self._bindings.get(key)
        if binding is not None:
            self._bindings.move_to_end(key)
            return binding
        binding = self.make_binding(self.program.listing(sizes), sizes)
        self._bindings[key] = binding
        if len(self._bindings) > _KEPT_BINDINGS:
            self._bindings.popitem(last=False)
        return binding

    def make_state(self, layout: Sequence[tuple[DType, tuple[int, ...]]]) -> StateMemory:
        """Return zeros for the state."""
        return StateMemory(layout)

    def make_binding(self, listing: StepList, sizes: Mapping[str, int]) -> Binding:
        """Return a listing with every pointer in place."""
        assert isinstance(listing, Listing)
        indices = [i for i, v in enumerate(self.program.manifest.values) if v.kind == "state"]
        arrays = self._state.arrays if self._state is not None else []
        return Binding(listing, sizes, dict(zip(indices, arrays, strict=True)), self._get_arena)

    def _get_arena(self, size: int) -> NDArray[np.uint8]:
        """Return memory that all bindings share; one that was too small lives with its bindings."""
        if size > self._arena.size:
            self._arena = aligned_bytes(size)
        return self._arena

    def run(self, inputs: Mapping[str, NDArray[Any]], keep: int | None = None) -> Binding:
        """Run one call after the tokens in the state; return the binding, whose outputs hold.

        `inputs` has an array of the right dtype for every input. Raises InputError for shapes,
        ContextLengthError for too many tokens.
        """
        sizes = self.program.sizes_of(inputs, keep)
        tokens = sizes.get("seq", 0)
        self.reserve(sizes.get("batch", 1), self.past + tokens)
        if self.program.has_state:
            sizes[CONTEXT] = self.capacity
        binding = self.bind(sizes)
        for name, array in binding.inputs.items():
            array[...] = inputs[name]
        binding.run(self.past)
        if self.program.has_state:
            self.past += tokens
        return binding
