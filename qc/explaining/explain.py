"""Run the passes of a recipe and keep account of what each of them costs every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qc.explaining.divergence import divergences, whole_divergence
from qc.explaining.layers import Layer, layers_of
from qc.explaining.suggest import relative_output_error, suggest
from qc.ir.graph import Graph
from qc.ir.threads import side_by_side
from qc.passes.calibration import Calibration, Samples
from qc.passes.pipeline import Context, Pass, Pipeline
from qc.passes.transform.calibrated import first_sequences
from qc.runtime.explanation import Explanation, LayerFigures, PassFigures

SAMPLES = Samples(per_sequence=64)


@dataclass(frozen=True)
class ExplainOptions:
    """How much is measured: output errors on some tokens of the first `sequences`; divergences on
    the first `divergence_tokens` tokens of the data (0: none); suggestions for the worst layers."""

    sequences: int = 8
    divergence_tokens: int = 128
    suggestions: int = 12


@dataclass
class Account:
    """What is known while passes run. `reference` is the graph before anything was lost, in the
    basis of the current graph; `steps` the figures of every layer so far."""

    calibration: Calibration
    reference: Graph | None = None
    steps: dict[str, list[PassFigures]] = field(default_factory=dict)

    def inputs(self) -> dict[str, Tensor]:
        """Return samples of what every layer of the reference reads."""
        assert self.reference is not None
        layers = layers_of(self.reference)
        known = self.calibration.measure(
            self.reference, {layer.x: (SAMPLES,) for layer in layers.values()}
        )
        return {name: known[layer.x, SAMPLES] for name, layer in layers.items()}


def explain(
    graph: Graph, pipeline: Pipeline, context: Context, options: ExplainOptions | None = None,
    source: str = "", recipe: str = "",
) -> tuple[Graph, Explanation]:  # fmt: skip
    """Run the passes and return the quantized graph and the figures.

    Weights are compared in the basis in which they are stored: exact passes that change the basis
    change the reference too. RecipeError where the context has no calibration data.
    """
    wanted = options or ExplainOptions()
    calibration = context.calibration or Calibration().bound(graph, None, None)
    account = Account(first_sequences(calibration, wanted.sequences))
    current = graph
    for number, one in enumerate(pipeline.passes):
        context.progress(one.name, number / len(pipeline.passes))
        after = pipeline.run_pass(one, current, context)
        record(account, one, current, after, context)
        current = after
    context.progress("explain", 1.0)
    return current, summed_up(account, graph, current, wanted, context, source, recipe)


def record(account: Account, one: Pass, before: Graph, after: Graph, context: Context) -> None:
    """Note what a pass did to each layer."""
    old, new = layers_of(before), layers_of(after)
    changed = [name for name in new if name in old and old[name].weights != new[name].weights]
    if not changed:
        return
    keeps_formats = all(old[name].format == new[name].format for name in changed)
    if one.exact and keeps_formats:
        if account.reference is not None:
            account.reference = one.run(account.reference, Context(context.target))
        return
    if account.reference is None:
        account.reference = before
    inputs, originals = account.inputs(), layers_of(account.reference)

    def figures(name: str) -> PassFigures:
        values = originals[name].values()
        error = new[name].values() - values
        relative = float(error.norm() / values.norm().clamp_min(1e-30))
        lost = relative_output_error(inputs[name], error, values)
        return PassFigures(one.name, new[name].format, new[name].bits, relative, lost)

    for name, found in side_by_side(figures, changed):
        account.steps.setdefault(name, []).append(found)


def summed_up(
    account: Account, original: Graph, final: Graph, options: ExplainOptions, context: Context,
    source: str, recipe: str,
) -> Explanation:  # fmt: skip
    """Measure divergences, find suggestions, and sort the layers."""
    if account.reference is None:
        return Explanation(source, recipe, 0, 0, ())
    kept, stored = layers_of(account.reference), layers_of(final)
    layers = [
        LayerFigures(name, number, kept[name].shape, kept[name].bits, tuple(account.steps[name]))
        for number, name in enumerate(name for name in stored if name in account.steps)
    ]
    inputs = account.inputs()
    tokens = max(len(x) for x in inputs.values())
    wanted = options.divergence_tokens if "logits" in original.output_names else 0
    ids = first_tokens(account.calibration, wanted)
    whole = None
    if len(ids):
        pairs = [(kept[layer.name], stored[layer.name]) for layer in layers]
        layers = with_divergences(account.reference, ids, pairs, layers, context.progress)
        whole = whole_divergence(original, final, ids)
    layers.sort(key=lambda layer: -layer.loss)
    layers = with_suggestions(layers, kept, inputs, options.suggestions)
    count = 0 if whole is None else len(ids)
    return Explanation(source, recipe, tokens, count, tuple(layers), whole)


def first_tokens(calibration: Calibration, count: int) -> Tensor:
    """Return the first tokens of the first sequence."""
    sequences = calibration.sequences() if count else [torch.zeros(0, dtype=torch.int64)]
    return sequences[0][:count]


def with_divergences(
    reference: Graph, ids: Tensor, pairs: Sequence[tuple[Layer, Layer]],
    layers: Sequence[LayerFigures], progress: Callable[[str, float], None],
) -> list[LayerFigures]:  # fmt: skip
    """Add to every layer what the model loses by it alone."""
    found = []
    measured = divergences(reference, ids, pairs)
    for number, (layer, (_, lost)) in enumerate(zip(layers, measured, strict=True)):
        found.append(replace(layer, divergence=lost))
        progress(f"without {layer.name}", (number + 1) / len(layers))
    return found


def with_suggestions(
    layers: Sequence[LayerFigures], kept: dict[str, Layer], inputs: dict[str, Tensor], count: int
) -> list[LayerFigures]:
    """Add suggestions to the worst layers."""

    def find(layer: LayerFigures) -> str:
        return suggest(kept[layer.name].values(), inputs[layer.name], layer.stored)

    worst = side_by_side(find, layers[:count])
    return [*(replace(layer, suggestion=text) for layer, text in worst), *layers[count:]]
