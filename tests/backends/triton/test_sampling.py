"""Kernels that choose tokens, in Triton's interpreter, against `Sampling.choose`."""

from __future__ import annotations

import pytest

from qc.backends.triton.compile import compile_launch
from qc.backends.triton.sampling import sampler_launches
from qc.runtime.manifest_reader import SAMPLER_POINTERS
from tests.backends.triton.test_kernels import interpret


def test_the_same_tokens_are_chosen_as_here() -> None:
    assert {name: share for name, share in interpret("sampler").items() if share} == {}


def test_kernels_take_what_the_runtime_passes() -> None:
    for launch, pointers in zip(sampler_launches(49152), SAMPLER_POINTERS, strict=True):
        kinds = [parameter.type for parameter in launch.parameters]
        assert [kind.startswith("*") for kind in kinds] == [*[True] * pointers, False]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_they_compile(architecture: int) -> None:
    for launch in sampler_launches(128256):
        cubin = compile_launch(launch, architecture)
        assert cubin.shared_bytes <= 48 << 10
        assert cubin.spills == 0
