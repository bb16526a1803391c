"""SmolLM2-135M, its weights off every 4-bit grid: the artifact computes what its graph means."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import qc
from qc.evaluation import evaluate_windows, windows_of
from qc.ir import ops
from qc.ir.node import make
from qc.ir.rewrite import substitute
from qc.ir.weights.dense import dense_term
from qc.ir.weights.weight import Weight
from qc.passes.exactness import distance
from qc.stages import CapturedModel, QuantizedModel
from tests.comparison import assert_close, assert_equal_up_to_flips
from tests.needs import needs

pytestmark = [needs("model"), pytest.mark.slow]

PROMPT = "The history of the city of Paris begins with"
WINDOW, WINDOWS = 512, 8


@dataclass(frozen=True)
class Compiled:
    quantized: QuantizedModel
    artifact: qc.Artifact


@pytest.fixture(scope="module")
def captured(offgrid_model: Path) -> CapturedModel:
    return qc.trace(offgrid_model)


@pytest.fixture(scope="module")
def w4(captured: CapturedModel) -> Compiled:
    quantized = captured.quantize("w4")
    return Compiled(quantized, quantized.lower("cpu").build())


@pytest.fixture(scope="module")
def w4a16(captured: CapturedModel) -> Compiled:
    quantized = captured.quantize("w4a16")
    return Compiled(quantized, quantized.lower("cpu").build())


@pytest.fixture(scope="module")
def windows(w4: Compiled, evaluation_text: Path) -> list[np.ndarray]:
    text = evaluation_text.read_text(encoding="utf-8")
    return windows_of(w4.artifact.text.encode(text, special_tokens=False), WINDOW, WINDOWS)


def test_every_layer_is_lifted(captured: CapturedModel, golden: Callable[[str, str], None]) -> None:
    graph = captured.quantize("f32").canonical
    leaves = (ops.Input, ops.Parameter, ops.Scalar)
    counts = Counter(node.op.name for node in graph.nodes if not isinstance(node.op, leaves))
    golden("real_model.json", json.dumps(dict(sorted(counts.items())), indent=2) + "\n")


def test_the_linears_take_at_most_five_bits_a_weight(w4: Compiled) -> None:
    report = w4.artifact.report().to_dict()
    summary = report["summary"]
    assert report["on_torch"] == []
    assert summary["linears"] == 30 * 7 + 1
    assert summary["bits_per_linear_weight"] <= 5.0
    # Counted again from what lies in the file: codes, scales and minima of the layers.
    weights = sum(row["shape"][0] * row["shape"][1] for row in report["rows"]
                  if row["kind"] == "linear")  # fmt: skip
    stored = (w4.artifact.path / "weights.safetensors").stat().st_size
    others = summary["table_bytes"] + summary["other_bytes"]
    assert 8 * (stored - others) / weights < 5.05  # 64-byte alignment and constants of the graph


@pytest.mark.parametrize("length", [1, 100])
def test_logits_are_those_of_the_quantized_graph(
    w4a16: Compiled, length: int, windows: list[np.ndarray]
) -> None:
    ids = torch.from_numpy(windows[0][:, :length])
    assert_close(w4a16.quantized(input_ids=ids)["logits"], w4a16.artifact(ids))


def test_token_by_token_is_the_same_function(w4a16: Compiled, windows: list[np.ndarray]) -> None:
    ids = windows[1][:, :40]
    session = w4a16.artifact.session()
    session.prefill(ids[:, :30])
    last = [session.step(int(token)) for token in ids[0, 30:]][-1]
    expected = w4a16.quantized(input_ids=torch.from_numpy(ids))["logits"][:, -1]
    assert_close(expected, torch.from_numpy(last))


def test_a_block_with_int8_activations_computes_what_its_graph_means(
    offgrid_model: Path, tmp_path: Path, windows: list[np.ndarray]
) -> None:
    """One block of the real model, with the interpreter emulating int8: nothing is amplified."""
    config = json.loads((offgrid_model / "config.json").read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(offgrid_model / "model.safetensors")
    quantized = qc.trace(tmp_path).quantize("w4")
    artifact = quantized.lower("cpu").build()
    for window in windows[:3]:
        ids = torch.from_numpy(window[:, :100])
        assert_equal_up_to_flips(quantized(input_ids=ids)["logits"], artifact(ids))


def test_int8_code_is_as_near_to_its_graph_as_the_graph_to_itself(
    w4: Compiled, windows: list[np.ndarray]
) -> None:
    """Thirty blocks amplify one flip of a code to all the noise of int8 activations: a rounding
    error of float32 in the norms moves the graph's own logits by 3e-2. The code may move them so
    far, not further; 1e-3 is out of reach of any two orders of summation."""
    ids = torch.from_numpy(windows[0][:, :100])
    expected = w4.quantized(input_ids=ids)["logits"]
    disturbed = disturb_norms(w4.quantized)(input_ids=ids)["logits"]
    assert distance(expected, w4.artifact(ids)) < 2 * distance(expected, disturbed)


def disturb_norms(model: QuantizedModel) -> QuantizedModel:
    """Move every factor of a norm by about one unit in the last place."""
    changed = {}
    for node in model.graph.parameters:
        if node.tensor.rank != 1 or not node.tensor.is_float:
            continue
        weight = node.op.weight
        values = weight.dense()
        values = values * (1 + 2**-23 * torch.randn(values.shape))
        term = Weight(weight.name, weight.shape, (dense_term(values),), weight.dtype)
        changed[node] = make(ops.Parameter(term))
    return replace(model, graph=substitute(model.graph, changed))


def test_int8_activations_cost_less_than_a_percent(
    w4: Compiled, w4a16: Compiled, windows: list[np.ndarray]
) -> None:
    integer = evaluate_windows(w4.artifact, windows).perplexity
    floating = evaluate_windows(w4a16.artifact, windows).perplexity
    assert integer == pytest.approx(floating, rel=0.01)


def test_it_writes_english(w4: Compiled) -> None:
    answer = "".join(w4.artifact.stream_text("What is the capital of France?", 24, chat=True))
    assert "Paris" in answer
