"""From a planned graph to a package for a device."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qc.backends.artifact import ArtifactFacts, tokenizer_files
from qc.backends.device.bionic import API_LEVEL
from qc.backends.device.program import DeviceProgram
from qc.backends.device.text_tables import text_tables
from qc.backends.device.toolchain import (
    ARCHIVE,
    DEVICE,
    HEADER,
    LIBRARY,
    ON_CPU,
    RUNNER,
    RUNTIME,
    Toolchain,
    toolchain_for,
)
from qc.backends.device.weights_file import write_weights
from qc.backends.device.workspace import workspace_bytes
from qc.backends.lowering import Lowered
from qc.backends.stored import tensor_sources
from qc.backends.tvm.artifact import manifest_of
from qc.backends.tvm.build import Progress, compile_objects
from qc.backends.tvm.kernel import Kernel
from qc.backends.tvm.lower import lower
from qc.backends.tvm.rules import CPU_RULES
from qc.ir.graph import Graph
from qc.ir.target import Target
from qc.runtime.manifest import Manifest
from qc.runtime.package import ArtifactWriter

PACKAGE_FORMAT = 1
WEIGHTS = "weights.qcw"
ABI = 1  # QCM_ABI_VERSION of qc_model.h


def write_device_package(
    graph: Graph, target: Target, facts: ArtifactFacts, path: Path, progress: Progress
) -> dict[str, Any]:
    """Lower, compile and write; return the package's manifest.

    Nothing is left at `path` where a step fails.
    """
    tools = toolchain_for(target.machine, target.is_android)
    with ArtifactWriter(path) as writer:
        lowered = lower(graph, target, CPU_RULES)
        manifest = manifest_of(lowered, facts, False)
        program = DeviceProgram(manifest)
        text = text_of(facts)
        progress("compile kernels", 0.0)
        folder = writer.file(LIBRARY).parent
        workspace = workspace_bytes(program, lowered.kernels)
        compile_package(program, lowered, workspace, tools, folder)
        order = [value.tensor or value.name for value in program.weights]
        sources = dict(tensor_sources(lowered, progress))
        write_weights(folder / WEIGHTS, program.identity, order, sources, text)
        described = describe(program, manifest, workspace, text is not None, target.is_android)
        return finish(writer, described)


def finish(writer: ArtifactWriter, described: Mapping[str, Any]) -> dict[str, Any]:
    """Take what was compiled into the package, and write what goes with it."""
    for name in (LIBRARY, ARCHIVE, RUNNER, WEIGHTS):
        writer.keep(name)
    writer.add(HEADER.name, HEADER)
    writer.add("README", readme(described).encode())
    return writer.finish_described(described)


def text_of(facts: ArtifactFacts) -> bytes | None:
    """Return the tokenizer as tables for the device; None for a model without one."""
    files = tokenizer_files(facts.tokenizer)
    return text_tables(files["tokenizer.json"]) if files else None


def compile_package(
    program: DeviceProgram,
    lowered: Lowered[Kernel],
    workspace: int,
    tools: Toolchain,
    folder: Path,
) -> None:
    """Compile kernels, program and runtime; write library, archive and runner to `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        source = place / "program.c"
        source.write_text(program.source(workspace))
        # Arguments are constants of the program: the artifact of the same steps checks them.
        objects = compile_objects(lowered.kernels, lowered.target, place, checked=False)
        for kernels in objects:
            tools.drop_unwinding(kernels)
        includes = (DEVICE, RUNTIME / "native")
        for file in (source, *ON_CPU, DEVICE / "runner.c"):
            objects.append(place / f"{file.stem}.o")
            tools.compile(file, objects[-1], includes, ())
        *linked, runner = objects
        tools.link_package(linked, runner, folder)


def describe(
    program: DeviceProgram, manifest: Manifest, workspace: int, has_text: bool, android: bool
) -> dict[str, Any]:
    """Say what is in a package."""
    step, prefill = program.plans
    generate = program.generate
    return {
        "qc_package": PACKAGE_FORMAT,
        "abi": ABI,
        "target": {
            "name": manifest.target.name,
            "arch": manifest.target.arch,
            "features": list(manifest.target.features),
        },
        "gpus": [],
        "android_api": API_LEVEL if android else None,
        "identity": program.identity.hex(),
        "vocabulary": program.vocabulary,
        "context_length": program.context,
        "chunk": min(generate.chunk, program.context),
        "begin": generate.bos,
        "end": list(generate.eos),
        "tokenizer": has_text,
        "memory": {
            "step": step.bytes,
            "prefill": prefill.bytes,
            "thread": workspace,
            "state": program.state_bytes(program.context),
            "state_of_1024_tokens": program.state_bytes(min(1024, program.context)),
        },
        "report": dict(manifest.report),
    }


def readme(described: Mapping[str, Any]) -> str:
    """Say how to use a package."""
    target, memory = described["target"], described["memory"]
    needs = ", ".join(target["features"]) or "no special instruction set"
    android = described["android_api"]
    system = f"Android, API level {android}" if android else "Linux"
    kind, driver = "static program", ""
    if described["gpus"]:
        needs = f"NVIDIA GPU: {', '.join(described['gpus'])}"
        kind, driver = "program", ", and loads libcuda.so.1"
    return f"""A language model for {target["name"]} ({target["arch"]}, {system}; {needs}).

    {RUNNER}          {kind}:  ./{RUNNER} {WEIGHTS} "prompt"
    {LIBRARY}     the same as a library; needs libc, libm and POSIX threads{driver}
    {ARCHIVE}      to link into a program
    {HEADER.name}      the interface, version {described["abi"]}
    {WEIGHTS}     weights{" and tokenizer" if described["tokenizer"] else ""}, mapped into memory

Working memory besides the weights, all of it reserved when a session starts:
{memory["prefill"] / 1e6:.1f} MB, {memory["thread"] / 1e6:.1f} MB for each thread, and \
{memory["state"] / described["context_length"] / 1e3:.1f} kB for each token
of the context, at most {described["context_length"]} tokens. Pages are touched as they are filled.

    cc program.c {ARCHIVE} -lpthread -lm{" -ldl" if described["gpus"] else ""}
"""
