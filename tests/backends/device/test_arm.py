"""ARM kernels compute what torch computes, under QEMU, for every instruction set."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qc
from qc.backends.tvm.build import compile_kernels
from qc.backends.tvm.kernel import Kernel
from qc.backends.tvm.linear import rule
from qc.ir.target import ARMS, Target
from qc.ir.weights.catalog import example_formats
from tests.backends.device.cross import CrossModule, compile_for_each, emulator
from tests.backends.device.packages import package
from tests.backends.tvm.linear import test_bit_serial, test_int8_dot
from tests.backends.tvm.linear.cases import G32, Case, buffers, compile_cases, term
from tests.needs import needs
from tests.tiny_llama import llama_folder

pytestmark = [needs("qemu"), needs("arm compiler")]

SETS = ("arm64", "arm64-dotprod", "arm64-i8mm")
SIZES = ((33, 129), (48, 576), (7, 31), (127, 33))
ROWS = (1, 2, 5)
TOLERANCE = 1e-5
SHARES = 4
"""Parts of all formats: several processes can take them."""


@dataclass(frozen=True)
class Asked(Target):
    """A machine that keeps what rules ask of it."""

    questions: set[str] = field(default_factory=set, compare=False)

    def has(self, *features: str) -> bool:
        self.questions.update(features)
        return super().has(*features)


def kernels_of(cases: Sequence[Case], sets: Sequence[str]) -> dict[str, list[Kernel]]:
    """Return the kernels of all cases for every instruction set.

    Lowering takes longer than LLVM and QEMU together. So what is lowered for the first set without
    a question for what sets differ in is taken for all of them.
    """
    first, *others = (ARMS[name] for name in sets)
    differing = set[str]().union(*(first.features ^ other.features for other in others))
    assert all(first.vector_bytes == other.vector_bytes for other in others)
    found: dict[str, list[Kernel]] = {name: [] for name in sets}
    for case in cases:
        asked = Asked(**{each.name: getattr(first, each.name) for each in fields(first)})
        (kernel,) = compile_cases(rule.linear_rule, [case], asked)
        for name in sets:
            if name != sets[0] and asked.questions & differing:
                (kernel,) = compile_cases(rule.linear_rule, [case], ARMS[name])
            found[name].append(kernel)
    return found


def programs_of(kernels: Mapping[str, Sequence[Kernel]]) -> dict[str, CrossModule]:
    """Return a program for each set. What is one kernel to all sets is compiled together."""
    sets, count = list(kernels), len(next(iter(kernels.values())))
    every = {
        f"k{number}": {name: kernels[name][number] for name in sets} for number in range(count)
    }
    shared = {name for name, of in every.items() if len({id(each) for each in of.values()}) == 1}
    firsts = {name: every[name][sets[0]] for name in every if name in shared}
    modules: dict[str, list[Any]] = {name: [] for name in sets}
    if firsts:
        together = compile_for_each(firsts, [ARMS[name] for name in sets])
        for of, module in zip(modules.values(), together, strict=True):
            of.append(module)
    for name, of in modules.items():
        own = {each: kernel[name] for each, kernel in every.items() if each not in shared}
        if own:
            of.append(compile_kernels(own, ARMS[name]))
    return {name: CrossModule(list(every), of, ARMS[name]) for name, of in modules.items()}


def relative_error(
    kernel: Kernel, call: Callable[..., None], values: Sequence[Any], expected: Tensor
) -> float:
    """Return the relative error of one call."""
    result = torch.full(expected.shape, float("nan"))
    call(*buffers(kernel, values, result))
    error = float((result - expected).norm() / expected.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def assert_right(cases: Sequence[Case], sets: Sequence[str], rows: Sequence[int]) -> None:
    """Check all cases on every set; its kernels are in one program."""
    kernels = kernels_of(cases, sets)
    modules = programs_of(kernels)
    wrong = []
    for number, case in enumerate(cases):
        for values in map(case.values, rows):
            expected = case.expected(values)
            for name, module in modules.items():
                kernel = kernels[name][number]
                error = relative_error(kernel, module[f"k{number}"], values, expected)
                if not error <= TOLERANCE:
                    wrong.append(f"{case} on {name}, {len(expected)} rows: {error:.1e}")
    for module in modules.values():
        module.close()
    assert not wrong, wrong


def storable(first: bool = False) -> list[Case]:
    """Every format that the catalog knows, or the first of each class, in turns of sizes and of
    activations."""
    formats = [f for each in example_formats().values() for f in (each[:1] if first else each)]
    found = [
        Case(*SIZES[number % len(SIZES)], (format,), (None, G32)[number % 2])
        for number, format in enumerate(formats)
    ]
    return [c for c in found if c.formats[0].refusal((c.outer, c.inner)) is None]


@pytest.mark.fast_rules
@pytest.mark.parametrize("name", SETS)
def test_integer_products(name: str) -> None:
    """Sums of products are exact: what is left is the rounding of float32."""
    assert_right(test_int8_dot.cases()[::5], [name], ROWS)


@pytest.mark.slow
@pytest.mark.fast_rules
def test_lookups_in_tables_of_partial_sums() -> None:
    """Bit planes and ternary weights, by tbl."""
    cases = test_bit_serial.cases()[::5]
    kernels = compile_cases(rule.linear_rule, cases, ARMS["arm64"])
    assert {kernel.rule for kernel in kernels} == {"linear_bit_serial"}
    assert_right(cases, ["arm64"], (1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_all_integer_products(name: str) -> None:
    assert_right(test_int8_dot.cases(), [name], test_int8_dot.ROWS)
    assert_right(test_bit_serial.cases(), [name], ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_every_format(share: int) -> None:
    assert_right(storable()[share::SHARES], SETS, ROWS)


@pytest.mark.fast_rules
def test_what_depends_on_the_instruction_set_is_lowered_for_each() -> None:
    cases = [Case(32, 64, (term(text),), G32) for text in ("int4·g32", "e2m1·g32")]
    kernels = kernels_of(cases, SETS)
    integers, floats = zip(*kernels.values(), strict=True)
    assert len({kernel.function.script() for kernel in integers}) == len(SETS)
    assert len({id(kernel) for kernel in floats}) == 1


def test_kernels_compiled_for_all_sets_together_are_those_of_each(tmp_path: Path) -> None:
    (kernel,) = compile_cases(rule.linear_rule, [Case(32, 64, (term("e2m1·g32"),))], ARMS[SETS[0]])
    targets = [ARMS[name] for name in SETS]
    together = compile_for_each({"k0": kernel}, targets)
    alone = [compile_kernels({"k0": kernel}, target) for target in targets]
    found = []
    for number, module in enumerate([*together, *alone]):
        module.write_to_file(str(tmp_path / f"{number}.o"), "o")
        found.append((tmp_path / f"{number}.o").read_bytes())
    assert found[: len(SETS)] == found[len(SETS) :]


@pytest.mark.slow
def test_a_format_of_every_class() -> None:
    assert_right(storable(first=True), ["arm64-dotprod"], (1, 5))


def cross_package(base: Path, name: str) -> Path:
    return package(base, f"{name}-w4")


@pytest.mark.parametrize("name", ["arm64-dotprod"])
def test_a_package_generates_what_the_artifact_does(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    same_text(tmp_path_factory.getbasetemp(), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arm64", "arm64-i8mm", "rpi4", "graviton3"])
def test_packages_of_other_machines(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    same_text(tmp_path_factory.getbasetemp(), name)


def same_text(base: Path, name: str) -> None:
    """Compare greedy text with that of this machine's artifact."""
    place = cross_package(base, name)
    artifact = qc.compile(llama_folder(base), "cpu-w4")
    prompt = "The cat sat"
    command = [*emulator(), str(place / "runner"), str(place / "weights.qcw"), prompt, "-n", "24"]
    done = subprocess.run(command, capture_output=True, check=True)
    expected = "".join(artifact.stream_text(prompt, 24, temperature=0.0))
    assert done.stdout.decode() == expected + "\n"


def test_a_cpu_without_the_instructions_is_told_so(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    place = cross_package(tmp_path_factory.getbasetemp(), "arm64-dotprod")
    command = [
        emulator()[0],
        "-cpu",
        "cortex-a72",
        str(place / "runner"),
        str(place / "weights.qcw"),
        "a",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "this CPU has no asimddp" in done.stderr
