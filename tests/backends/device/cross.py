"""Run kernels that were compiled for another machine, under QEMU: a module like TVM's own."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from tvm.tirx import get_tir_pipeline
from tvm.tirx.build import codegen_build

from qc.backends.device.toolchain import RUNTIME, toolchain_for
from qc.backends.tvm.build import UNNEEDED_PASSES, llvm_target
from qc.backends.tvm.kernel import Kernel
from qc.ir.target import Target
from tests.needs import QEMU

SERVER = Path(__file__).parent / "kernel_server.c"
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}


def emulator(*options: str) -> list[str]:
    """Return the command that runs AArch64 programs with every instruction set."""
    program = next(found for found in map(shutil.which, QEMU) if found)
    return [program, "-cpu", "max", *options]


def compile_for_each(kernels: Mapping[str, Kernel], targets: Sequence[Target]) -> list[Any]:
    """Compile the same kernels for several targets: what `compile_kernels` makes for each.

    TVM's passes take longer than LLVM, and targets that differ in features are one to them.
    """
    first = llvm_target(targets[0])
    functions = {
        name: kernel.function.with_attr("global_symbol", name) for name, kernel in kernels.items()
    }
    module = tvm.IRModule(functions).with_attr("system_lib_prefix", "qc_")
    passes, finish, _ = get_tir_pipeline("default")
    with tvm.transform.PassContext(disabled_pass=list(UNNEEDED_PASSES)):
        bound = tvm.tirx.transform.BindTarget(first.with_host(first))(module)
        lowered = finish()(passes(bound))
    found = []
    for target in map(llvm_target, targets):
        own = {name: f.with_attr("target", target) for name, f in lowered.functions.items()}
        found.append(codegen_build(tvm.IRModule(own, attrs=lowered.attrs), target))
    return found


class CrossModule:
    """Kernels k0, k1, ... in a process of the other machine, from modules that TVM compiled."""

    def __init__(self, names: Sequence[str], compiled: Sequence[Any], target: Target) -> None:
        self.folder = tempfile.TemporaryDirectory()
        place = Path(self.folder.name)
        self.names = list(names)
        objects = [place / f"kernels{number}.o" for number in range(len(compiled))]
        for module, path in zip(compiled, objects, strict=True):
            module.write_to_file(str(path), "o")
        tools = toolchain_for(target.machine)
        table = place / "table.c"
        declared = [f"int __tvm_ffi_{n}(void *, const qc_any *, int32_t, qc_any *);" for n in names]
        entries = ", ".join(f"__tvm_ffi_{name}" for name in names)
        table.write_text(
            "\n".join(
                ['#include "qcrt.h"', *declared, f"const qc_kernel kernels[] = {{{entries}}};"]
            )
        )
        for source in (table, SERVER, RUNTIME / "native" / "qcrt.c"):
            objects.append(place / f"{source.stem}.o")
            tools.compile(source, objects[-1], [RUNTIME / "native"], ())
        program = place / "server"
        tools.run(
            [*tools.compiler, "-static", *objects, "-o", program, "-lpthread", "-lm"],
            "link kernels",
        )
        self.process = subprocess.Popen(
            [*emulator("-E", "QC_NUM_THREADS=2"), str(program)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __getitem__(self, name: str) -> Callable[..., None]:
        number = self.names.index(name)
        return lambda *arguments: self.call(number, arguments)

    def call(self, number: int, arguments: Sequence[Any]) -> None:
        """Run a kernel; arrays that it writes are written here."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = [struct.pack("<2I", number, len(arguments))]
        views: list[torch.Tensor] = []
        for argument in arguments:
            if isinstance(argument, int):
                request.append(struct.pack("<4Iq", 0, 0, 64, 1, argument))
                continue
            view = torch.from_dlpack(argument)
            array = view.numpy()
            kind = CODES[array.dtype.kind]
            request.append(struct.pack("<4I", 1, kind, 8 * array.itemsize, array.ndim))
            request += [struct.pack(f"<{array.ndim}q", *array.shape), array.tobytes()]
            views.append(view)
        self.process.stdin.write(b"".join(request))
        self.process.stdin.flush()
        (failed,) = struct.unpack("<i", self.process.stdout.read(4))
        for view in views:
            raw = self.process.stdout.read(view.numel() * view.element_size())
            view.numpy()[...] = np.frombuffer(raw, view.numpy().dtype).reshape(view.shape)
        assert not failed, "the kernel failed; standard error says why"

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
        self.folder.cleanup()
