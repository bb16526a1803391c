"""Compile the kernels of a program and write the artifact."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
UNNEEDED_PASSES = (
    "s_tir.CompactBufferAllocation",  # shrinks buffers: the rules allocate what they need
    "s_tir.HoistIfThenElse",  # out of loops: the rules put them where they belong
    "s_tir.InjectPermutedLayout",  # of a GPU's shared memory
    "s_tir.InjectVirtualThread",  # which no rule has
)
"""Passes that find nothing to do in our kernels, and look for it at length: without them the same
machine code is made in two thirds of the time."""
CSE = "tirx.CommonSubexprElim"
"""Breaks kernels that choose between values, each with subexpressions of its own: TVM 0.27 reads a
common one in front of where it binds it. LLVM finds what is common there, too."""
WITHOUT_CHECKS = "tirx.disable_assert"
PARTS = 4
"""Modules that the kernels of a program are compiled in."""
NATIVE = Path(qc.runtime.__file__).parent / "native"


def llvm_target(target: Target) -> Any:
    """Return TVM's description of the machine."""
    described: dict[str, Any] = {"kind": "llvm", "mcpu": target.llvm_cpu}
    if target.machine != "x86_64":
        described |= {"mtriple": target.llvm_triple, "mattr": list(target.llvm_features)}
    return tvm.target.Target(described)


def compile_kernels(
    kernels: Mapping[str, Kernel],
    target: Target,
    disabled: Sequence[str] = UNNEEDED_PASSES,
    checked: bool = True,
) -> Any:
    """Compile all kernels to one TVM module, with their names as symbols.

    `checked`: kernels compare their arguments with what they were compiled for, in 5 KB of code
    each.
    """
    functions = {
        name: kernel.function.with_attr("global_symbol", name) for name, kernel in kernels.items()
    }
    module = tvm.IRModule(functions).with_attr("system_lib_prefix", "qc_")
    options = {} if checked else {WITHOUT_CHECKS: True}
    with tvm.transform.PassContext(disabled_pass=list(disabled), config=options):
        return tvm.compile(module, target=llvm_target(target)).mod


def chooses(source: str) -> bool:
    """Say whether a kernel chooses between values that are computed in several steps."""
    return "T.if_then_else(" in source and "T.Let(" in source


def compile_objects(
    kernels: Mapping[str, Kernel], target: Target, folder: Path, checked: bool = True
) -> list[Path]:
    """Compile kernels to object files, on all CPUs: LLVM works at a module in one thread."""

    def compile_part(number: int, names: list[str]) -> Path:
        path = folder / f"kernels{number}.o"
        part = {name: kernels[name] for name in names}
        disabled = [*UNNEEDED_PASSES, *([CSE] if names is apart else [])]
        compile_kernels(part, target, disabled, checked).write_to_file(str(path), "o")
        return path

    sources = {name: kernel.function.script() for name, kernel in kernels.items()}
    apart = [name for name, source in sources.items() if chooses(source)]
    parts = equal_parts({name: len(text) for name, text in sources.items() if name not in apart})
    parts += [apart] if apart else []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compile_part, range(len(parts)), parts))


def equal_parts(sizes: Mapping[str, int]) -> list[list[str]]:
    """Share names out, the largest first, so that the sums of sizes are about equal. The number of
    parts does not depend on the machine: neither does the library."""
    parts: list[list[str]] = [[] for _ in range(min(PARTS, len(sizes)))]
    totals = [0] * len(parts)
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = totals.index(min(totals))
        parts[least].append(name)
        totals[least] += sizes[name]
    return parts


def link_library(kernels: Mapping[str, Kernel], target: Target, path: Path) -> None:
    """Write model.so: the kernels and the native runtime, which is compiled meanwhile.

    TargetError where this machine has no C compiler, or the compiler fails.
    """
    flags = ["-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden"]
    with tempfile.TemporaryDirectory() as folder:
        runtime = Path(folder) / "runtime.o"
        source = ["-c", str(NATIVE / "qcrt.c"), "-o", str(runtime)]
        with running([*flags, *source]) as compiling:
            compiled = compile_objects(kernels, target, Path(folder))
            finish(compiling, "compile the runtime")
        objects: list[str | Path] = [
            "-shared",
            "-s",
            *compiled,
            runtime,
            "-o",
            path,
            "-lpthread",
            "-lm",
        ]
        with running(objects) as linking:
            finish(linking, "link the kernels")


@contextmanager
def running(arguments: Sequence[object]) -> Iterator[subprocess.Popen[str]]:
    """Start the C compiler; it does not outlive the block. TargetError where there is none."""
    command = [*c_compiler(), *map(str, arguments)]
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise TargetError(f"the C compiler {command[0]}: {error.strerror}") from None
    with process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[str], what: str) -> None:
    """Wait for the C compiler; TargetError where it fails."""
    _, messages = process.communicate()
    if process.returncode:
        name = str(process.args[0] if isinstance(process.args, list) else process.args)
        raise TargetError(f"{name} could not {what}: {last_line(messages)}")


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
    c_compiler()  # none is said before any work
    library = writer.file(LIBRARY)
    with ThreadPoolExecutor(1) as beside:  # LLVM and the compiler run without Python's lock
        linking = beside.submit(link_library, lowered.kernels, lowered.target, library)
        writer.add_weights(dict(tensor_sources(lowered, progress)))
        progress("compile kernels", 0.0)
        linking.result()
    writer.keep(LIBRARY)
    for name, kernel in lowered.kernels.items():
        writer.add(f"source/{name}.py", kernel.function.script().encode())
