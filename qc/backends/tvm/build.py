"""Compile the kernels of a program and write the artifact."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tvm

import qc.runtime
from qc.backends.lowering import Lowered
from qc.backends.stored import tensor_sources
from qc.backends.tvm.kernel import Kernel
from qc.errors import TargetError
from qc.ir.target import Target
from qc.runtime.manifest import LIBRARY
from qc.runtime.package import ArtifactWriter

Progress = Callable[[str, float], None]
UNNEEDED_PASSES = ["s_tir.CompactBufferAllocation"]
"""Shrinks buffers to what a schedule leaves of them. The rules allocate what they need, and the
pass took a fifth of the compile time."""
NATIVE = Path(qc.runtime.__file__).parent / "native"


def llvm_target(target: Target) -> Any:
    """Return TVM's description of the machine."""
    return tvm.target.Target({"kind": "llvm", "mcpu": target.llvm_cpu})


def compile_kernels(kernels: Mapping[str, Kernel], target: Target) -> Any:
    """Compile all kernels to one TVM module, with their names as symbols."""
    functions = {
        name: kernel.function.with_attr("global_symbol", name) for name, kernel in kernels.items()
    }
    module = tvm.IRModule(functions).with_attr("system_lib_prefix", "qc_")
    with tvm.transform.PassContext(disabled_pass=UNNEEDED_PASSES):
        return tvm.compile(module, target=llvm_target(target)).mod


def link_library(kernels: Mapping[str, Kernel], target: Target, path: Path) -> None:
    """Write model.so: the kernels and the native runtime.

    TargetError where this machine has no C compiler, or the compiler fails.
    """
    module = compile_kernels(kernels, target)
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "kernels.o"
        module.write_to_file(str(compiled), "o")
        flags = ["-std=gnu11", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-s"]
        sources = [str(compiled), str(NATIVE / "qcrt.c")]
        command = [*c_compiler(), *flags, *sources, "-o", str(path), "-lpthread", "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise TargetError(f"the C compiler {command[0]}: {error.strerror}") from None
        if done.returncode:
            raise TargetError(f"{command[0]} could not link the kernels: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """Return the last line with content: what a linker says it failed of."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it says nothing")


def c_compiler() -> list[str]:
    """Find the C compiler: $CC, cc, gcc or clang."""
    named = os.environ.get("CC", "").split()
    if named:
        return named
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise TargetError("no C compiler is installed (tried cc, gcc and clang); building needs one")


def write_program(lowered: Lowered[Kernel], writer: ArtifactWriter, progress: Progress) -> None:
    """Put the weights, the library and the kernels' sources into an artifact."""
    progress("compile kernels", 0.0)
    library = writer.file(LIBRARY)
    link_library(lowered.kernels, lowered.target, library)
    writer.keep(LIBRARY)
    for name, kernel in lowered.kernels.items():
        writer.add(f"source/{name}.py", kernel.function.script().encode())
    writer.add_weights(dict(tensor_sources(lowered, progress)))
