"""ARM kernels compute what torch computes, under QEMU, for every instruction set."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import qc
from qc.backends.tvm.kernel import Kernel, KernelRule
from qc.backends.tvm.linear import rule
from qc.ir.target import ARMS, Target
from qc.ir.weights.catalog import example_formats
from tests.backends.device.cross import CrossModule, emulator
from tests.backends.device.packages import package
from tests.backends.tvm.linear import test_bit_serial, test_int8_dot
from tests.backends.tvm.linear.cases import G32, Case, buffers, compile_cases
from tests.needs import needs
from tests.tiny_llama import llama_folder

pytestmark = [needs("qemu"), needs("arm compiler")]

SETS = ("arm64", "arm64-dotprod", "arm64-i8mm")
SIZES = ((33, 129), (48, 576), (7, 31), (127, 33))
ROWS = (1, 2, 5)
TOLERANCE = 1e-5


def worst_errors(
    cases: Sequence[Case], target: Target, rows: Sequence[int], chosen: KernelRule
) -> Iterator[tuple[Case, float]]:
    """Yield the largest relative error of every case. All kernels are in one program."""
    kernels: list[Kernel] = compile_cases(chosen, cases, target)
    module = CrossModule(kernels, target)
    for number, (case, kernel) in enumerate(zip(cases, kernels, strict=True)):
        worst = 0.0
        for count in rows:
            values = case.values(count)
            expected = case.expected(values)
            result = torch.full((count, case.outer), float("nan"))
            module[f"k{number}"](*buffers(kernel, values, result))
            error = float((result - expected).norm() / expected.norm().clamp_min(1e-30))
            worst = max(worst, error if error == error else float("inf"))
        yield case, worst
    module.close()


def assert_right(cases: Sequence[Case], target: Target, rows: Sequence[int]) -> None:
    """Check all cases."""
    found = list(worst_errors(cases, target, rows, rule.linear_rule))
    wrong = [f"{case}: {error:.1e}" for case, error in found if not error <= TOLERANCE]
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
    assert_right(test_int8_dot.cases()[::5], ARMS[name], (1, 2, 5))


@pytest.mark.slow
@pytest.mark.fast_rules
def test_lookups_in_tables_of_partial_sums() -> None:
    """Bit planes and ternary weights, by tbl."""
    cases, target = test_bit_serial.cases()[::5], ARMS["arm64"]
    assert all(
        k.rule == "linear_bit_serial" for k in compile_cases(rule.linear_rule, cases, target)
    )
    assert_right(cases, target, (1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_all_integer_products(name: str) -> None:
    assert_right(test_int8_dot.cases(), ARMS[name], test_int8_dot.ROWS)
    assert_right(test_bit_serial.cases(), ARMS[name], ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_every_format(name: str) -> None:
    assert_right(storable(), ARMS[name], ROWS)


@pytest.mark.slow
def test_a_format_of_every_class() -> None:
    assert_right(storable(first=True), ARMS["arm64-dotprod"], (1, 5))


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
