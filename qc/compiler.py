"""compile(): the table of contents. capture -> canonical -> quantized -> planned -> built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qc.frontends import open_model
from qc.ir.target import parse_target
from qc.passes.pipeline import Pipeline
from qc.passes.recipes import RECIPES, Recipe
from qc.progress import progress_bar
from qc.runtime.package import check_place
from qc.stages import CapturedModel, resolve_recipe, silent

if TYPE_CHECKING:
    from qc.runtime import Artifact


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
    output: str | Path | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    progress: bool | Callable[[str, float], None] = False,
) -> Artifact:
    """Compile a model for a target, such as "cpu-w4", and return the artifact, ready to run.

    The recipe is the one that the target names unless `recipe` says otherwise. With `output` the
    artifact is written there. `progress=True` shows a bar; a function gets (step, fraction).
    TargetError and RecipeError list the nearest names, and ArtifactError refuses an `output` that
    cannot be written, before anything is read.
    """
    machine, recipe_name = parse_target(target, RECIPES)
    passes = resolve_recipe(recipe or recipe_name)
    if output is not None:
        check_place(output)
    shown = progress_bar() if progress is True else nullcontext(progress or silent)
    with shown as report:
        report("capture", 0.0)
        captured = trace(model, example_inputs)
        quantized = captured.quantize(passes, report)
        planned = quantized.lower(machine, report)
        return planned.build(output, target, report)
