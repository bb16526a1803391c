"""compile(): the table of contents. capture, canonicalize, check, quantize, plan, build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qc.checking.check import require_possible
from qc.errors import InputError, TargetError, UnsupportedError
from qc.explaining.explain import ExplainOptions
from qc.frontends import open_model
from qc.ir.device import parse_device
from qc.ir.graph import Graph
from qc.ir.target import Target, computing, parse_target
from qc.ir.weights.weight import WeightFormat
from qc.passes.calibration import SELF, Calibration, Checkpoint
from qc.passes.pipeline import Context, Pipeline
from qc.passes.plan import plan
from qc.passes.prepare.explicit_cache import CACHES
from qc.passes.recipes import RECIPES, Recipe
from qc.progress import progress_bar
from qc.runtime.artifact import read_manifest
from qc.runtime.manifest import MANIFEST, TORCH
from qc.runtime.package import check_place
from qc.stages import CapturedModel, Progress, caching, resolve_recipe, silent

if TYPE_CHECKING:
    from qc.backends.artifact import ArtifactFacts
    from qc.checking.report import CheckReport
    from qc.runtime import Artifact
    from qc.runtime.explanation import Explanation


GIVEN_SAMPLES, WRITTEN_SAMPLES = 128, 32
"""Sequences of given data, and of what the model writes: to write one takes longer than to
calibrate on it."""


def trace(model: Any, example_inputs: Mapping[str, Any] | None = None) -> CapturedModel:
    """Capture a model: an nn.Module, a Hugging Face folder or name, or a .gguf file.

    `example_inputs` are needed for a module that is not a transformers model. ModelError where the
    source is missing, corrupt or cannot be exported.
    """
    source = str(model) if isinstance(model, str | Path) else ""
    return CapturedModel(open_model(model, example_inputs), source)


def compile(
    model: Any,
    target: str = "cpu-w4",
    *,
    recipe: str | Recipe | Pipeline | None = None,
    weights: str | WeightFormat | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    cache: str | None = None,
    dtype: str | None = None,
    calibration: Any = None,
    num_calibration_samples: int | None = None,
    max_seq_length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    resume: bool = False,
    explain: bool = False,
    output: str | Path | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    progress: bool | Callable[[str, float], None] = False,
) -> Artifact:
    """Compile a model for a target, such as "cpu-w4", and return the artifact, ready to run.

    The recipe is the one that the target names unless `recipe` says otherwise; `weights` is another
    format for the linears than the recipe's: "int3·g64 + rank16 + sparse0.5%"; `bits` and
    `group_size` change the sizes of the recipe's own; `cache` says how keys and values are kept:
    "f32", "f16", or on GPUs "bf16", or "int8" or "e4m3" with a scale for each head of a token;
    `dtype` is what a GPU computes in, "f16" or "bf16" (then "f16" caches are "bf16" unless said
    otherwise): float16 is 8 times as exact, activations beyond 65504 need bfloat16. Recipes
    that look at data see the first `num_calibration_samples` sequences (128; 32 of "self") of
    `max_seq_length` tokens of `calibration`: texts, token ids, a .txt or .jsonl file, a data set,
    or "self", the default: text that the model writes, drawn with `seed`. w4 and w4a16 look at
    data only where it is given.
    `device` is where the model runs over the data: "cpu", "cuda", "cuda:1", or "auto", a GPU where
    torch has one. With `output` the artifact is written there, and finished weights are kept
    beside it until it is: with `resume` a compilation that was killed goes on from them. With
    `explain` the artifact says what every pass costs every layer, `artifact.explain()`.
    `progress=True` shows a bar; a function gets (step, fraction). TargetError, RecipeError and
    FormatError list the nearest names, and ArtifactError refuses an `output` that cannot be
    written, before anything is read. What cannot be stored as asked, or has no kernel, is refused
    before any long work.
    """
    machine, passes, _ = quantization(
        target, recipe, weights, bits, group_size, calibration, cache, dtype
    )  # fmt: skip
    data = calibration_of(calibration, num_calibration_samples, max_seq_length, seed, device)
    kept = kept_beside(output, resume)
    with shown(progress) as report:
        report("capture", 0.0)
        canonical = trace(model, example_inputs).canonicalize(report)
        require_possible(canonical.graph, passes, machine)
        run = canonical.explain if explain else canonical.quantize
        quantized = run(passes, report, calibration=replace(data, checkpoint=kept))
        planned = quantized.lower(machine, report)
        artifact = planned.build(output, target, report)
    if kept is not None:
        kept.remove()
    return artifact


def build(
    model: Any,
    target: str,
    output: str | Path,
    *,
    recipe: str | Recipe | Pipeline | None = None,
    weights: str | WeightFormat | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    dtype: str | None = None,
    calibration: Any = None,
    num_calibration_samples: int | None = None,
    max_seq_length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    resume: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
    progress: bool | Callable[[str, float], None] = False,
) -> dict[str, Any]:
    """Build a package for a device, such as "arm64-dotprod-w4": a library and a runner that need
    neither Python nor a compiler there. One for "cuda:sm_90-w4" is for this machine's kind of CPU
    and loads the GPU's driver there. Return its manifest.

    The other arguments are those of `compile`. `model` may also be the artifact of a torch target:
    then its weights are taken as they are stored, and the recipe of `target` is not run.
    TargetError where no compiler for the device is installed, UnsupportedError for a model that
    does not generate tokens or keeps an operation on torch.
    """
    from qc.backends.device.toolchain import toolchain_for  # loads TVM

    machine, passes, _ = quantization(
        target, recipe, weights, bits, group_size, calibration, dtype=dtype
    )
    if machine.device in ("torch", "rocm"):
        raise TargetError(f"packages are built for CPUs and for cuda; {target} is neither")
    if machine.gpu is None:
        toolchain_for(machine.machine)  # before anything long
    data = calibration_of(calibration, num_calibration_samples, max_seq_length, seed, device)
    kept = kept_beside(output, resume)
    with shown(progress) as report:
        if isinstance(model, str | Path) and (Path(model) / MANIFEST).is_file():
            if recipe is not None or weights is not None or bits or group_size:
                raise InputError("the weights of an artifact are built as they are stored")
            graph, facts = stored_model(Path(model), machine, target, report)
        else:
            report("capture", 0.0)
            canonical = trace(model, example_inputs).canonicalize(report)
            require_possible(canonical.graph, passes, machine)
            data = replace(data, checkpoint=kept)
            quantized = canonical.quantize(passes, report, calibration=data)
            planned = quantized.lower(machine, report)
            graph, facts = planned.graph, planned.facts(target)
        made = write_package(graph, machine, facts, Path(output), report)
    if kept is not None:
        kept.remove()
    return made


def write_package(
    graph: Graph, machine: Target, facts: ArtifactFacts, path: Path, report: Progress
) -> dict[str, Any]:
    """Write the package of a planned graph; return its manifest."""
    if machine.gpu is None:
        from qc.backends.device.package import write_device_package

        return write_device_package(graph, machine, facts, path, report)
    from qc.backends.device.cuda_package import write_cuda_package  # loads Triton

    return write_cuda_package(graph, machine, facts, path, report)


def stored_model(
    folder: Path, machine: Target, name: str, report: Progress
) -> tuple[Graph, ArtifactFacts]:
    """Read the quantized graph of an artifact and plan it for a machine.

    UnsupportedError for an artifact that holds code instead.
    """
    from qc.backends.artifact import ArtifactFacts
    from qc.backends.torch.artifact import read_graph

    manifest = read_manifest(folder)
    if manifest.executor != TORCH:
        raise UnsupportedError(
            f"{folder} holds code for {manifest.target.name} and no graph to build from: build "
            "from the model, or from an artifact of a torch target (qc compile --target torch-w4)"
        )
    graph = plan(machine).run(read_graph(folder, manifest), Context(machine, report))
    generate = manifest.generate
    facts = ArtifactFacts(
        name,
        () if generate is None else generate.eos,
        None if generate is None else generate.bos,
        manifest.context_length,
        folder if manifest.tokenizer else None,
        manifest.report,
    )
    return graph, facts


def explain(
    model: Any,
    target: str = "cpu-w4",
    *,
    recipe: str | Recipe | Pipeline | None = None,
    weights: str | WeightFormat | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    calibration: Any = None,
    num_calibration_samples: int | None = None,
    max_seq_length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    options: ExplainOptions | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    progress: bool | Callable[[str, float], None] = False,
) -> Explanation:
    """Quantize a model as `compile` with these arguments would, and say where the loss comes from:
    errors of every layer after every pass, and what each layer alone costs the logits."""
    _, passes, recipe_name = quantization(target, recipe, weights, bits, group_size, calibration)
    data = calibration_of(calibration, num_calibration_samples, max_seq_length, seed, device)
    with shown(progress) as report:
        report("capture", 0.0)
        canonical = trace(model, example_inputs).canonicalize(report)
        named = recipe if isinstance(recipe, str) else recipe_name
        quantized = canonical.explain(
            passes, report, calibration=data, options=options, name=named
        )  # fmt: skip
    found = quantized.explanation
    assert found is not None
    return found


def quantization(
    target: str,
    recipe: str | Recipe | Pipeline | None,
    weights: str | WeightFormat | None,
    bits: int | None,
    group_size: int | None,
    calibration: Any = None,
    cache: str | None = None,
    dtype: str | None = None,
) -> tuple[Target, Pipeline, str]:
    """Return the machine that a target names, the passes to run, and the recipe that it names."""
    machine, named = parse_target(target, RECIPES)
    machine = computing(machine, dtype)
    given = calibration is not None
    passes = resolve_recipe(recipe or named, weights, bits, group_size, given)
    if dtype == "bf16" and cache is None and CACHES["f16"] in passes.passes:
        cache = "bf16"  # what overflows float16 may be a key
    return machine, caching(passes, cache), named


def calibration_of(
    data: Any = None, num_calibration_samples: int | None = None, max_seq_length: int = 512,
    seed: int = 0, device: str = "cpu",
) -> Calibration:  # fmt: skip
    """Return calibration data as a `Calibration`, which may be one already; without any the model
    writes its own. InputError for a device that is not there."""
    if isinstance(data, Calibration):
        return data
    parse_device(device)
    written = data is None or (isinstance(data, str) and data == SELF)
    usual = WRITTEN_SAMPLES if written else GIVEN_SAMPLES
    count = usual if num_calibration_samples is None else num_calibration_samples
    return Calibration(SELF if data is None else data, count, max_seq_length, seed, device)


def kept_beside(output: str | Path | None, resume: bool) -> Checkpoint | None:
    """Return where finished weights are kept until the artifact is written."""
    if output is None:
        if resume:
            raise InputError("only a compilation with an output folder can be resumed")
        return None
    check_place(output)
    place = Path(output).absolute()
    return Checkpoint(place.with_name(f".{place.name}.unfinished"), resume)


def check(
    model: Any,
    target: str = "cpu-w4",
    *,
    recipe: str | Recipe | Pipeline | None = None,
    weights: str | WeightFormat | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    cache: str | None = None,
    dtype: str | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    progress: bool | Callable[[str, float], None] = False,
) -> CheckReport:
    """Say what `compile` with these arguments would make of a model: kernels, bytes, speed-ups,
    time and memory; or what it would refuse, why, and what would work instead.

    No weight is quantized and nothing is written. Predictions are nominal: decision 009.
    """
    machine, passes, _ = quantization(
        target, recipe, weights, bits, group_size, cache=cache, dtype=dtype
    )
    with shown(progress) as report:
        report("capture", 0.0)
        canonical = trace(model, example_inputs).canonicalize(report)
        report("check", 0.0)
        return canonical.check(machine, passes)


def shown(progress: bool | Progress) -> AbstractContextManager[Progress]:
    """Return what shows the progress: a bar, the caller's function, or nothing."""
    return progress_bar() if progress is True else nullcontext(progress or silent)
