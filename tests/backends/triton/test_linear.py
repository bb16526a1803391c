"""GPU kernels of linears against float64 of the same stored weights, in Triton's interpreter and,
where there is one, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qc.backends.triton.kernel import Call
from tests.backends.triton.cases import Case
from tests.backends.triton.linear_worker import Interpreter
from tests.backends.triton.sweep import BUCKETS, SUMS, all_cases, examples
from tests.needs import needs

TOLERANCE = 2e-3
"""Relative Frobenius error: float16 rounds x, weights and results by 2^-11 at most each."""
QUICK = (*examples()[::9], *SUMS[:4], *BUCKETS[:10:3])


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    found = Interpreter()
    yield found
    found.stop()


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_sum_of_terms_is_right_in_the_interpreter(case: Case, interpreter: Interpreter) -> None:
    assert interpreter.error(case) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_every_format_is_right_in_the_interpreter(case: Case, interpreter: Interpreter) -> None:
    assert interpreter.error(case) <= TOLERANCE


@needs("cuda")
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_every_format_is_right_on_the_gpu(case: Case) -> None:
    def run(call: Call, values: Any, shape: tuple[int, int]) -> Tensor:
        from qc.backends.triton.compile import compile_launch
        from qc.backends.triton.jit import Loaded
        from qc.runtime.cuda.driver import find_driver

        driver = find_driver()
        result = torch.full(shape, float("nan"), dtype=torch.float16, device="cuda")
        cubin_of = lambda launch: compile_launch(launch, driver.capability)  # noqa: E731
        loaded = Loaded(call, values, {"rows": shape[0]}, result, driver, cubin_of)
        torch.cuda.synchronize()
        loaded.run()
        driver.synchronize()
        return result.cpu()

    assert case.error(run) <= TOLERANCE


def test_rows_that_are_wrong_are_found(interpreter: Interpreter) -> None:
    """The measure itself: without its scales, a weight is not what it was."""
    exact = Case("int4·g32", 64, 128, 3)
    assert interpreter.error(exact) > 1e-6  # float16 is not exact: zero would be no comparison
