"""The format that docs/add-a-format.md writes out obeys every law and runs everywhere."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qc
import qc.ir.weights
from qc.backends.tvm.linear.rule import linear_rule
from qc.errors import FormatError
from qc.ir.plain import record_classes
from qc.ir.target import host_cpu
from qc.ir.types import ActivationFormat
from qc.ir.weights.catalog import example_formats, short_names, term_formats
from qc.ir.weights.notation import parse_term, parse_weights
from tests.backends.tvm.linear.cases import Case, worst_error
from tests.comparison import assert_equal_up_to_flips
from tests.ir.weights import test_formats as laws

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "add-a-format.md"
CACHES: tuple[Any, ...] = (term_formats, short_names, example_formats, record_classes)
"""What knows all formats."""

NAME, TEXT = "SquareFormat", "square4·g64"


@pytest.fixture(scope="module", autouse=True)
def _the_new_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lay the guide's code beside the files of qc.ir.weights, and take it away again."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    folder = tmp_path_factory.mktemp("formats")
    (folder / "square.py").write_text(code, encoding="utf-8")
    qc.ir.weights.__path__.append(str(folder))
    forget()
    try:
        yield
    finally:
        qc.ir.weights.__path__.remove(str(folder))
        del sys.modules["qc.ir.weights.square"], qc.ir.weights.square
        forget()


def forget() -> None:
    """Let the catalog look again."""
    importlib.invalidate_caches()
    for cached in CACHES:
        cached.cache_clear()


def laws_over(*arguments: str) -> list[Any]:
    """Return the laws with these arguments, those that hypothesis gives apart."""
    found = [law for name, law in vars(laws).items() if name.startswith("test_")]
    assert found
    return [
        pytest.param(law, id=law.__name__)
        for law in found
        if tuple(inspect.signature(law).parameters) == arguments
    ]


@pytest.mark.parametrize("law", laws_over("name"))
def test_it_obeys_the_laws_of_classes(law: Callable[..., None]) -> None:
    law(name=NAME)


@pytest.mark.parametrize("law", laws_over("format"))
def test_it_obeys_the_laws_of_formats(law: Callable[..., None]) -> None:
    for format in example_formats()[NAME]:
        law(format=format)


@pytest.mark.parametrize("outer", laws.COMBINED)
def test_it_stands_inside_other_formats(outer: str) -> None:
    for format in example_formats()[NAME]:
        laws.test_any_format_may_stand_inside_another(outer=outer, format=format)


def test_its_name_is_known_and_a_wrong_word_is_told() -> None:
    assert str(parse_weights("square4:g64 + rank4")) == "square4·g64 + rank4"
    with pytest.raises(FormatError, match=r"'min' is unknown here; known are a group"):
        parse_term("square4·g64·min")


def test_it_is_nearer_than_plain_integers_where_tiles_hold_outliers() -> None:
    """What the grid is for, at the same bits."""
    values = laws.matrix((33, 576), "outliers")
    square, plain = (parse_term(text).nearest(values) for text in (TEXT, "int4·g64"))
    assert square.bits == plain.bits
    assert (square.dense() - values).norm() < (plain.dense() - values).norm()


def test_the_cpu_multiplies_by_it_without_a_line_of_its_own() -> None:
    cases = [
        Case(33, 129, parse_weights(TEXT).terms, epilogue="bias"),
        Case(48, 64, parse_weights("square4·o16").terms, ActivationFormat(8, 32)),
        Case(33, 129, parse_weights(f"{TEXT} + rank4").terms),
    ]
    errors = worst_error(linear_rule, cases, host_cpu(), rows=(1, 13))
    assert max(errors.values()) < 1e-5, max(errors, key=lambda case: errors[case])


@pytest.mark.parametrize("weights", [TEXT, f"{TEXT} + rank4"])
def test_one_call_compiles_a_model_to_it(weights: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(72, 40), nn.ReLU(), nn.Linear(40, 24)).eval()
    x = torch.randn(13, 72)
    results = []
    for target in ("torch-w4", "cpu-w4"):
        place = tmp_path / f"{target}.qc"
        checked = qc.check(model, target, weights=weights, example_inputs=(x,))
        compiled = qc.compile(model, target, weights=weights, example_inputs=(x,), output=place)
        report = compiled.report().to_dict()
        assert {row["format"] for row in report["rows"] if row["kind"] == "linear"} == {weights}
        assert checked.accepted
        assert checked.summary["bytes"] == report["summary"]["linear_bytes"]
        results.append(compiled(x))
        assert torch.equal(qc.load(place)(x), results[-1])
    assert_equal_up_to_flips(*results)
