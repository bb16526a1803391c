"""Run every kernel once on stored inputs, and compare with what it must compute."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qc.errors import ArtifactError
from qc.runtime.cuda.executor import SLOT, CudaProgram, LaunchWriter, moving_sizes
from qc.runtime.cuda.memory import DeviceMemory
from qc.runtime.cuda.sampling import Sampler
from qc.runtime.executor import Program
from qc.runtime.expression import parse_expression
from qc.runtime.manifest import GOLDEN, Dim, Generate, GoldenCheck, KernelStep
from qc.runtime.safetensors_file import SafetensorsFile
from qc.runtime.sampling import Sampling
from qc.runtime.session import as_float
from qc.runtime.tables import CheckedKernel, Verification

__all__ = ["verify_program"]


def verify_program(program: Program, folder: Path) -> Verification:
    """Run all golden checks. Raises ArtifactError where there is no GPU or no data."""
    assert isinstance(program, CudaProgram)
    if GOLDEN not in program.manifest.files:
        raise ArtifactError(f"{folder} has golden checks and no {GOLDEN}")
    tensors = SafetensorsFile(folder / GOLDEN)
    program.device.driver.activate()
    checks = program.manifest.golden
    rows = [run_check(program, check, tensors) for check in checks]
    if program.manifest.generate is not None and program.manifest.generate.sampler:
        rows.append(check_sampler(program, program.manifest.generate))
    return Verification(program.device.driver.name, tuple(rows))


SAMPLED_ROWS = 8


def check_sampler(program: CudaProgram, generate: Generate) -> CheckedKernel:
    """Choose tokens from random logits, and compare with what is chosen here: all are equal."""
    driver, random = program.device.driver, np.random.default_rng(0)
    vocabulary = parse_expression(program.value(generate.logits).shape[-1])({})
    logits = (3 * random.standard_normal((SAMPLED_ROWS, vocabulary))).astype(np.float32)
    memory = DeviceMemory(driver, logits.nbytes)
    memory.write(logits)
    functions = program.device.functions
    sampler = Sampler(driver, functions, generate.sampler, memory.address, SAMPLED_ROWS, vocabulary)
    samplings = [Sampling(), Sampling(1.0), Sampling(0.7, top_k=40), Sampling(1.0, 200, 0.9)]
    wrong, alive = 0, [True] * SAMPLED_ROWS
    for sampling in samplings:
        sampler.settings[...] = sampling.settings(np.random.default_rng(1), alive)
        sampler.taken.upload()
        for launch in sampler.launches:
            launch.enqueue(driver)
        sampler.given.download()
        driver.synchronize()
        expected = sampling.choose_rows(logits, np.random.default_rng(1), alive, 0)
        wrong += int((sampler.chosen != np.array(expected)).sum())
    share = wrong / (SAMPLED_ROWS * len(samplings))
    name, sizes = " + ".join(generate.sampler), f"batch {SAMPLED_ROWS}"
    return CheckedKernel(name, sizes, share, 0.0, "sampling")


def run_check(
    program: CudaProgram, check: GoldenCheck, tensors: Mapping[str, NDArray[Any]]
) -> CheckedKernel:
    """Run the steps of one check."""
    driver, values = program.device.driver, program.manifest.values
    steps = [program.manifest.steps[number] for number in check.steps]
    names = [step.kernel for step in steps if isinstance(step, KernelStep)]

    def size(dim: Dim) -> int:
        return parse_expression(dim)(check.sizes)

    def tensor(name: str, index: int) -> NDArray[Any]:
        array, value = tensors[name], values[index]
        count = prod(size(dim) for dim in value.shape)
        if array.dtype != value.element.numpy or array.size != count:
            raise ArtifactError(
                f"{GOLDEN}: {name!r} is {array.dtype}{list(array.shape)}, the value "
                f"{value.name!r} {value.dtype} of {count} elements"
            )
        return array

    memory: dict[int, DeviceMemory] = {}
    for index in {i for step in steps for i in (*step.reads, *step.writes)}:
        if values[index].kind != "weight":
            count = prod(size(dim) for dim in values[index].shape)
            memory[index] = DeviceMemory(driver, count * values[index].element.bytes)
            memory[index].clear()
    driver.synchronize()
    for key, name in check.inputs.items():
        memory[int(key)].write(tensor(name, int(key)))
    moving = moving_sizes(steps)
    table = np.zeros((max(1, len(moving)), SLOT // 4), np.int32)
    table[: len(moving), 0] = [size(text) for text in moving]
    kept = DeviceMemory(driver, table.nbytes)
    kept.write(table)
    places = {text: kept.address + SLOT * number for number, text in enumerate(moving)}
    addresses = {**program.device.addresses, **{i: each.address for i, each in memory.items()}}
    for launch in LaunchWriter(program, size, addresses, places).launches(steps):
        launch.enqueue(driver)
    driver.synchronize()
    expected = tensor(check.expected, check.result)
    found = np.empty_like(expected)
    memory[check.result].read(found)
    shown = ", ".join(f"{name} {value}" for name, value in check.sizes.items())
    dtype = values[check.result].dtype
    error = relative_error(as_float(found, dtype), as_float(expected, dtype))
    return CheckedKernel(" + ".join(names), shown, error, check.tolerance, steps[-1].origin)


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return |found - expected| / |expected|, in float64."""
    wanted = expected.astype(np.float64)
    scale = float(np.linalg.norm(wanted.reshape(-1))) or 1.0
    return float(np.linalg.norm((found.astype(np.float64) - wanted).reshape(-1))) / scale
