"""What `check` says of a tiny llama: every linear as it will be compiled, or a way that works."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import qc
from qc.checking.cost import compile_cost
from qc.checking.report import CheckReport
from qc.checking.roofline import Work, flat_from, speedup
from qc.cli import main
from qc.errors import FormatError
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.target import CPUS
from qc.ir.weights.notation import parse_weights
from qc.passes.pipeline import Context, Pass, Pipeline
from qc.passes.preview import preview
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.nearby import nearest_accepted
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.recipes import RECIPES, ROUNDING
from qc.passes.recipes.rounding import INT4
from qc.stages import CanonicalModel, resolve_recipe
from tests.tiny_llama import llama_folder

SUM = "int3·g64 + rank16 + sparse0.5%"
TOO_MUCH = "int3·g64 + rank60"
"""More than 56 x 56 and 28 x 56 have."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def canonical(folder: Path) -> CanonicalModel:
    return qc.trace(folder).canonicalize()


def no_values(*arguments: Any) -> Any:
    raise AssertionError("a weight was quantized before it was checked")


# ---------------------------------------------------------------- the report


@pytest.mark.parametrize("weights", [None, SUM])
def test_the_report_is_what_compiling_stores(
    canonical: CanonicalModel, folder: Path, weights: str | None
) -> None:
    report = canonical.check("cpu", "w4", weights=weights)
    artifact = canonical.quantize("w4", weights=weights).lower("cpu").build()
    compiled = artifact.report().to_dict()
    linears = {row["name"]: row for row in compiled["rows"] if row["kind"] == "linear"}
    checked = {name: row for row in report.rows for name in row.names}
    assert checked.keys() == linears.keys()
    for name, row in checked.items():
        assert row.format == linears[name]["format"]
        assert row.bits_a_weight == pytest.approx(linears[name]["bits_per_weight"], abs=1e-4)
        assert any(f"linear_{'_'.join(row.kernel)}" in source for source in artifact.sources)
    assert report.summary["bytes"] == compiled["summary"]["linear_bytes"]
    assert report.summary["linears"] == compiled["summary"]["linears"]
    assert report.accepted


def test_equal_linears_are_one_row(canonical: CanonicalModel) -> None:
    rows = canonical.check("cpu", "w4").rows
    counts = {row.shape: row.count for row in rows}
    assert counts[56, 56] == counts[28, 56] == counts[72, 56] == 2
    assert counts[56, 72] == 1
    text = str(canonical.check("cpu", "w4"))
    assert "model.layers.*.self_attn.q_proj.weight, ...o_proj.weight" in text
    assert f"{INT4}, int8/g32" in text
    assert "bytes read for each token" in text
    assert "compiling will take about" in text


def test_the_torch_target_takes_everything_and_promises_nothing(canonical: CanonicalModel) -> None:
    report = canonical.check("torch", "w4", weights=SUM)
    assert report.accepted
    assert {row.kernel for row in report.rows} == {("reference interpreter",)}
    assert report.notes == ("reference interpreter, no speed-up",)
    assert not report.speedups


@pytest.mark.parametrize(
    ("recipe", "machine", "code", "lacking"),
    [
        ("fp4", "cuda:sm_90+sm_120", "e2m1", "sm_90"),
        ("fp8", "cuda:sm_80+sm_86+sm_90", "e4m3", "sm_80, sm_86"),
        ("fp4", "cuda:sm_100+sm_120", "e2m1", None),
        ("fp8", "cuda:sm_89", "e4m3", None),
    ],
)
def test_products_of_small_floats_are_named_where_they_are_missing(
    recipe: str, machine: str, code: str, lacking: str | None
) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 72), nn.Linear(72, 8))
    report = qc.trace(model, torch.zeros(3, 64)).canonicalize().check(machine, recipe)
    assert any("linear_" + recipe in row.kernel for row in report.rows) == (lacking is None)
    count = 3 if recipe == "fp8" else 2  # 72 channels are no whole groups of 16
    assert [note for note in report.notes if "inputs multiply" in note] == (
        []
        if lacking is None
        else [
            f"{count} of {count} linears with {code} inputs multiply in float16: "
            f"no products of {code} on {lacking}"
        ]
    )


def test_no_value_is_computed(canonical: CanonicalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoundToNearest, "quantize", no_values)
    monkeypatch.setattr("qc.passes.quantize.tables.stored_as", no_values)
    assert canonical.check("cpu", "w4").accepted
    assert not canonical.check("cpu", "w4", weights=TOO_MUCH).accepted


@pytest.mark.parametrize("recipe", [each.name for each in ROUNDING])
def test_a_preview_is_the_graph_that_the_passes_return(
    canonical: CanonicalModel, recipe: str
) -> None:
    seen = preview(resolve_recipe(recipe), canonical.graph).graph
    assert seen is not None
    assert seen.same_as(canonical.quantize(recipe).graph)


@dataclass(frozen=True)
class ZeroSmall(Pass):
    """w --> w, after a look at its values."""

    name: ClassVar[str] = "zero_small"

    def run(self, graph: Graph, context: Context) -> Graph:
        weights = [
            node.op.weight for node in graph.parameters if isinstance(node.op, ops.Parameter)
        ]
        assert all(float(weight.dense().abs().max()) >= 0 for weight in weights)
        return graph


def test_passes_that_read_values_are_run(canonical: CanonicalModel) -> None:
    passes = resolve_recipe("w4") + [ZeroSmall()]  # noqa: RUF005  # no list
    report = canonical.check("cpu", passes)
    assert report.rows == canonical.check("cpu", "w4").rows
    assert "the passes were run" in report.notes[0]


# ---------------------------------------------------------------- refusals


def test_a_refusal_says_why_and_what_would_work(canonical: CanonicalModel) -> None:
    report = canonical.check("cpu", "w4", weights=TOO_MUCH)
    assert not report.accepted
    assert not report.rows
    shapes = {each.shape for each in report.refusals}
    assert shapes == {(56, 56), (28, 56), (72, 56), (56, 72), (320, 56)}
    first = report.refusals[0]
    assert "rank 60 is more than 56 x 56 has" in first.reason
    assert first.instead == "int3·g64 + rank56"
    assert "(and 1 more of this shape)" in str(report)
    for each in report.refusals:
        assert parse_weights(each.instead).refusal(each.shape) is None
    accepted = canonical.check("cpu", "w4", weights="int3·g64 + rank28")
    assert accepted.accepted


@pytest.mark.parametrize(
    ("asked", "shape", "found"),
    [
        ("rank16", (7, 31), "rank7"),
        ("int3·g64 + rank16", (1, 7), "int3·g64 + rank1"),
        ("kept50%·g16(int4·row)", (33, 129), "kept50%·g3(int4·row)"),
        ("columns9(int8·row) + int2·g32", (4, 7), "columns7(int8·row) + int2·g32"),
        ("int4·g32", (3, 5), "int4·g32"),
    ],
)
def test_the_nearest_format_is_accepted(asked: str, shape: tuple[int, int], found: str) -> None:
    near = nearest_accepted(parse_weights(asked), shape)
    assert str(near) == found
    assert near.refusal(shape) is None


def test_compile_refuses_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RoundToNearest, "run", no_values)
    place = tmp_path / "m"
    with pytest.raises(
        FormatError, match=r"rank 60 is more than 56 x 56.*; int3·g64 \+ rank56 can"
    ):
        qc.compile(folder, "cpu-w4", weights=TOO_MUCH, output=place)
    assert not place.exists()


def test_unknown_formats_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    for call in (qc.compile, qc.check):
        with pytest.raises(FormatError, match=r"unknown weight format 'ran16'.*rank16"):
            call(tmp_path / "absent", "cpu-w4", weights="int3:g64 + ran16")


# ---------------------------------------------------------------- weights=


def test_the_format_takes_the_place_of_the_recipes() -> None:
    stored = RoundToNearest(SUM)
    for recipe in ("w4", "w2_rtn", "w8a16"):
        passes = resolve_recipe(recipe, SUM).passes
        named = RECIPES[recipe].passes
        assert passes == tuple(stored if isinstance(p, RoundToNearest) else p for p in named)
    assert resolve_recipe("f32", SUM).passes == (*RECIPES["f32"].passes, stored)
    alone = Pipeline([QuantizeActivations()], verify=True)
    assert resolve_recipe(alone, SUM).passes == (stored, QuantizeActivations())
    assert resolve_recipe(alone, SUM).verify


def test_a_sum_is_compiled(folder: Path) -> None:
    artifact = qc.compile(folder, "torch-w4", weights="int3:g64 + rank4 + sparse0.5%")
    formats = {row["format"] for row in artifact.report().to_dict()["rows"]}
    assert "int3·g64 + rank4 + sparse0.5%" in formats
    assert artifact.generate([5, 6, 7], 2) is not None


# ---------------------------------------------------------------- predictions


def test_a_roofline_is_flat_where_arithmetic_takes_over() -> None:
    target = CPUS["x86_64-v3"]
    sixteen = Work(8000, 1000.0, 1000.0, 4)  # reads for 4 rows as long as it computes one
    quarter, integers = Work(2000, 1000.0, 1000.0, 4), Work(2000, 1000.0, 500.0, 4)
    assert speedup(quarter, sixteen, 1, target) == 4.0
    assert speedup(integers, sixteen, 128, target) == pytest.approx(129 / 65)
    assert flat_from(sixteen, sixteen, target) == 1
    assert flat_from(quarter, sixteen, target) == 4
    assert flat_from(integers, sixteen, target) is None


@pytest.mark.fast_rules
def test_few_bits_are_read_faster(canonical: CanonicalModel) -> None:
    two, four = (canonical.check("cpu:x86_64-v3", recipe) for recipe in ("w2_rtn", "w4"))
    assert two.summary["bytes_per_token"] < four.summary["bytes_per_token"]
    assert 1 < four.speedups[1] <= two.speedups[1]


def test_an_estimate_grows_with_what_there_is_to_do(canonical: CanonicalModel) -> None:
    before = [n.op.weight for n in canonical.graph.parameters if isinstance(n.op, ops.Parameter)]
    format = parse_weights("int4·g32")
    after = [format.planned(w.name, w.shape, w.dtype) for w in before if len(w.shape) == 2]
    less, more = (compile_cost(before, after, after, kernels) for kernels in (1, 30))
    assert less.kernels < more.kernels
    assert less.quantize > 0
    assert less.memory > sum(weight.bits for weight in before) // 8


class Bare(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_a_model_without_linears_is_fine() -> None:
    report = qc.check(Bare(), "cpu-w4", example_inputs=(torch.zeros(2, 3),))  # type: ignore[arg-type]
    assert report.accepted
    assert "no linears" in str(report)


# ---------------------------------------------------------------- the command


def run(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    assert main(["check", *map(str, arguments), "--quiet"]) == status
    return capsys.readouterr().out


def test_the_command_prints_the_report_as_text_and_json(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    said = run(capsys, 0, folder, "--weights", "int3:g64+rank4")
    assert "int3·g64 + rank4, int8/g32" in said
    content = json.loads(run(capsys, 0, folder, "--target", "cpu-w3_rtn", "--json"))
    assert content["accepted"]
    assert {row["format"] for row in content["rows"]} == {"int3·g32·min"}
    assert content["compile"]["memory_bytes"] > 0
    assert content["summary"]["bytes"] == sum(row["bytes"] for row in content["rows"])


def test_the_command_fails_where_something_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    said = run(capsys, 1, folder, "--weights", TOO_MUCH)
    assert said.startswith("refused: weight ")
    assert "int3·g64 + rank56 can" in said
    content = json.loads(run(capsys, 1, folder, "--weights", TOO_MUCH, "--json"))
    assert not content["accepted"]
    assert content["refusals"][0]["instead"] == "int3·g64 + rank56"
    assert isinstance(CheckReport("", "cpu", 1).to_dict(), dict)


def test_a_gpu_that_nobody_measured_is_promised_nothing(canonical: CanonicalModel) -> None:
    report = canonical.check("rocm:gfx942", "w4a16")
    assert {name for row in report.rows for name in row.kernel} == {"linear_affine"}
    assert not any(row.speedups for row in report.rows)
    assert not report.speedups
    assert "no speed-up is promised" in str(report)


def test_a_gpu_has_its_own_kernels_and_predictions(canonical: CanonicalModel) -> None:
    report = canonical.check("cuda:sm_80+sm_90", "w4a16")
    assert report.accepted
    assert all("reference" not in name for row in report.rows for name in row.kernel)
    for row in report.rows:  # never more than the bytes that are saved
        assert all(0 < each <= 16 / row.bits_a_weight for each in row.speedups.values())
    one = canonical.check("cuda:sm_90", "w4a16").cost
    assert one is not None
    assert report.cost is not None
    assert report.cost.kernels > one.kernels  # each architecture is compiled for


def test_a_gpu_gains_nothing_from_inputs_in_small_groups(canonical: CanonicalModel) -> None:
    said = str(canonical.check("cuda:sm_90", "w4"))
    assert "linears with int8/g32 inputs multiply in floating point" in said
    assert "w4a16 in place of w4" in said
    rounded, plain = (canonical.check("cuda:sm_90", recipe).rows for recipe in ("w4", "w4a16"))
    assert {row.activation for row in rounded} == {"int8/g32"}
    assert [replace(row, activation="float32") for row in rounded] == list(plain)  # as fast
    assert "in floating point" not in str(canonical.check("cuda:sm_90", "w4a16"))
    assert "in floating point" not in str(canonical.check("cpu", "w4"))
