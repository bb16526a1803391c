"""GPU kernels of linears against float64 of the same stored weights, in Triton's interpreter and,
where there is one, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qc.backends.triton.compile import compile_launch
from qc.backends.triton.kernel import Call
from tests.backends.triton.cases import Case, call_of, result_dtype
from tests.backends.triton.linear_worker import Interpreter
from tests.backends.triton.sweep import (
    AFFINE,
    AT_GATES,
    BUCKETS,
    FP4,
    FP8,
    KEPT,
    LOOKED,
    STREAMED,
    SUMS,
    WIDENED,
    all_cases,
    examples,
)
from tests.needs import needs

TOLERANCE = 2e-3
"""Relative Frobenius error: float16 rounds x, weights and results by 2^-11 at most each."""
BRAIN_TOLERANCE = 1e-2
"""bfloat16 rounds them by 2^-8."""
QUICK = (
    *examples()[::12],
    *SUMS[:4],
    SUMS[-1],
    STREAMED[0],
    *AT_GATES[:2],
    *LOOKED,
    *AFFINE,
    *FP8[::2],
    *FP4[::2],
    *WIDENED,
    *KEPT[:-1],
    *BUCKETS[:8:3],
)

BRAINS = (
    Case("int8·row", 48, 256, 3),
    Case("e4m3·row", 48, 256, 3),
    Case("signs2·g64", 48, 128),
    KEPT[1],
)
"""Codes that are unpacked to bfloat16 in another way than to float16."""


def in_bfloat16(case: Case) -> Case:
    """Return a case that is computed in bfloat16."""
    return replace(case, dtype="bf16")


PORTABLE = (
    *(
        replace(case, architecture="gfx942")
        for case in (SUMS[3], SUMS[2], *LOOKED[1:4], *AFFINE[1:3], *BRAINS)
    ),
    Case("int4·g128", 64, 512, 2, 256, architecture="gfx942"),
    replace(FP8[0], architecture="gfx942"),
    *(replace(case, architecture="gfx942") for case in (FP4[0], KEPT[0], KEPT[4])),
)
"""Codes that are unpacked without PTX, for GPUs of AMD's."""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    found = Interpreter()
    yield found
    found.stop()


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_sum_of_terms_is_right_in_the_interpreter(case: Case, interpreter: Interpreter) -> None:
    assert interpreter.error(case) <= TOLERANCE


@pytest.mark.parametrize("case", [in_bfloat16(case) for case in (*QUICK[::4], *BRAINS)], ids=str)
def test_a_sum_of_terms_is_right_in_bfloat16(case: Case, interpreter: Interpreter) -> None:
    error = interpreter.error(case)
    assert 1e-4 < error <= BRAIN_TOLERANCE  # as exact as float16, it would be float16


@pytest.mark.parametrize("case", PORTABLE[::2], ids=str)
def test_a_sum_of_terms_is_right_without_ptx(case: Case, interpreter: Interpreter) -> None:
    assert interpreter.error(case) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", [*PORTABLE[1::2], *map(in_bfloat16, PORTABLE)], ids=str)
def test_codes_are_right_without_ptx(case: Case, interpreter: Interpreter) -> None:
    assert interpreter.error(case) <= (BRAIN_TOLERANCE if case.dtype == "bf16" else TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*examples()[::3], *SUMS[::2]], ids=str)
def test_formats_compile_for_amd(case: Case) -> None:
    amd = replace(case, architecture="gfx942")
    call = call_of(amd.node(values=False), amd.target)
    for launch in {each for variant in call.variants for each in variant.launches}:
        assert "unpack(" not in launch.source.replace("portable.unpack(", "")
        assert compile_launch(launch, "gfx942").shared_bytes <= 65_536


@pytest.mark.slow
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_every_format_is_right_in_the_interpreter(case: Case, interpreter: Interpreter) -> None:
    assert interpreter.error(case) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", map(in_bfloat16, all_cases()), ids=str)
def test_every_format_is_right_in_bfloat16(case: Case, interpreter: Interpreter) -> None:
    assert interpreter.error(case) <= BRAIN_TOLERANCE


@needs("cuda")
@pytest.mark.parametrize("case", [*all_cases(), *map(in_bfloat16, all_cases())], ids=str)
def test_every_format_is_right_on_the_gpu(case: Case) -> None:
    def run(call: Call, values: Any, shape: tuple[int, int]) -> Tensor:
        from qc.backends.triton.jit import Loaded
        from qc.runtime.cuda.driver import find_driver

        driver = find_driver()
        result = torch.full(shape, float("nan"), dtype=result_dtype(call), device="cuda")
        cubin_of = lambda launch: compile_launch(launch, driver.capability)  # noqa: E731
        if any(each.multiplies_small_floats for v in call.variants for each in v.launches):
            needs_capability(driver.capability, 89)
        if any("fp4.more(" in each.source for v in call.variants for each in v.launches):
            needs_capability(driver.capability, 100)  # before Triton 3.9 nothing widens them
        loaded = Loaded(call, values, {"rows": shape[0]}, result, driver, cubin_of)
        torch.cuda.synchronize()
        loaded.run()
        driver.synchronize()
        return result.cpu()

    assert case.error(run) <= (BRAIN_TOLERANCE if case.dtype == "bf16" else TOLERANCE)


def needs_capability(here: int, least: int) -> None:
    """Skip where the GPU lacks the instructions."""
    if here < least:
        pytest.skip(f"the GPU here is sm_{here}; this needs sm_{least}")


LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory of a block. CUDA C++ Programming Guide 13, table of technical
specifications per compute capability."""


CASES = (*examples(), *SUMS, *WIDENED, *KEPT)
COMPILED = [*CASES, *map(in_bfloat16, CASES)]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", LIMITS)
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_every_format_compiles_for_every_architecture(case: Case, architecture: int) -> None:
    call = call_of(case.node(values=False), case.target)
    launches = {each for variant in call.variants for each in variant.launches}
    for launch in launches:
        cubin = compile_launch(launch, architecture)
        assert cubin.shared_bytes <= LIMITS[architecture], launch.rule


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [100, 120])
@pytest.mark.parametrize("case", [*FP4, *map(in_bfloat16, FP4)], ids=str)
def test_products_of_4_bits_compile(case: Case, architecture: int) -> None:
    call = call_of(case.node(values=False), replace(case, architecture="sm_100+sm_120").target)
    for launch in {each for variant in call.variants for each in variant.launches}:
        cubin = compile_launch(launch, architecture)
        assert cubin.shared_bytes <= LIMITS[architecture], launch.rule
        assert not cubin.spills or launch.function == "beside"  # with what is listed


def test_rows_that_are_wrong_are_found(interpreter: Interpreter) -> None:
    """The measure itself: without its scales, a weight is not what it was."""
    exact = Case("int4·g32", 64, 128, 3)
    assert interpreter.error(exact) > 1e-6  # float16 is not exact: zero would be no comparison
