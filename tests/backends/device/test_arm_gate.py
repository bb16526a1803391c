"""What the inner loops of ARM kernels must look like, and the cycles that a scheduler's model gives
them: no ARM machine is needed, and none says how fast they are."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from functools import cache

import pytest

from qc.backends.tvm.build import compile_kernels
from qc.backends.tvm.linear.rule import linear_rule
from qc.ir.target import ARMS
from tests.backends.tvm.linear.cases import G32, Case, compile_cases, term
from tests.needs import needs

PRODUCTS = {"sdot": 16, "smmla": 32, "smlal": 8, "smull": 8, "smlal2": 8, "smull2": 8}
"""Products of one instruction."""

FORMATS = {
    "w4": "int4·g32·min·scale(uint8·row)·minimum(uint8·row)",
    **{text: text for text in ("int4·g32·min", "int8·g32", "int3·g32·min", "int2·g32·min")},
}
"""Formats by name: that of the recipe w4, and others."""
MACHINES = {"rpi5": "cortex-a76", "graviton3": "neoverse-v1"}


@cache
def assembly(machine: str) -> dict[str, list[str]]:
    """Return the lines of every kernel, by format."""
    target = ARMS[machine]
    cases = [Case(576, 576, (term(text),), G32) for text in FORMATS.values()]
    kernels = compile_cases(linear_rule, cases, target)
    named = {f"k{number}": kernel for number, kernel in enumerate(kernels)}
    text = compile_kernels(named, target).inspect_source("asm")
    found: dict[str, list[str]] = {name: [] for name in FORMATS}
    current: list[str] | None = None
    for line in text.splitlines():
        start = re.match(
            r"(?:__tvm_parallel_lambda|__tvm_ffi_k|k|[\w.]*compute_|\.?\w*lambda)\S*:", line
        )
        number = re.search(r"k(\d+)", line) if start else None
        if number:
            current = found[list(FORMATS)[int(number[1])]]
        if current is not None:
            current.append(line.split("//")[0].strip())
    return found


def loops_of(lines: list[str]) -> list[list[str]]:
    """Return the bodies of all loops without loops inside."""
    at = {line[:-1]: number for number, line in enumerate(lines) if line.startswith(".LBB")}
    spans = []
    for number, line in enumerate(lines):
        jump = re.match(r"(?:b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,|b)\s*(\.LBB\w+)$", line)
        if jump and at.get(jump[1], number) < number:
            spans.append((at[jump[1]], number))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[line for line in lines[start : end + 1] if line] for start, end in inner]


def count(loop: list[str], *names: str) -> int:
    """Count instructions."""
    return sum(line.split()[0] in names for line in loop if line)


def products_of(loop: list[str]) -> int:
    """Return how many codes a loop multiplies in one turn, for all rows of its tile."""
    return sum(count(loop, name) * products for name, products in PRODUCTS.items())


def product_loops(machine: str, format: str) -> list[list[str]]:
    """Return the loops that multiply integers."""
    found = [loop for loop in loops_of(assembly(machine)[format]) if products_of(loop) >= 128]
    assert found, f"no loop of {format} for {machine} multiplies integers"
    return found


@pytest.mark.fast_rules
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("machine", MACHINES)
def test_loops_multiply_load_and_spill_as_they_should(machine: str, format: str) -> None:
    target = ARMS[machine]
    loops = product_loops(machine, format)
    for loop in loops:
        assert [line for line in loop if re.match(r"(ldr|ldp|ldur)\s+q", line)], (
            "no load of 16 bytes"
        )
        if target.has("asimddp"):
            assert count(loop, "sdot", "smmla")
            assert not count(loop, "smull", "smlal", "mul", "madd")
            assert not [line for line in loop if "[sp" in line], "registers are spilled"
    if target.has("i8mm"):
        assert any(count(loop, "smmla") for loop in loops), "no tile of rows uses smmla"


@pytest.mark.fast_rules
@needs("llvm-mca")
def test_cycles_are_the_stored_ones(golden: Callable[[str, str], None]) -> None:
    """Cycles of one product by llvm-mca, of the loops of one row and of tiles."""
    version = subprocess.run(["llvm-mca", "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"version (\S+)", version.stdout)
    assert release
    lines = []
    for machine, cpu in MACHINES.items():
        for format in FORMATS:
            for loop in product_loops(machine, format):
                names = [name for name in PRODUCTS if count(loop, name)]
                cycles = cycles_of(loop, cpu) / products_of(loop)
                lines.append(
                    f"{machine:10} {cpu:12} {format:13} {'+'.join(names):12} "
                    f"{products_of(loop):5} products a turn, {cycles:.4f} cycles each"
                )
    golden(f"arm-cycles-llvm-{release[1].split('.')[0]}.txt", "\n".join(lines) + "\n")


def cycles_of(loop: list[str], cpu: str) -> float:
    """Ask llvm-mca for the cycles of one turn."""
    program = "\n".join(line for line in loop if not line.startswith("."))
    done = subprocess.run(
        ["llvm-mca", "-mtriple=aarch64-linux-gnu", f"-mcpu={cpu}", "-mattr=+dotprod,+i8mm",
         "-iterations=200", "-instruction-info=0", "-resource-pressure=0"],
        input=program, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert found, done.stderr
    return int(found[1]) / 200
