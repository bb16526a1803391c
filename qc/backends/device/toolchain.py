"""The C compilers and binary tools for each architecture, and what they make of the sources."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import qc.runtime
from qc.backends.device import bionic
from qc.backends.tvm.build import c_compiler, last_line
from qc.errors import TargetError

RUNTIME = Path(qc.runtime.__file__).parent
DEVICE = RUNTIME / "device"
SOURCES = (
    RUNTIME / "native" / "qcrt.c",
    *(DEVICE / f"{name}.c" for name in
      ("model", "weights", "choosing", "text", "patterns", "composing", "merging",
       "processor")),
)  # fmt: skip
ON_CPU = (*SOURCES, DEVICE / "native_session.c")
ON_GPU = (*SOURCES, DEVICE / "cuda_session.c", DEVICE / "cuda_driver.c")
HEADER = DEVICE / "qc_model.h"

LIBRARY, ARCHIVE, RUNNER = "libmodel.so", "libmodel.a", "runner"

FLAGS = (
    "-std=gnu11", "-fPIC", "-fvisibility=hidden",
    "-ffunction-sections", "-fdata-sections", "-fno-asynchronous-unwind-tables", "-Wall", "-Wextra",
)  # fmt: skip
FAST, SMALL = ("-O2", "-ftree-vectorize"), ("-Os",)
HOT = ("qcrt", "weights", "choosing")
"""Sources compiled for speed: threads, the sum over all weights, the search in the logits."""
CROSS = {"aarch64": "aarch64-linux-gnu-"}
"""Prefixes of Debian's cross compilers."""
PACKAGES = {"aarch64": "gcc-aarch64-linux-gnu"}
EXPORTED = "qcm_*"
LINKING = {"aarch64": ("-Wl,-z,norelro",), "x86_64": ("-Wl,-z,noseparate-code",)}
"""Pages of ARM may have 64 KB: making the few relocated addresses read-only later would put up to
so many zeros into the file in front of them. On x86, a page of its own for tables that are no code
would do the same."""
UNWINDING = ".eh_frame"
"""How to walk up the stack, which LLVM writes for every kernel: nothing in C throws."""


@dataclass(frozen=True)
class Toolchain:
    """The tools for one architecture. TargetError where one is missing or fails."""

    compiler: tuple[str, ...]
    prefix: str
    linking: tuple[str, ...] = ()
    android: bool = False

    def run(self, command: Sequence[object], what: str) -> None:
        """Run a tool."""
        words = [str(word) for word in command]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError as error:
            raise TargetError(f"{words[0]}: {error.strerror}") from None
        if done.returncode:
            raise TargetError(f"{words[0]} could not {what}: {last_line(done.stderr)}")

    def compile(
        self, source: Path, to: Path, includes: Sequence[Path], more: Sequence[str]
    ) -> None:
        """Compile one C file. Paths of this machine do not get into what is made."""
        where = [f"-I{folder}" for folder in includes]
        speed = FAST if source.stem in HOT else SMALL
        hidden = [f"-ffile-prefix-map={folder}/=" for folder in (source.parent, *includes)]
        system = bionic.COMPILING if self.android else ()
        command = [
            *self.compiler,
            *FLAGS,
            *speed,
            *system,
            *more,
            *hidden,
            *where,
            "-c",
            source,
            "-o",
            to,
        ]
        self.run(command, f"compile {source.name}")

    def bionic_adapter(self, place: Path) -> Path:
        """Compile what stands between glibc's headers and Android's libc."""
        adapter = place / "bionic.o"
        self.compile(DEVICE / "bionic.c", adapter, (), ())
        return adapter

    def bionic_libraries(self, place: Path) -> list[object]:
        """Make stubs of Android's libraries; return what to link a library with."""
        linked: list[object] = [*bionic.LINKING]
        for name, functions in bionic.STUBS.items():
            source, stub = place / f"stub_{name}.c", place / name
            source.write_text(bionic.stub_source(functions))
            how = ["-w", "-fno-builtin", "-shared", "-nostdlib", f"-Wl,-soname,{name}"]
            self.run([*self.compiler, *how, source, "-o", stub], f"make a stub of {name}")
            linked.append(stub)
        return linked

    def drop_unwinding(self, kernels: Path) -> None:
        """Remove what kernels would be unwound by from an object file."""
        sections = (f"--remove-section={prefix}{UNWINDING}" for prefix in ("", ".rela"))
        self.run([f"{self.prefix}objcopy", *sections, kernels], f"shrink {kernels.name}")

    def link_package(
        self, objects: Sequence[Path], runner: Path, folder: Path, static: bool = True
    ) -> None:
        """Make the library, the archive and the runner of compiled objects. A runner that loads a
        driver cannot be `static`."""
        script = objects[0].parent / "exported"
        script.write_text(f"{{ global: {EXPORTED}; local: *; }};\n")
        strip = ["-s", "-Wl,--build-id=none", "-Wl,--gc-sections"]
        libraries: list[object] = ["-lpthread", "-lm", *([] if static else ["-ldl"])]
        shared_libraries, adapters = libraries, list[Path]()
        if self.android:
            shared_libraries = self.bionic_libraries(script.parent)
            adapters = [self.bionic_adapter(script.parent)]
        shared = ["-shared", f"-Wl,-soname,{LIBRARY}", "-Wl,-z,defs", "-Wl,-z,noexecstack",
                  f"-Wl,--version-script={script}"]  # fmt: skip
        self.run(
            [
                *self.compiler,
                *shared,
                *self.linking,
                *strip,
                *objects,
                *adapters,
                "-o",
                folder / LIBRARY,
                *shared_libraries,
            ],
            f"link {LIBRARY}",
        )
        # One object whose other names are hidden: several models can be linked into a program
        # whose own functions may be called as they like.
        whole = script.with_name("model_whole.o")
        self.run(
            [*self.compiler, "-r", "-nostdlib", *objects, *adapters, "-o", whole], f"link {ARCHIVE}"
        )
        keep = ["--wildcard", f"--keep-global-symbol={EXPORTED}", "--strip-unneeded"]
        self.run([f"{self.prefix}objcopy", *keep, whole], f"hide names of {ARCHIVE}")
        (folder / ARCHIVE).unlink(missing_ok=True)
        self.run([f"{self.prefix}ar", "rcsD", folder / ARCHIVE, whole], f"write {ARCHIVE}")
        self.run(
            [
                *self.compiler,
                *(["-static"] if static else []),
                *strip,
                runner,
                *objects,
                "-o",
                folder / RUNNER,
                *libraries,
            ],
            f"link {RUNNER}",
        )


def toolchain_for(architecture: str, android: bool = False) -> Toolchain:
    """Return the tools for an architecture, as `uname -m` calls it, with glibc or Android's libc.
    TargetError where none are installed."""
    here = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    linking = LINKING.get(architecture, ())
    if architecture == here:
        return Toolchain(tuple(c_compiler()), "", linking, android)
    prefix = CROSS.get(architecture)
    if prefix is None:
        raise TargetError(f"this machine is {here}: nothing is known to build for {architecture}")
    if shutil.which(f"{prefix}gcc") is None:
        raise TargetError(
            f"no {prefix}gcc is installed, which builds for {architecture} "
            f"(Debian: {PACKAGES[architecture]})"
        )
    return Toolchain((f"{prefix}gcc",), prefix, linking, android)
