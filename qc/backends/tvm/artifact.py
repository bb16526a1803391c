"""From a planned graph to a native artifact on disk."""

from __future__ import annotations

from pathlib import Path

from qc.backends.artifact import ArtifactFacts, generation_facts, required_features, tokenizer_files
from qc.backends.lowering import Lowered
from qc.backends.tvm.build import Progress, write_program
from qc.backends.tvm.kernel import Kernel
from qc.backends.tvm.lower import lower
from qc.backends.tvm.rules import CPU_RULES
from qc.ir.graph import Graph
from qc.ir.target import Target
from qc.runtime.manifest import Manifest, TargetFacts
from qc.runtime.package import ArtifactWriter


def write_native_artifact(
    graph: Graph, target: Target, facts: ArtifactFacts, path: Path, progress: Progress
) -> None:
    """Lower, compile and write; nothing is left at `path` where a step fails."""
    with ArtifactWriter(path) as writer:
        lowered = lower(graph, target, CPU_RULES)
        write_program(lowered, writer, progress)
        tokenizer = tokenizer_files(facts.tokenizer)
        for name, content in tokenizer.items():
            writer.add(name, content)
        for name, text in facts.texts.items():
            writer.add(name, text.encode())
        writer.finish(manifest_of(lowered, facts, bool(tokenizer)))


def manifest_of(lowered: Lowered[Kernel], facts: ArtifactFacts, has_tokenizer: bool) -> Manifest:
    """Describe a lowered program."""
    states = sum(value.kind == "state" for value in lowered.values)
    stayed = [{"op": op, "origin": origin} for op, origin in lowered.on_torch]
    return Manifest(
        target=TargetFacts(facts.name, lowered.target.machine, required_features(lowered.target)),
        symbols=lowered.symbols,
        values=tuple(lowered.values),
        steps=tuple(lowered.steps),
        inputs=tuple(lowered.inputs),
        outputs=tuple(lowered.outputs),
        context_length=facts.context_length,
        generate=generation_facts(lowered.inputs, lowered.outputs, facts.eos, facts.bos, states),
        report={**facts.report, "on_torch": stayed, "kernels": len(lowered.kernels)},
        tokenizer=has_tokenizer,
    )
