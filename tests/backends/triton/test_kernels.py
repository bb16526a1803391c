"""Every kernel that is no linear, and whole models, in Triton's interpreter against the graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.triton.kernel_cases import CASES, HALVES, ROUNDED
from tests.tiny_llama import llama_folder

EXACT = 2e-6
"""Float32 all the way."""
HALVES_EXACT = 1e-3
"""Products of float16, sums of float32, results of float16."""
SLOW = pytest.mark.slow
FOUR_BITS = 2e-1
MODEL = 3e-3
"""About ten kernels, one after another, each with a result in float16: 8e-4 was measured."""


def interpret(*arguments: str) -> dict[str, float]:
    """Run the worker; RuntimeError with what it says where it fails."""
    command = [sys.executable, "-m", "tests.backends.triton.kernel_worker", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return interpret("kernels")


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_computes_what_its_body_means(errors: dict[str, float], name: str) -> None:
    assert errors[name] <= (HALVES_EXACT if name in HALVES else EXACT)


@pytest.mark.slow
def test_kernels_compute_what_their_bodies_mean_in_bfloat16() -> None:
    errors = interpret("kernels", "bf16")
    assert {name: error for name, error in errors.items() if not error <= 8 * HALVES_EXACT} == {}


def test_rows_that_are_rounded_are_the_bits_of_codes_that_are_widened() -> None:
    errors = interpret("rounding")
    assert errors.keys() == ROUNDED.keys()
    assert not any(errors.values())


def check_model(folder: Path, recipe: str, bound: float, *cache_and_dtype: str) -> None:
    found = interpret("model", recipe, str(folder), *cache_and_dtype)
    golden = {name: error for name, error in found.items() if name.startswith("golden")}
    assert len(golden) > 15
    assert {name: error for name, error in golden.items() if not error <= 1} == {}
    assert found["prompt"] <= bound
    assert found["steps"] <= bound


def test_a_llama_computes_what_its_graph_means(tmp_path_factory: pytest.TempPathFactory) -> None:
    check_model(llama_folder(tmp_path_factory.getbasetemp()), "w4a16", MODEL)


@pytest.mark.slow
def test_int8_activations_compute_what_the_graph_means(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    # A code on the other side of a border is off by one in 127: decision 008.
    check_model(llama_folder(tmp_path_factory.getbasetemp()), "w4", 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["int8", "e4m3"])
def test_caches_of_codes_compute_what_the_graph_means(
    tmp_path_factory: pytest.TempPathFactory, cache: str
) -> None:
    # A code on the other side of a border: 1/127 of a head's largest value, 1/16 of its own.
    bound = {"int8": 1e-2, "e4m3": 3e-2}[cache]
    check_model(llama_folder(tmp_path_factory.getbasetemp()), "w4a16", bound, cache)


@pytest.mark.slow
def test_a_llama_computes_in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> None:
    check_model(llama_folder(tmp_path_factory.getbasetemp()), "w4a16", 8 * MODEL, "bf16", "bf16")


@pytest.mark.parametrize("machine", ["cuda:sm_120", pytest.param("cuda:sm_90", marks=SLOW)])
def test_floats_of_4_bits_compute_what_the_graph_means(
    tmp_path_factory: pytest.TempPathFactory, machine: str
) -> None:
    # A code on the other side of a border is off by half of itself at most, or by all of it.
    folder = llama_folder(tmp_path_factory.getbasetemp(), 64, 192)
    check_model(folder, "fp4", FOUR_BITS, "f16", "f16", machine)
