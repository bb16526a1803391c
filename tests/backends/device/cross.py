"""Run kernels that were compiled for another machine, under QEMU: a module like TVM's own."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qc.backends.device.toolchain import RUNTIME, toolchain_for
from qc.backends.tvm.build import compile_kernels
from qc.backends.tvm.kernel import Kernel
from qc.ir.target import Target
from tests.needs import QEMU

SERVER = Path(__file__).parent / "kernel_server.c"
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}


def emulator(*options: str) -> list[str]:
    """Return the command that runs AArch64 programs with every instruction set."""
    program = next(found for found in map(shutil.which, QEMU) if found)
    return [program, "-cpu", "max", *options]


class CrossModule:
    """Kernels k0, k1, ... in a process of the other machine."""

    def __init__(self, kernels: Sequence[Kernel], target: Target) -> None:
        self.folder = tempfile.TemporaryDirectory()
        place = Path(self.folder.name)
        named = {f"k{number}": kernel for number, kernel in enumerate(kernels)}
        self.names = list(named)
        compile_kernels(named, target).write_to_file(str(place / "kernels.o"), "o")
        tools = toolchain_for(target.machine)
        table = place / "table.c"
        declared = [f"int __tvm_ffi_{n}(void *, const qc_any *, int32_t, qc_any *);" for n in named]
        entries = ", ".join(f"__tvm_ffi_{name}" for name in named)
        table.write_text(
            "\n".join(
                ['#include "qcrt.h"', *declared, f"const qc_kernel kernels[] = {{{entries}}};"]
            )
        )
        objects = [place / "kernels.o"]
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
