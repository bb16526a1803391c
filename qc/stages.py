"""The stages of a compilation as objects that can be held, printed and run one by one.

captured = qc.trace(model)            # the graph as torch.export sees it
canonical = captured.canonicalize()   # in the ops of qc; canonical.check(...) says what follows
quantized = canonical.quantize("w4")  # the passes of a recipe; captured.quantize does both
planned = quantized.lower("cpu")      # grouped into kernels for a machine
artifact = planned.build()            # compiled, ready to run
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qc.checking.check import check_graph
from qc.errors import QcError, RecipeError, TargetError, nearest
from qc.explaining.explain import ExplainOptions, explain
from qc.frontends.captured import Captured
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.target import Target, parse_machine
from qc.ir.weights.weight import WeightFormat
from qc.passes.calibration import Calibration, Coverage
from qc.passes.calibration.data import Encode
from qc.passes.lift import LIFT
from qc.passes.pipeline import Context, Pass, Pipeline, Step, replace_passes
from qc.passes.plan import plan
from qc.passes.prepare import PREPARE
from qc.passes.prepare.explicit_cache import CACHES, ExplicitCache
from qc.passes.prepare.trailing_logits import TrailingLogits
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.round_to_nearest import RoundToNearest, as_weight_format
from qc.passes.recipes import RECIPES, Recipe
from qc.report import compile_report
from qc.runtime.explanation import FIGURES, Explanation
from qc.runtime.text import TextModel

if TYPE_CHECKING:
    from qc.backends.artifact import ArtifactFacts
    from qc.checking.report import CheckReport
    from qc.runtime import Artifact

Progress = Callable[[str, float], None]


def silent(step: str, fraction: float) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True, eq=False)
class CapturedModel:
    """A model as torch.export captured it."""

    captured: Captured
    source: str = ""
    """Where the model came from: a folder, a name, or "" for a module in memory."""

    @property
    def graph(self) -> Graph:
        return self.captured.graph

    def canonicalize(self, progress: Progress = silent) -> CanonicalModel:
        """Bring the graph into canonical form."""
        context = Context(Target("any", "any"), progress)
        canonical = Pipeline((*PREPARE, *LIFT, TrailingLogits())).run(self.graph, context)
        return CanonicalModel(self, canonical, context.log)

    def quantize(
        self,
        recipe: str | Recipe | Pipeline = "f32",
        progress: Progress = silent,
        *,
        weights: str | WeightFormat | None = None,
        bits: int | None = None,
        group_size: int | None = None,
        calibration: Calibration | None = None,
    ) -> QuantizedModel:
        """Bring the graph into canonical form and run a recipe, given by name or as passes.

        `weights` is the format in which the recipe is to store the linears, as it is printed:
        "int3·g64 + rank16"; `bits` and `group_size` change sizes of the recipe's own. Passes that
        look at data get `calibration`; without, the model writes text. RecipeError for an unknown
        name, FormatError for an unknown format.
        """
        asked = calibration is not None
        passes = resolve_recipe(recipe, weights, bits, group_size, calibrated=asked)
        return self.canonicalize(progress).quantize(passes, progress, calibration=calibration)

    def __str__(self) -> str:
        return str(self.graph)


@dataclass(frozen=True, eq=False)
class CanonicalModel:
    """A model in the ops of qc, its weights as they came."""

    captured: CapturedModel
    graph: Graph
    log: list[Step] = field(default_factory=list)

    def check(
        self,
        target: str | Target = "cpu",
        recipe: str | Recipe | Pipeline = "f32",
        *,
        weights: str | WeightFormat | None = None,
    ) -> CheckReport:
        """Say how a recipe will store every linear and what a machine will make of it, without
        computing values."""
        machine = target if isinstance(target, Target) else parse_machine(target)
        passes = resolve_recipe(recipe, weights)
        return check_graph(self.graph, passes, machine, self.captured.source)

    def quantize(
        self,
        recipe: str | Recipe | Pipeline = "f32",
        progress: Progress = silent,
        *,
        weights: str | WeightFormat | None = None,
        bits: int | None = None,
        group_size: int | None = None,
        calibration: Calibration | None = None,
    ) -> QuantizedModel:
        """Run a recipe."""
        asked = calibration is not None
        passes = resolve_recipe(recipe, weights, bits, group_size, calibrated=asked)
        data = self.bind(calibration or Calibration())
        context = Context(Target("any", "any"), progress, list(self.log), data)
        graph = passes.run(self.graph, context)
        return QuantizedModel(self.captured, self.graph, graph, context.log, data.coverage)

    def explain(
        self,
        recipe: str | Recipe | Pipeline,
        progress: Progress = silent,
        *,
        calibration: Calibration | None = None,
        options: ExplainOptions | None = None,
        name: str = "",
    ) -> QuantizedModel:
        """Run a recipe and measure what every pass costs every layer: `explanation` of the
        result, which calls the recipe `name`."""
        passes = resolve_recipe(recipe, calibrated=calibration is not None)
        data = self.bind(calibration or Calibration())
        context = Context(Target("any", "any"), progress, list(self.log), data)
        name = name or (recipe if isinstance(recipe, str) else "")
        graph, found = explain(self.graph, passes, context, options, self.captured.source, name)
        return QuantizedModel(
            self.captured, self.graph, graph, context.log, data.coverage, found
        )  # fmt: skip

    def bind(self, calibration: Calibration) -> Calibration:
        """Tell a calibration how this model reads and writes text."""
        facts = self.captured.captured
        return calibration.bound(
            self.graph, encoder_of(facts.tokenizer), facts.bos_id, facts.context_length
        )

    def __str__(self) -> str:
        return str(self.graph)


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A model after a recipe: still a graph with a torch meaning."""

    captured: CapturedModel
    canonical: Graph
    graph: Graph
    log: list[Step] = field(default_factory=list)
    coverage: Mapping[str, Coverage] = field(default_factory=dict)
    """What data each weight saw that was stored by data."""
    explanation: Explanation | None = None
    """Where the loss comes from, where that was asked for."""

    def __call__(self, sizes: Mapping[str, int] | None = None, **inputs: Tensor) -> dict[str, Any]:
        """Evaluate the graph in the reference interpreter; caches may be left out when empty."""
        return evaluate(
            self.graph, with_empty_caches(self.graph, inputs), default_sizes(inputs, sizes)
        )

    def lower(self, target: str | Target = "cpu", progress: Progress = silent) -> PlannedModel:
        """Group the graph into kernels for a machine, such as "cpu" or "cpu:x86_64-v3"."""
        machine = target if isinstance(target, Target) else parse_machine(target)
        graph = plan(machine).run(self.graph, Context(machine, progress, self.log))
        return PlannedModel(self, machine, graph)

    def __str__(self) -> str:
        return str(self.graph)


@dataclass(frozen=True, eq=False)
class PlannedModel:
    """A model grouped into kernels for one machine."""

    quantized: QuantizedModel
    target: Target
    graph: Graph

    def build(
        self, path: str | Path | None = None, name: str = "", progress: Progress = silent
    ) -> Artifact:
        """Generate code, compile it, and load the artifact.

        With `path` the artifact is written there, whole or not at all; without, it lives in a
        temporary folder for as long as the returned object.
        """
        folder = Path(tempfile.mkdtemp(prefix="qc-")) if path is None else None
        place = Path(path) if path is not None else Path(str(folder)) / "model.qc"
        try:
            artifact = self.write(place, name or str(self.target), progress)
        except BaseException:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if folder is not None:
            weakref.finalize(artifact, shutil.rmtree, str(folder), ignore_errors=True)
        return artifact

    def facts(self, name: str) -> ArtifactFacts:
        """Return what an artifact says of itself besides its program."""
        from qc.backends.artifact import ArtifactFacts

        captured = self.quantized.captured
        return ArtifactFacts(
            name,
            captured.captured.eos_ids,
            captured.captured.bos_id,
            captured.captured.context_length,
            captured.captured.tokenizer,
            compile_report(self.quantized.graph, captured.source, name, self.quantized.coverage),
            self.texts(),
        )

    def write(self, place: Path, name: str, progress: Progress) -> Artifact:
        """Write the artifact to `place` and load it."""
        from qc.loading import load

        facts = self.facts(name)
        if self.target.device == "arm64":
            raise TargetError(
                f"{name} is another machine than this: `qc build` makes packages for it"
            )
        if self.target.device == "torch":
            from qc.backends.torch.artifact import write_torch_artifact

            write_torch_artifact(self.graph, facts, place, progress)
        elif self.target.gpu is not None:
            from qc.backends.triton.artifact import write_gpu_artifact  # loads Triton

            write_gpu_artifact(self.graph, self.target, facts, place, progress)
        else:
            from qc.backends.tvm.artifact import write_native_artifact  # loads TVM

            write_native_artifact(self.graph, self.target, facts, place, progress)
        return load(place)

    def texts(self) -> dict[str, str]:
        """Print every stage, for `qc inspect`."""
        return {
            "ir/captured.txt": str(self.quantized.captured.graph),
            "ir/canonical.txt": str(self.quantized.canonical),
            "ir/quantized.txt": str(self.quantized.graph),
            "ir/planned.txt": str(self.graph),
            "ir/log.txt": "\n".join(step.text for step in self.quantized.log),
            **self.figures(),
        }

    def figures(self) -> dict[str, str]:
        """Write the explanation, where there is one."""
        found = self.quantized.explanation
        return {} if found is None else {FIGURES: json.dumps(found.to_dict(), ensure_ascii=False)}

    def __str__(self) -> str:
        return str(self.graph)


def encoder_of(folder: Path | None) -> Encode | None:
    """Return what tokenizes text by the tokenizer in a folder, which is read when it is needed."""
    if folder is None:
        return None

    def encode(text: str) -> list[int]:
        files = {file.name: file.read_bytes() for file in folder.iterdir() if "token" in file.name}
        return TextModel(files).encode(text, special_tokens=False)

    return encode


def resolve_recipe(
    recipe: str | Recipe | Pipeline,
    weights: str | WeightFormat | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    calibrated: bool = False,
) -> Pipeline:
    """Return the passes behind a recipe, with linears stored as `weights` where that is given, or
    in its own formats with other sizes. Where data is given, `calibrated`, a recipe that rounds may
    look at it, unless another format is asked for.

    RecipeError and FormatError list the nearest known names.
    """
    passes = named_passes(recipe, calibrated and weights is None)
    if weights is not None:
        passes = storing(passes, as_weight_format(weights))
    return passes if bits is None and group_size is None else resized(passes, bits, group_size)


def caching(pipeline: Pipeline, cache: str | None) -> Pipeline:
    """Return the passes with keys and values kept as `cache` says, a name of CACHES.

    RecipeError for another name.
    """
    if cache is None:
        return pipeline
    if cache not in CACHES:
        hint = nearest(cache, CACHES) or f"; known are {', '.join(CACHES)}"
        raise RecipeError(f"keys and values cannot be kept as {cache!r}{hint}")
    return pipeline.replace(ExplicitCache, CACHES[cache])


def storing(pipeline: Pipeline, format: WeightFormat) -> Pipeline:
    """Return the passes with the first that stores linears doing so in `format`, and those that
    prepare for it; where none does, linears are rounded in front of the quantization of
    activations, or at the end."""
    changed = changed_first(pipeline, lambda one: one.storing(format))
    if changed is not None:
        return changed
    passes = pipeline.passes
    found = [number for number, one in enumerate(passes) if isinstance(one, QuantizeActivations)]
    at = found[0] if found else len(passes)
    return replace_passes(pipeline, (*passes[:at], RoundToNearest(format), *passes[at:]))


def resized(pipeline: Pipeline, bits: int | None, group: int | None) -> Pipeline:
    """Return the passes with the first that has sizes of codes and groups in others; RecipeError
    where none has."""
    changed = changed_first(pipeline, lambda one: one.resized(bits, group))
    if changed is None:
        raise RecipeError("this recipe stores no codes, so it has no bits and no groups to change")
    return changed


def changed_first(pipeline: Pipeline, change: Callable[[Pass], Pass | None]) -> Pipeline | None:
    """Change the first pass that stores linears, and those before it that look ahead to its
    format; None where no pass stores any."""
    passes: list[Pass] = []
    for number, one in enumerate(pipeline.passes):
        changed = change(one)
        passes.append(changed or one)
        if changed is not None and not one.looks_ahead:
            return replace_passes(pipeline, (*passes, *pipeline.passes[number + 1 :]))
    return None


def named_passes(recipe: str | Recipe | Pipeline, calibrated: bool = False) -> Pipeline:
    """Return the passes of a recipe; RecipeError lists the nearest known names."""
    if isinstance(recipe, Pipeline):
        return recipe
    if isinstance(recipe, str) and recipe not in RECIPES:
        hint = nearest(recipe, RECIPES) or f"; known are {', '.join(RECIPES)}"
        raise RecipeError(f"unknown recipe {recipe!r}{hint}")
    found = RECIPES[recipe] if isinstance(recipe, str) else recipe
    return Pipeline(found.calibrated) if calibrated and found.calibrated else found.pipeline


def with_empty_caches(graph: Graph, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add an empty tensor for every cache input that is missing."""
    from qc.passes.prepare.explicit_cache import empty_cache

    if not inputs:
        raise QcError("a model needs at least one input")
    batch = next(iter(inputs.values())).shape[0]
    return {**empty_cache(graph, batch), **inputs}


def default_sizes(inputs: Mapping[str, Tensor], sizes: Mapping[str, int] | None) -> dict[str, int]:
    """Ask for the results of all positions where nothing else is said."""
    first = next(iter(inputs.values()))
    length = first.shape[1] if first.ndim > 1 else 1
    return {"keep": length, **(sizes or {})}
