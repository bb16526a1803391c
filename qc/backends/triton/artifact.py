"""From a planned graph to a GPU artifact on disk: no GPU is needed to make one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qc.backends.artifact import ArtifactFacts, Progress, generation_facts, tokenizer_files
from qc.backends.lowering import Lowered
from qc.backends.stored import tensor_sources
from qc.backends.triton.compile import compile_launch
from qc.backends.triton.glue import launch_name
from qc.backends.triton.golden import Golden, golden_checks
from qc.backends.triton.kernel import Cubin, Launch
from qc.backends.triton.lower import GpuLowering
from qc.backends.triton.rules import GPU_RULES
from qc.backends.triton.sampling import sampler_launches
from qc.ir.graph import Graph
from qc.ir.target import Target
from qc.ir.threads import side_by_side
from qc.runtime.manifest import CUDA, GOLDEN, ROCM, Binary, Code, Manifest, TargetFacts
from qc.runtime.package import ArtifactWriter
from qc.runtime.safetensors_file import write_safetensors

FEATURE_SPECIFIC = 90
"""From this architecture on Triton emits code that no later one runs, PTX too."""

Compiled = Mapping[str, Mapping[str, Cubin]]
"""Kernel -> architecture -> machine code."""


def write_gpu_artifact(
    graph: Graph, target: Target, facts: ArtifactFacts, path: Path, progress: Progress
) -> None:
    """Lower, compile and write; nothing is left at `path` where a step fails."""
    assert target.gpu is not None
    with ArtifactWriter(path) as writer:
        progress("lower", 0.0)
        lowering = GpuLowering(graph, target, GPU_RULES)
        lowered = lowering.run()
        sampler = sampler_of(lowered, facts)
        kernels = {**lowered.kernels, **sampler}
        compiled = compile_all(kernels, target.gpu.architectures, progress)
        code, files = code_of(kernels, compiled)
        for name, launch in kernels.items():
            writer.add(f"source/{name}.py", launch.source.encode())
        for name, content in files.items():
            writer.add(name, content)
        progress("golden outputs", 0.0)
        golden = golden_checks(lowering)
        write_safetensors(writer.file(GOLDEN), golden.arrays)
        writer.keep(GOLDEN)
        writer.add_weights(dict(tensor_sources(lowered, progress)))
        tokenizer = tokenizer_files(facts.tokenizer)
        for name, content in tokenizer.items():
            writer.add(name, content)
        for name, text in facts.texts.items():
            writer.add(name, text.encode())
        manifest = manifest_of(lowered, facts, bool(tokenizer), code, golden)
        if manifest.generate is not None:
            generate = replace(manifest.generate, sampler=tuple(sampler))
            manifest = replace(manifest, generate=generate)
        writer.finish(manifest)


def sampler_of(lowered: Lowered[Launch], facts: ArtifactFacts) -> dict[str, Launch]:
    """Return the kernels that choose tokens, by name, in order; none where nothing generates."""
    states = sum(value.kind == "state" for value in lowered.values)
    generate = generation_facts(lowered.inputs, lowered.outputs, facts.eos, facts.bos, states)
    if generate is None:
        return {}
    logits = next(value for value in lowered.values if value.name == generate.logits)
    vocabulary = logits.shape[-1]
    if logits.dtype != "f32" or not isinstance(vocabulary, int):
        return {}
    return {launch_name(each): each for each in sampler_launches(vocabulary)}


def compile_all(
    kernels: Mapping[str, Launch], architectures: tuple[str, ...], progress: Progress
) -> Compiled:
    """Compile every kernel for every architecture, side by side."""
    wanted = [(name, each) for name in kernels for each in architectures]
    found: dict[str, dict[str, Cubin]] = {name: {} for name in kernels}

    def compile_one(item: tuple[str, str]) -> Cubin:
        name, architecture = item
        return compile_launch(kernels[name], numbered(architecture))

    for number, ((name, architecture), cubin) in enumerate(side_by_side(compile_one, wanted)):
        found[name][architecture] = cubin
        progress("compile kernels", (number + 1) / len(wanted))
    return found


def numbered(architecture: str) -> int | str:
    """Return the number of NVIDIA's "sm_90", the name of AMD's "gfx942"."""
    kind, _, number = architecture.partition("_")
    return int(number) if kind == "sm" else architecture


def code_of(
    kernels: Mapping[str, Launch], compiled: Compiled
) -> tuple[dict[str, Code], dict[str, bytes]]:
    """Return the manifest's description of machine code, and the files to put it in.

    The PTX of the oldest architecture, which is the first, is there for GPUs that come later.
    """
    described: dict[str, Code] = {}
    files: dict[str, bytes] = {}
    for name, launch in kernels.items():
        binaries = []
        for architecture, cubin in compiled[name].items():
            suffix = "cubin" if cubin.ptx else "hsaco"
            file = f"code/{architecture}/{name}.{suffix}"
            files[file] = cubin.binary
            binaries.append(Binary(architecture, file, cubin.shared_bytes))
        oldest = next(iter(compiled[name].values()))
        if isinstance(oldest.architecture, int) and oldest.architecture < FEATURE_SPECIFIC:
            file = f"code/ptx_{oldest.architecture}/{name}.ptx"
            files[file] = oldest.ptx.encode()
            binaries.append(Binary(f"ptx_{oldest.architecture}", file, oldest.shared_bytes))
        kinds = tuple("pointer" if kind.startswith("*") else kind for kind in oldest.parameters)
        constants = dict(launch.constants)
        described[name] = Code(
            oldest.name,
            oldest.num_warps,
            kinds,
            tuple(binaries),
            constants,
            overlaps=isinstance(oldest.architecture, int),
        )
    return described, files


def manifest_of(
    lowered: Lowered[Launch],
    facts: ArtifactFacts,
    has_tokenizer: bool,
    code: Mapping[str, Code],
    golden: Golden,
) -> Manifest:
    """Describe a lowered program."""
    states = sum(value.kind == "state" for value in lowered.values)
    symbols = lowered.symbols
    checks = [
        replace(check, sizes={name: n for name, n in check.sizes.items() if name in symbols})
        for check in golden.checks
    ]
    return Manifest(
        target=TargetFacts(facts.name, "any"),
        symbols=symbols,
        values=tuple(lowered.values),
        steps=tuple(lowered.steps),
        inputs=tuple(lowered.inputs),
        outputs=tuple(lowered.outputs),
        context_length=facts.context_length,
        generate=generation_facts(lowered.inputs, lowered.outputs, facts.eos, facts.bos, states),
        report={**facts.report, "on_torch": [], "kernels": len(lowered.kernels)},
        tokenizer=has_tokenizer,
        executor=ROCM if lowered.target.device == "rocm" else CUDA,
        code=code,
        golden=tuple(checks),
    )
