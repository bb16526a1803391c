"""The toy language model as a GPU artifact, on a driver that keeps everything in this process."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from qc.runtime.manifest import (
    CUDA,
    GOLDEN,
    Binary,
    Code,
    GoldenCheck,
    KernelStep,
    Manifest,
    Scalar,
    ValueArg,
)
from qc.runtime.package import ArtifactWriter
from qc.runtime.safetensors_file import write_safetensors
from tests.runtime import toy

POINTERS = ("pointer",) * 3
PARAMETERS = {
    "embed": (*POINTERS, *("i32",) * 3),
    "append": (*POINTERS, *("i32",) * 5),
    "mix": (*POINTERS, *("i32",) * 5),
    "head": (*POINTERS, *("i32",) * 6),
}
"""The last says whether a kernel may begin early."""
SAMPLER = {"best": (*POINTERS, "i32"), "next": (*POINTERS, "pointer", "pointer", "i32")}


@cache
def stub_driver(name: str = "stub_cuda.c", soname: str = "libcuda.so.1", *options: str) -> Path:
    """Compile a driver, once."""
    path = Path(mkdtemp(prefix="qc-stub-")) / soname
    source = Path(__file__).with_name(name)
    command = [
        "cc", "-std=gnu11", "-Wall", "-Werror", "-O1", "-shared", "-fPIC", *options, str(source),
        f"-Wl,-soname,{soname}",
    ]  # fmt: skip  # what asks for it by name finds it once it is loaded
    subprocess.run([*command, "-o", str(path)], check=True)
    return path


def stub(path: Path | None = None) -> Any:
    """Return the driver's own side: what was launched, what is allocated."""
    library = ctypes.CDLL(str(path or stub_driver()))
    library.stub_log.restype = ctypes.c_char_p
    library.stub_live_blocks.restype = ctypes.c_long
    return library


def code(
    architectures: tuple[str, ...] = ("sm_90",), shared: int = 0, overlaps: bool = True
) -> dict[str, Code]:
    """Describe the kernels of the stub."""
    return {
        name: Code(
            name, 4, kinds,
            tuple(Binary(each, f"code/{each}/{name}.cubin", shared) for each in architectures),
            overlaps=overlaps,
        )
        for name, kinds in {**PARAMETERS, **SAMPLER}.items()
    }  # fmt: skip


def language_manifest(**changes: Any) -> Manifest:
    """Describe the toy language model as launches."""
    ids, weight, x, state, y, logits = (ValueArg(index) for index in range(6))
    past = Scalar("past")
    sizes = (Scalar("batch"), Scalar("seq"), Scalar("context"), Scalar(toy.WIDTH))
    keeps = (Scalar("batch"), Scalar("seq"), Scalar("keep"), Scalar(toy.WIDTH))
    tokens = (Scalar("batch * seq"), Scalar(toy.WIDTH))

    def call(kernel: str, *args: ValueArg | Scalar, reads: Any, writes: Any) -> KernelStep:
        grid = ("batch * seq", 1, 1) if kernel == "embed" else ("batch", 1, 1)
        passed = (*args, Scalar(0))
        return KernelStep(kernel, passed, reads, writes, origin=f"toy.{kernel}", grid=grid)

    return replace(
        toy.language_manifest(
            steps=(
                call("embed", ids, weight, x, *tokens, reads=(0, 1), writes=(2,)),
                call("append", x, state, past, *sizes, reads=(2, 3), writes=(3,)),
                call("mix", state, y, past, *sizes, reads=(3,), writes=(4,)),
                call("head", y, weight, logits, *keeps, Scalar(toy.VOCABULARY), reads=(4, 1),
                     writes=(5,)),
            ),
            executor=CUDA,
            code=code(),
            golden=(
                GoldenCheck((0,), {"batch": 1, "seq": 3}, {"0": "ids"}, 2, "rows", 1e-6),
            ),
        ),
        **changes,
    )  # fmt: skip


def choosing_manifest(**changes: Any) -> Manifest:
    """Describe the toy language model with kernels that choose tokens."""
    manifest = language_manifest(**changes)
    assert manifest.generate is not None
    return replace(manifest, generate=replace(manifest.generate, sampler=("best", "next")))


def write_artifact(path: Path, manifest: Manifest | None = None, wrong: bool = False) -> Path:
    """Write the artifact; with `wrong` the golden output is not what the kernel computes."""
    manifest = manifest or language_manifest()
    with ArtifactWriter(path) as writer:
        writer.add_weights({"model.table": toy.table()})
        for each in manifest.code.values():
            for binary in each.binaries:
                writer.add(binary.file, f"STUB {each.function}".encode())
        ids = np.array([[5, 0, 7]], np.int64)
        rows = toy.table()[ids] + (1.0 if wrong else 0.0)
        write_safetensors(writer.file(GOLDEN), {"ids": ids, "rows": rows.astype(np.float32)})
        writer.keep(GOLDEN)
        return writer.finish(manifest)
