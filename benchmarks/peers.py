"""Peers: each in an environment of its own under build/peers, with the model converted for it.

A peer that cannot be installed or cannot convert the model is left out, and the reason is written
down.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

PEERS = Path("build/peers")
WORKERS = Path(__file__).with_name("workers")
OPENVINO = ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0", "torch==2.13.0")
LLAMA_CPP = ("llama-cpp-python==0.3.36",)
ONNXRUNTIME = ("onnxruntime-genai", "onnx", "onnx-ir", "torch==2.13.0", "transformers>=5,<6")
PLOT = ("matplotlib>=3.9",)

LLAMA_CPP_FLAGS = {
    "avx": "GGML_AVX", "avx2": "GGML_AVX2", "fma": "GGML_FMA", "f16c": "GGML_F16C",
    "bmi2": "GGML_BMI2", "avx512bw": "GGML_AVX512", "avx512_vnni": "GGML_AVX512_VNNI",
    "avx512_vbmi": "GGML_AVX512_VBMI", "avx512_bf16": "GGML_AVX512_BF16",
}  # fmt: skip
"""What each feature of the CPU switches on. Not its AMX kernels: they crash on some machines."""


@dataclass(frozen=True)
class Contender:
    """One program with one stored model. `stored` are the files that it needs to run."""

    name: str
    python: Path
    worker: str
    model: Path
    stored: tuple[Path, ...]
    prepare_seconds: float | None = None

    @property
    def bytes(self) -> int:
        """What is stored."""
        files = (f for path in self.stored for f in ([path] if path.is_file() else path.rglob("*")))
        return sum(file.stat().st_size for file in files if file.is_file())

    def command(self, threads: int) -> list[str]:
        """Return what starts the worker."""
        script = WORKERS / f"{self.worker}_worker.py"
        return [str(self.python), str(script), str(self.model), str(threads)]


Maker = Callable[[Path], Contender]


def prepare(model: Path, names: tuple[str, ...]) -> Iterator[tuple[str, Contender | str]]:
    """Yield every peer that is asked for, or in one sentence why it is left out."""
    for name in names:
        try:
            yield name, PEER_MAKERS[name](model)
        except (subprocess.CalledProcessError, OSError) as error:
            yield name, f"{type(error).__name__}: {error}"


def openvino(model: Path) -> Contender:
    """int4, symmetric, groups of 32, int8 head and embedding: what its users choose for speed."""
    python = environment("openvino", OPENVINO, without=("torchvision",))
    folder = PEERS / f"{model.name}-openvino-int4"
    done = folder / "openvino_model.xml"
    options = ["--weight-format", "int4", "--group-size", "32", "--sym", "--ratio", "1.0"]
    task = ["--task", "text-generation-with-past"]
    command: list[str | Path] = [python, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    seconds = made(done, [*command, "-m", model, *task, *options, folder])
    stored = tuple(folder / f"openvino_model.{kind}" for kind in ("xml", "bin"))
    return Contender("openvino int4", python, "openvino", folder, stored, seconds)


def llama_cpp(kind: str) -> Maker:
    """Return what makes llama.cpp with codes of one kind."""

    def make(model: Path) -> Contender:
        python = environment(
            "llama_cpp",
            LLAMA_CPP,
            options=("--no-binary", "llama-cpp-python"),
            variables=build_flags(),
        )
        file = PEERS / f"{model.name}-{kind}.gguf"
        writer = "benchmarks.write_gguf"
        command: list[str | Path] = [sys.executable, "-m", writer, model, file, kind]
        return Contender(
            f"llama.cpp {kind}", python, "llama_cpp", file, (file,), made(file, command)
        )

    return make


def onnxruntime(model: Path) -> Contender:
    """int4 by its model builder, groups of 32."""
    python = environment("onnxruntime", ONNXRUNTIME)
    folder = PEERS / f"{model.name}-onnxruntime-int4"
    builder = "onnxruntime_genai.models.builder"
    command: list[str | Path] = [python, "-m", builder, "-i", model, "-o", folder]
    options: list[str | Path] = ["-p", "int4", "-e", "cpu", "-c", PEERS / "cache"]
    extra = ["--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
    seconds = made(folder / "genai_config.json", [*command, *options, *extra])
    stored = (folder / "model.onnx", folder / "model.onnx.data")
    return Contender("onnxruntime int4", python, "onnxruntime", folder, stored, seconds)


PEER_MAKERS: dict[str, Maker] = {
    "openvino": openvino,
    "llama.cpp-Q4_0": llama_cpp("Q4_0"),
    "llama.cpp-Q4_1": llama_cpp("Q4_1"),
    "onnxruntime": onnxruntime,
}


def plot_python() -> Path:
    """Return the Python that draws."""
    return environment("plot", PLOT)


def environment(
    name: str,
    packages: tuple[str, ...],
    *,
    without: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Return the Python of an environment with these packages, made on the first call.

    `without` are uninstalled again: torchvision, which optimum-intel brings, is built for CUDA and
    breaks beside a torch that is not.
    """
    folder = PEERS / name
    python = (folder / "bin" / "python").absolute()
    stamp = folder / "installed"
    if not stamp.exists():
        run([sys.executable, "-m", "venv", "--clear", folder])
        run([python, "-m", "pip", "install", "--quiet", *options, *packages], variables)
        for package in without:
            run([python, "-m", "pip", "uninstall", "--quiet", "--yes", package])
        stamp.touch()
    return python


def build_flags() -> dict[str, str]:
    """Return the variables that build llama.cpp for the features of this CPU, by name."""
    cpu = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
    )
    present = [flag for feature, flag in LLAMA_CPP_FLAGS.items() if feature in cpu.split()]
    off = ["GGML_NATIVE", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_EXAMPLES", "LLAVA_BUILD"]
    arguments = [f"-D{flag}=ON" for flag in present] + [f"-D{flag}=OFF" for flag in off]
    jobs = str(len(os.sched_getaffinity(0)))
    return {"CMAKE_ARGS": " ".join(arguments), "CMAKE_BUILD_PARALLEL_LEVEL": jobs}


def made(result: Path, command: Sequence[str | Path]) -> float | None:
    """Run a command unless its result is there; return the seconds, kept beside the result."""
    note = result.with_name(f"{result.name}.seconds")
    if not result.exists():
        start = time.perf_counter()
        run(command)
        note.write_text(str(time.perf_counter() - start))
    return float(note.read_text()) if note.exists() else None


def run(command: Sequence[str | Path], variables: Mapping[str, str] = MappingProxyType({})) -> None:
    """Run a command; what it prints goes to standard error."""
    print("+", *command, file=sys.stderr)
    subprocess.run(
        list(map(str, command)), check=True, stdout=sys.stderr, env={**os.environ, **variables}
    )
