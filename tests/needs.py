"""What a test may need: `@needs("avx512")` skips it, saying why, on a machine without."""

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from real_model import MODEL

AVX512_FLAGS = {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}  # those the VNNI kernels use
AMX_FLAGS = {"amx_tile", "amx_int8"}
REQUEST_TILES = 158, 0x1023, 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
LLVM_MCA = 14  # Debian 12's
ARM_COMPILER = "aarch64-linux-gnu-gcc"
QEMU = ("qemu-aarch64", "qemu-aarch64-static")


def needs(*facts: str) -> pytest.MarkDecorator:
    """Mark a test or a class; conftest.py decides, when the test starts, whether it is skipped."""
    for fact in facts:
        if fact not in LACKS:
            raise ValueError(f"unknown fact {fact!r}; known are {', '.join(LACKS)}")
    return pytest.mark.needs(*facts)


@functools.cache
def find_lack(fact: str) -> str | None:
    """Say why `fact` does not hold here; None where it does."""
    return LACKS[fact]()


def _model() -> str | None:
    if (MODEL / "origin.json").is_file():
        return None
    return f"build/{MODEL.name} is not there; `make model` writes it"


def _cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _avx512() -> str | None:
    return _missing(AVX512_FLAGS)


def _missing(flags: set[str]) -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    missing = flags.difference(cpuinfo.read_text().split() if cpuinfo.is_file() else ())
    return f"the processor shows no {', '.join(sorted(missing))}" if missing else None


def _amx() -> str | None:
    """Ask Linux for tiles, too: tests that call kernels through TVM have no qc runtime to do it."""
    missing = _missing(AMX_FLAGS)
    if missing is None and ctypes.CDLL(None, use_errno=True).syscall(*REQUEST_TILES):
        return f"the system refuses AMX tiles: {os.strerror(ctypes.get_errno())}"
    return missing


def _qemu() -> str | None:
    return None if any(map(shutil.which, QEMU)) else f"no {QEMU[0]} on the path"


def _arm_compiler() -> str | None:
    return None if shutil.which(ARM_COMPILER) else f"no {ARM_COMPILER} on the path"


def _llvm_mca() -> str | None:
    """Its figures are stored for one version: others have other models of the same CPUs."""
    if shutil.which("llvm-mca") is None:
        return "no llvm-mca on the path"
    said = subprocess.run(["llvm-mca", "--version"], capture_output=True, text=True, check=False)
    known = f"LLVM version {LLVM_MCA}." in said.stdout
    return None if known else f"llvm-mca is not of LLVM {LLVM_MCA}"


def _diffusers() -> str | None:
    return None if importlib.util.find_spec("diffusers") else "diffusers is not installed"


LACKS: dict[str, Callable[[], str | None]] = {
    "model": _model,
    "cuda": _cuda,
    "avx512": _avx512,
    "amx": _amx,
    "qemu": _qemu,
    "llvm-mca": _llvm_mca,
    "arm compiler": _arm_compiler,
    "diffusers": _diffusers,
}
