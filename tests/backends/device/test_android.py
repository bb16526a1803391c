"""A library for Android asks of the system only what bionic has, and leaves the system's register
alone. No Android runs here: under QEMU glibc stands in for bionic."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import qc
from qc.backends.device.bionic import LIBC, LIBM
from qc.backends.device.toolchain import toolchain_for
from tests.backends.device.cross import emulator
from tests.backends.device.packages import package
from tests.needs import needs
from tests.tiny_llama import llama_folder

pytestmark = [needs("qemu"), needs("arm compiler")]

ROOT = Path(__file__).parents[3]
SYSROOT = "/usr/aarch64-linux-gnu"
PROMPT = "The cat sat"
BIONIC_IN_GLIBC = "#include <errno.h>\nint *__errno(void) { return __errno_location(); }\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def place(base: Path) -> Path:
    return package(base, "android-arm64-dotprod-w4")


def output_of(*command: object) -> str:
    """Return what a tool prints."""
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_bionic_has_all_that_is_asked_of_it(place: Path) -> None:
    shown = output_of("aarch64-linux-gnu-nm", "-uD", place / "libmodel.so")
    assert {line.split()[-1] for line in shown.splitlines()} <= {*LIBC, *LIBM}
    dynamic = output_of("aarch64-linux-gnu-readelf", "-dW", place / "libmodel.so")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert sorted(needed) == ["libc.so", "libm.so"]
    archive = output_of("aarch64-linux-gnu-nm", "-u", place / "libmodel.a").split()
    assert not {"__errno_location", "__getauxval", "pthread_atfork"} & {*archive}


def test_the_register_of_the_system_is_not_used(place: Path) -> None:
    code = output_of("aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", place / "libmodel.so")
    assert re.search(r"\b[wx]17\b", code), "no code is shown"
    assert not re.search(r"\b[wx]18\b", code)


def test_the_library_runs(place: Path, base: Path, tmp_path: Path) -> None:
    """The example, against libraries with bionic's names and glibc's functions."""
    tools = toolchain_for("aarch64")
    source = tmp_path / "bionic_in_glibc.c"
    source.write_text(BIONIC_IN_GLIBC)
    for name in ("libc.so", "libm.so"):
        how = ["-shared", "-fPIC", "-Wl,--no-as-needed", f"-Wl,-soname,{name}"]
        command = [*tools.compiler, *how, source, "-o", tmp_path / name, "-lm"]
        subprocess.run([str(word) for word in command], check=True)
    program = tmp_path / "program"
    example = [ROOT / "examples" / "device.c", place / "libmodel.so"]
    command = [*tools.compiler, f"-I{place}", *example, "-Wl,--allow-shlib-undefined"]
    subprocess.run([str(word) for word in [*command, "-o", program]], check=True)
    found = f"LD_LIBRARY_PATH={place}:{tmp_path}"
    run = [*emulator("-L", SYSROOT, "-E", found), program, place / "weights.qcw", PROMPT]
    artifact = qc.compile(llama_folder(base), "cpu-w4")
    assert output_of(*run) == "".join(artifact.stream_text(PROMPT, 32, temperature=0.0))


def test_the_runner_needs_no_system_library(place: Path, base: Path) -> None:
    command = [*emulator(), place / "runner", place / "weights.qcw", PROMPT, "-n", "20"]
    artifact = qc.compile(llama_folder(base), "cpu-w4")
    assert output_of(*command) == "".join(artifact.stream_text(PROMPT, 20, temperature=0.0)) + "\n"
