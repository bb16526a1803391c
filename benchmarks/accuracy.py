"""Perplexity of a recipe by one protocol: the same text and the same windows for everybody.

    python -m benchmarks.accuracy build/smollm2-135m-offgrid --recipe gptq --bits 3 --group-size 64

Calibration: the first 128 windows of 512 tokens of the calibration text; evaluation: the first 64
of the evaluation text, each predicted from nothing but itself (511 losses); perplexity is the
exponential of their mean. Stored bits are counted over the linears of the blocks, everything
included; the head is listed apart. Results are kept as JSON and not computed twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qc.compiler import trace
from qc.ir import ops
from qc.ir.device import CPU
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.passes.calibration import Calibration
from qc.passes.calibration.calibration import inputs_of
from qc.passes.calibration.data import cut
from qc.passes.calibration.schedule import linear_groups, plan_steps
from qc.passes.calibration.walk import Walk
from qc.passes.pipeline import Pipeline
from qc.passes.recipes import Recipe
from qc.stages import CanonicalModel, encoder_of, resolve_recipe
from real_model import BUILD, CALIBRATION, EVALUATION

WINDOW, WINDOWS = 512, 64


def perplexity_of(
    graph: Graph, windows: Sequence[Tensor], device: torch.device = CPU
) -> float:  # fmt: skip
    """Return exp(mean loss) over windows i64[tokens]; every weight is decoded once."""
    total = math.fsum(losses_of(graph, windows, device))
    return math.exp(total / sum(len(window) - 1 for window in windows))


def losses_of(
    graph: Graph, windows: Sequence[Tensor], device: torch.device = CPU
) -> list[float]:  # fmt: skip
    """Return the sum of the losses of every window."""
    walk = Walk(graph, [inputs_of(graph, window.unsqueeze(0)) for window in windows], device)
    logits = graph.output("logits")
    linears = [n for n in graph.nodes if isinstance(n.op, ops.Linear)]
    groups = linear_groups(graph, linears)
    needed = frozenset(Graph(graph.inputs, (logits,), ("logits",)).nodes)
    steps = plan_steps([*([g.x] for g in groups if g.x in needed), [logits]])

    def losses(number: int, node: Node, value: Tensor) -> list[float]:
        expected = windows[number][1:].to(value.device)
        each = F.cross_entropy(value[0, :-1].float(), expected, reduction="none")
        return [float(each.sum(dtype=torch.float64))]

    with torch.no_grad():
        for step in steps[:-1]:
            walk.advance(step)
        return [sum(found) for found in walk.each_batch(steps[-1], losses)]


def evaluation_windows(model: CanonicalModel, text: Path, count: int) -> list[Tensor]:
    """Return the first windows of a text."""
    encode = encoder_of(model.captured.captured.tokenizer)
    assert encode is not None, "the model has no tokenizer"
    stream = torch.tensor(encode(text.read_text(encoding="utf-8")))
    return cut(stream, count, WINDOW)


def stored_bits(graph: Graph) -> dict[str, float]:
    """Return bits a weight of the linears of the blocks, of the head, and of everything stored; a
    branch beside a linear adds bits, but no weights."""
    bits = {"blocks": 0, "head": 0}
    weights: dict[str, dict[str, int]] = {"blocks": {}, "head": {}}
    seen: set[Node] = set()
    for node in graph.nodes:
        if isinstance(node.op, ops.Linear) and node.inputs[1] not in seen:
            seen.add(node.inputs[1])
            weight = node.inputs[1].op.weight  # type: ignore[attr-defined]
            place = "head" if node in graph.outputs else "blocks"
            bits[place] += weight.bits
            weights[place][weight.name.removesuffix(".branch")] = weight.elements
    for parameter in graph.parameters:
        if isinstance(parameter.op, ops.Parameter):
            weight = parameter.op.weight
            bits["everything"] = bits.get("everything", 0) + weight.bits
            name = weight.name.removesuffix(".branch")
            weights.setdefault("everything", {}).setdefault(name, weight.elements)
    return {
        place: round(bits[place] / sum(known.values()), 4)
        for place, known in weights.items()
        if known
    }


def measure(
    model: CanonicalModel,
    recipe: str | Recipe | Pipeline,
    calibration: Calibration,
    windows: int = WINDOWS,
    text: Path = EVALUATION,
) -> dict[str, Any]:
    """Quantize and evaluate; return what was found, as plain JSON."""
    start = time.perf_counter()
    quantized = model.quantize(recipe, calibration=calibration)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    found = evaluation_windows(model, text, windows)
    perplexity = perplexity_of(quantized.graph, found, calibration.place)
    errors = [each.error for each in quantized.coverage.values() if each.error is not None]
    return {
        "perplexity": round(perplexity, 4),
        "bits": stored_bits(quantized.graph),
        "quantize_seconds": round(seconds, 1),
        "quantize_gigabytes": round(peak, 2),
        "mean_output_error": round(sum(errors) / len(errors), 6) if errors else None,
        "windows": windows,
        "passes": [repr(one) for one in resolve_recipe(recipe).passes],
    }


def remembered(folder: Path, facts: Mapping[str, Any], compute: Any) -> dict[str, Any]:
    """Return the result for these facts, computed where it is not in the folder yet."""
    key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()
    file = folder / f"{key}.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {**facts, **compute()}
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--recipe", default="gptq")
    parser.add_argument("--weights", metavar="FORMAT")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--calibration", default=str(CALIBRATION))
    parser.add_argument("--num-calibration-samples", type=int, default=128)
    parser.add_argument("--max-seq-length", type=int, default=WINDOW)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--text", default=str(EVALUATION))
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--results", default=str(BUILD / "accuracy"))
    options = parser.parse_args()
    passes = resolve_recipe(options.recipe, options.weights, options.bits, options.group_size)
    data: Any = options.calibration if options.calibration == "self" else Path(options.calibration)
    calibration = Calibration(
        data, options.num_calibration_samples, options.max_seq_length, options.seed, options.device
    )
    facts = {
        "model": str(options.model),
        "recipe": options.recipe,
        "configuration": repr(passes),
        "calibration": [str(data), *(calibration.num_calibration_samples,
                        calibration.max_seq_length, calibration.seed)],
        "device": calibration.place.type,
        "text": options.text,
        "windows": options.windows,
    }  # fmt: skip
    result = remembered(
        Path(options.results), facts,
        lambda: measure(trace(options.model).canonicalize(), passes, calibration,
                        options.windows, Path(options.text)),
    )  # fmt: skip
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
