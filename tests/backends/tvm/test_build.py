"""Compiling and linking: what is written, and what is said where no compiler works."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from torch import nn

import qc
from qc.backends.stored import as_numpy
from qc.backends.tvm.build import c_compiler, llvm_target
from qc.errors import TargetError
from qc.ir.target import CPUS

MODEL = nn.Sequential(nn.Linear(24, 8), nn.Tanh()).eval()
EXAMPLE = (torch.zeros(3, 24),)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5),
        torch.randn(5, 3).T,
        torch.randn(4).half(),
        torch.arange(6, dtype=torch.uint8),
        torch.tensor(7),
        torch.tensor([True, False]),
    ],
)
def test_tensors_are_stored_as_they_are(tensor: torch.Tensor) -> None:
    array = as_numpy(tensor)
    assert array.flags.c_contiguous
    assert np.array_equal(array, tensor.numpy())


def test_bfloat16_is_stored_as_its_bits() -> None:
    tensor = torch.tensor([1.0, -2.5, 3e38]).bfloat16()
    array = as_numpy(tensor)
    assert array.dtype == np.uint16
    assert torch.equal(torch.from_numpy(array).view(torch.bfloat16), tensor)


def test_the_compiler_is_the_one_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "ccache gcc-9")
    assert c_compiler() == ["ccache", "gcc-9"]
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: name if name == "clang" else None)
    assert c_compiler() == ["clang"]


def compile_to(place: Path) -> None:
    qc.compile(MODEL, "cpu-f32", output=place, example_inputs=EXAMPLE)


def test_a_machine_without_compiler_is_told_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match=r"no C compiler is installed \(tried cc, gcc and clang"):
        compile_to(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_a_compiler_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(TargetError, match=compiler):
        compile_to(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_every_kernel_has_its_source_beside_it(tmp_path: Path) -> None:
    compile_to(tmp_path / "m")
    artifact = qc.load(tmp_path / "m", verify=True)
    kernels = {step.kernel for step in artifact.manifest.steps}
    assert kernels <= set(artifact.sources)
    for kernel in kernels:
        assert "@T.prim_func" in artifact.source(kernel)
    library = (tmp_path / "m" / "model.so").read_bytes()
    assert b"/tmp" not in library  # equal wherever it was compiled
    assert all(f"__tvm_ffi_{kernel}".encode() in library for kernel in kernels)


VECTOR_SETS = re.compile("avx|amx|sse|ssse|bmi|fma|f16c|lzcnt|movbe|popcnt|gfni|vaes|vpclmul")
SPELLED = {"bmi": "bmi1", "lzcnt": "abm", "sse": "sse3", "sse2": "sse3"}


@pytest.mark.parametrize("architecture", CPUS)
def test_a_target_asks_for_every_instruction_set_that_llvm_may_use(architecture: str) -> None:
    """A Cascade Lake has VNNI, but not the VBMI that LLVM uses for an Ice Lake."""
    target = CPUS[architecture]
    used = tvm.target.codegen.llvm_get_cpu_features(llvm_target(target))
    names = {SPELLED.get(each, each) for each in used if VECTOR_SETS.match(each)}
    plain = {re.sub("[-_.]", "", feature) for feature in target.features}
    assert {re.sub("[-_.]", "", name) for name in names} <= plain
