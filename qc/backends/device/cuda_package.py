"""From a planned graph to a package for GPUs: no GPU is needed to make one."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qc.backends.artifact import ArtifactFacts, Progress
from qc.backends.device.cuda_program import CudaProgram, steps_of_one_row
from qc.backends.device.package import WEIGHTS, describe, finish, text_of
from qc.backends.device.program import generation_of
from qc.backends.device.toolchain import (
    DEVICE,
    LIBRARY,
    ON_GPU,
    RUNTIME,
    Toolchain,
    toolchain_for,
)
from qc.backends.device.weights_file import write_weights
from qc.backends.stored import tensor_sources
from qc.backends.triton.artifact import code_of, compile_all, manifest_of
from qc.backends.triton.golden import Golden
from qc.backends.triton.lower import GpuLowering
from qc.backends.triton.rules import GPU_RULES
from qc.errors import TargetError
from qc.ir.graph import Graph
from qc.ir.target import Target
from qc.runtime.manifest import Manifest
from qc.runtime.package import ArtifactWriter


def write_cuda_package(
    graph: Graph, target: Target, facts: ArtifactFacts, path: Path, progress: Progress
) -> dict[str, Any]:
    """Lower, compile and write; return the package's manifest.

    Nothing is left at `path` where a step fails.
    """
    assert target.gpu is not None
    if target.device != "cuda":
        raise TargetError(f"nothing runs kernels for {target} yet: a package is for cuda or a CPU")
    tools = toolchain_for(platform.machine())
    with ArtifactWriter(path) as writer:
        progress("lower", 0.0)
        lowered = GpuLowering(graph, target, GPU_RULES).run()
        whole = manifest_of(lowered, facts, False, {}, Golden([], {}))
        generation_of(whole)  # before anything is compiled
        manifest = replace(whole, steps=tuple(steps_of_one_row(whole)))
        launched = {step.kernel for step in steps_of_one_row(manifest)}
        kernels = {name: each for name, each in lowered.kernels.items() if name in launched}
        compiled = compile_all(kernels, target.gpu.architectures, progress)
        code, files = code_of(kernels, compiled)
        folder = writer.file(LIBRARY).parent
        sources = dict(tensor_sources(lowered, progress))
        described = write_launcher(
            replace(manifest, code=code), files, sources, text_of(facts), tools, folder
        )
        return finish(writer, described | {"gpus": list(target.gpu.architectures)})


def write_launcher(
    manifest: Manifest,
    files: Mapping[str, bytes],
    sources: Mapping[str, Any],
    text: bytes | None,
    tools: Toolchain,
    folder: Path,
) -> dict[str, Any]:
    """Write library, archive, runner and weights to `folder`; say what they are."""
    images = {name: image_of(name, content) for name, content in sorted(files.items())}
    program = CudaProgram(manifest, images)
    compile_launcher(program, tools, folder)
    order = [value.tensor or value.name for value in program.weights]
    codes = list(images.values())
    write_weights(folder / WEIGHTS, program.identity, order, sources, text, codes)
    described = describe(program, manifest, 0, text is not None, False)
    described["target"]["arch"] = platform.machine()
    return described


def image_of(name: str, content: bytes) -> bytes:
    """Return code as the driver takes it: PTX is a text that ends with a zero."""
    return content + b"\0" if name.endswith(".ptx") else content


def compile_launcher(program: CudaProgram, tools: Toolchain, folder: Path) -> None:
    """Compile tables and runtime; write library, archive and runner to `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        source = place / "program.c"
        source.write_text(program.source(0))
        files: Sequence[Path] = (source, *ON_GPU, DEVICE / "runner.c")
        objects = [place / f"{file.stem}.o" for file in files]
        for file, made in zip(files, objects, strict=True):
            tools.compile(file, made, (DEVICE, RUNTIME / "native"), ())
        *linked, runner = objects
        tools.link_package(linked, runner, folder, static=False)
