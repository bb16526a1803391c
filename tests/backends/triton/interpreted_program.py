"""A whole GPU artifact in Triton's interpreter: its manifest, weights and generated sources, with
numpy for the memory of the device. `interpreted` must be imported before anything imports triton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from tests.backends.triton import interpreted  # before triton

# isort: split

import numpy as np
import torch
from numpy.typing import NDArray

from qc.backends.triton.emit import load_function
from qc.backends.triton.interpret import install
from qc.runtime.artifact import Artifact
from qc.runtime.executor import Binding, Executor, Program, StepList
from qc.runtime.expression import parse_expression
from qc.runtime.manifest import (
    PAST,
    Dim,
    GoldenCheck,
    KernelStep,
    Manifest,
    Step,
    ValueArg,
)
from qc.runtime.memory import aligned_bytes
from qc.runtime.session import as_float


class InterpretedProgram(Program):
    """What was loaded: generated functions in place of machine code."""

    def __init__(
        self, manifest: Manifest, sources: Mapping[str, str], weights: Mapping[str, NDArray[Any]]
    ) -> None:
        install()
        super().__init__(manifest, weights, None)
        self.functions = {
            name: load_function(sources[name], code.function)
            for name, code in manifest.code.items()
        }

    def artifact(self) -> Artifact:
        """Return what users hold; it has no folder."""
        return Artifact(Path(), self)

    def executor(self) -> InterpretedExecutor:
        return InterpretedExecutor(self)

    def make_listing(self, steps: Sequence[Step]) -> StepList:
        return StepList(self, steps)

    def launch(
        self, step: KernelStep, arrays: Mapping[int, NDArray[Any]], sizes: Mapping[str, int]
    ) -> None:
        """Run one step."""

        def size(dim: Dim) -> int:
            return parse_expression(dim)(sizes)

        arguments: list[Any] = []
        code = self.manifest.code[step.kernel]
        for argument, kind in zip(step.args, code.parameters, strict=True):
            if isinstance(argument, ValueArg):
                held = torch.from_numpy(arrays[argument.value].reshape(-1))
                brain = self.manifest.values[argument.value].dtype == "bf16"
                arguments.append(held.view(torch.bfloat16) if brain else held)
            elif kind == "pointer":
                arguments.append(torch.tensor([size(argument.symbol)], dtype=torch.int32))
            else:
                arguments.append(size(argument.symbol))
        grid = tuple(size(dim) for dim in step.grid)
        with np.errstate(all="ignore"):  # padding is computed and thrown away
            self.functions[step.kernel][grid](*arguments, **code.constants)


class InterpretedExecutor(Executor):
    program: InterpretedProgram

    def make_binding(self, listing: StepList, sizes: Mapping[str, int]) -> Binding:
        state = self._state.arrays if self._state is not None else []
        indices = [i for i, v in enumerate(self.program.manifest.values) if v.kind == "state"]
        held = dict(zip(indices, state, strict=True))
        return InterpretedBinding(self.program, listing, sizes, held)


class InterpretedBinding(Binding):
    """Steps for certain sizes; scratch memory starts as NaN, as a GPU's may."""

    def __init__(
        self, program: InterpretedProgram, listing: StepList, sizes: Mapping[str, int],
        state: Mapping[int, NDArray[Any]],
    ) -> None:  # fmt: skip
        self._program, self._chosen, self._sizes = program, listing.steps, dict(sizes)
        placement = listing.place(lambda dim: parse_expression(dim)(sizes))
        arena = aligned_bytes(placement.arena)
        arena[...] = 0xFF
        values = program.manifest.values
        self._held = {**program.weights, **state}
        for index, shape in placement.shapes.items():
            size, element = placement.bytes[index], values[index].element.numpy
            at = placement.offsets.get(index)
            raw = aligned_bytes(size) if at is None else arena[at : at + size]
            self._held[index] = raw.view(element).reshape(shape)
        self.inputs = {v.name: self._held[i] for i, v in enumerate(values) if v.kind == "input"}
        self.outputs = {v.name: self._held[i] for i, v in enumerate(values) if v.kind == "output"}

    def run(self, past: int = 0) -> None:
        for step in self._chosen:
            assert isinstance(step, KernelStep)
            self._program.launch(step, self._held, {**self._sizes, PAST: past})


def check_golden(
    program: InterpretedProgram, tensors: Mapping[str, NDArray[Any]], check: GoldenCheck
) -> float:
    """Run one golden check; return the relative error."""
    values = program.manifest.values
    steps = [program.manifest.steps[number] for number in check.steps]
    arrays: dict[int, NDArray[Any]] = dict(program.weights)
    for index in {i for step in steps for i in (*step.reads, *step.writes)} - arrays.keys():
        shape = [parse_expression(dim)(check.sizes) for dim in values[index].shape]
        raw = np.full(prod(shape) * values[index].element.bytes, 0xFF, np.uint8)
        arrays[index] = raw.view(values[index].element.numpy).reshape(shape)
    for key, name in check.inputs.items():
        arrays[int(key)][...] = tensors[name].reshape(arrays[int(key)].shape)
    for step in steps:
        assert isinstance(step, KernelStep)
        program.launch(step, arrays, check.sizes)
    dtype = values[check.result].dtype
    expected = as_float(tensors[check.expected], dtype)
    return interpreted.relative(as_float(arrays[check.result], dtype), torch.from_numpy(expected))
