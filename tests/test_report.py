"""The report counts every stored bit once, and the text shows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qc
from qc.passes.recipes.rounding import INT4
from qc.progress import progress_bar
from qc.report import compile_report
from qc.runtime.tables import Report


class Small(nn.Module):
    """A table, a linear that shares it, one of its own with a bias, and an image kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 48)
        self.inner = nn.Linear(48, 48)
        self.head = nn.Linear(48, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.table(ids)))


IDS = torch.zeros(2, 5, dtype=torch.int64)
LINEAR, TABLE, BIAS = 48 * 48, 40 * 48, 48


def report_of(recipe: str) -> dict[str, object]:
    graph = qc.trace(Small().eval(), (IDS,)).quantize(recipe).graph
    return compile_report(graph, "here", f"cpu-{recipe}")


def test_float_weights_take_32_bits_and_a_shared_table_counts_once() -> None:
    report = report_of("f32")
    summary = report["summary"]
    assert report["source"] == "here"
    assert report["target"] == "cpu-f32"
    assert summary["parameters"] == LINEAR + TABLE + BIAS
    assert summary["linears"] == 2
    assert summary["bits_per_linear_weight"] == 32
    stored = summary["linear_bytes"] + summary["table_bytes"] + summary["other_bytes"]
    assert stored == 4 * (LINEAR + TABLE + BIAS)


def test_quantized_weights_take_what_the_format_says() -> None:
    report = report_of("w4")
    rows = {(row["name"], row["kind"]): row for row in report["rows"]}
    inner = rows["inner.weight", "linear"]
    assert inner["shape"] == [48, 48]
    assert inner["format"] == INT4
    # 48 rows of 48 codes in 4 bits and of 2 groups, a full one and a tail, with 2 x 8 bits each;
    # and two factors of 16 bits.
    assert inner["bytes"] == 48 * (48 * 4 + 2 * 16 + 32) // 8
    assert inner["bits_per_weight"] == pytest.approx(4 + 64 / 48, abs=1e-4)
    # The shared table is stored twice now: in 4 bits for the head, in 8 for the embedding, with a
    # scale of 16 bits for each of its 40 rows.
    kinds = sorted(row["kind"] for row in report["rows"])
    assert kinds == ["linear", "linear", "table"]
    summary = report["summary"]
    assert summary["table_bytes"] == TABLE + 2 * 40
    assert summary["linear_bytes"] == sum(
        r["bytes"] for r in rows.values() if r["kind"] == "linear"
    )
    weights = LINEAR + TABLE
    expected = 8 * summary["linear_bytes"] / weights
    assert summary["bits_per_linear_weight"] == pytest.approx(expected, abs=1e-4)


def test_the_text_says_what_stayed_on_torch() -> None:
    topk = {"op": "aten.topk.default", "origin": "router"}
    again = {"op": "aten.topk.default", "origin": "layers.1.router"}
    sort = {"op": "aten.sort.default", "origin": ""}
    text = str(Report({"summary": {"linears": 1}, "on_torch": [topk, again, topk, sort]}))
    assert "stayed on torch:" in text
    assert "aten.topk.default at router, layers.1.router\n" in text
    assert "aten.sort.default at the model" in text
    assert "nothing stayed on torch" in str(Report({"on_torch": []}))
    assert "torch" not in str(Report({"summary": {"linears": 1}}))


def test_progress_tells_every_step_between_nothing_and_everything() -> None:
    seen: list[tuple[str, float]] = []
    qc.compile(
        Small().eval(), "torch-w4", example_inputs=(IDS,), progress=lambda *step: seen.append(step)
    )
    names = [name for name, _ in seen]
    assert names[0] == "capture"
    assert "round_to_nearest" in names
    assert "write weights" in names
    assert all(0 <= fraction <= 1 for _, fraction in seen)


def test_a_bar_is_drawn_on_standard_error_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as show:
        show("capture", 0.5)
    assert capfd.readouterr().out == ""
