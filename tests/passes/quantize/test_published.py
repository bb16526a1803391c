"""SpQR, SqueezeLLM, CLAQ and AdaDim on matrices: what each paper's method must do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qc.errors import FormatError
from qc.ir.weights.notation import parse_term
from qc.ir.weights.sparse import SparseFormat
from qc.ir.weights.weight import Term, Weight
from qc.passes.calibration.checkpoint import name_of
from qc.passes.pipeline import Pass
from qc.passes.quantize.adaptive_axis import AdaptiveAxis, better_axis
from qc.passes.quantize.column_codebooks import ColumnCodebooks, outlier_ratios
from qc.passes.quantize.error_feedback import output_error, prepare
from qc.passes.quantize.gptq import Gptq
from qc.passes.quantize.sensitive_tables import SensitiveTables, sensitive_entries
from qc.passes.quantize.spqr import Spqr, leave_one_out, outlier_terms, spqr
from tests.passes.calibration.tiny import calibration, canonical, linears
from tests.passes.quantize.test_error_feedback import hessian
from tests.passes.quantize.test_gptq import errors, stored

SPQR = Spqr().format


def planted(rows: int = 32, cols: int = 64, outliers: int = 6) -> tuple[Tensor, Tensor]:
    """Return weights with some far ones, and where they are."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(rows, cols, generator=generator)
    place = torch.randperm(rows * cols, generator=generator)[:outliers]
    values.view(-1)[place] = torch.where(values.view(-1)[place] > 0, 15.0, -15.0)
    where = torch.zeros(rows, cols, dtype=torch.bool)
    where.view(-1)[place] = True
    return values, where


def summed(terms: tuple[Term, ...]) -> Tensor:
    return torch.stack([term.dense().float() for term in terms]).sum(0)


def run_spqr(values: Tensor, tau: float, search: bool = True) -> tuple[tuple[Term, ...], Tensor]:
    curvature = prepare(hessian(values.shape[1]), 1.0, sort=False)
    rounding = parse_term(SPQR).rounding((values.shape[0], values.shape[1]))
    assert rounding is not None
    dense, chosen, wanted = spqr(values, curvature, rounding, tau, search)
    return outlier_terms(dense, chosen, wanted), chosen


def test_spqr_finds_the_planted_outliers_and_keeps_them() -> None:
    values, where = planted()
    terms, chosen = run_spqr(values, 0.2)
    assert bool(chosen[where].all())
    assert str(terms[0].format) == SPQR
    assert isinstance(terms[1].format, SparseFormat)
    error = (summed(terms) - values).abs()
    assert float(error[where].max()) < 0.5 * float(error.max()) + 1.0


def test_spqr_keeps_more_with_a_smaller_tau_and_none_with_a_large_one() -> None:
    values, _ = planted()
    counts = [int(run_spqr(values, tau)[1].sum()) for tau in (0.05, 0.2, 1.0, 1e9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 0


def test_spqr_loses_less_with_outliers_and_with_search() -> None:
    values, _ = planted(outliers=40)
    h = hessian(64)

    def lost(terms: tuple[Term, ...]) -> float:
        return output_error((summed(terms) - values).T, h)

    none, unsearched, searched = (
        lost(run_spqr(values, tau, search)[0])
        for tau, search in ((1e9, True), (0.2, False), (0.2, True))
    )
    assert searched < unsearched < none


def test_leaving_one_out_gains_most_at_an_outlier() -> None:
    values = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    values[3, 2] = 30.0
    gains = leave_one_out(values, torch.ones(16), 7)
    assert int(gains[:, 2].argmax()) == 3
    assert float(gains[3, 2]) > 10 * float(gains[:, [0, 1, 3, 4]].max())


def test_squeezellm_marks_the_sensitive_and_then_the_large() -> None:
    values, fisher = torch.randn(20, 30), torch.rand(20, 30)
    chosen = sensitive_entries(values, fisher, 60, 10)
    assert int(chosen.sum()) == 60
    assert bool(chosen.flatten()[fisher.flatten().topk(10).indices].all())
    rest = values.abs().masked_fill(fisher >= fisher.flatten().topk(10).values[-1], -1)
    assert bool(chosen.flatten()[rest.flatten().topk(50).indices].all())


def test_squeezellm_is_exact_where_it_is_sparse_and_weighs_the_rest() -> None:
    values, where = planted()
    fisher = torch.rand(values.shape).square() + 1e-3
    terms = SensitiveTables("lookup3·row + sparse1%").terms_of(values, fisher)
    assert [str(t.format) for t in terms] == ["lookup3·row", "sparse1%"]
    torch.testing.assert_close(summed(terms)[where], values[where], rtol=2e-3, atol=2e-3)
    assert bool((terms[0].dense()[where].abs() < 5).all())  # no table reaches out for them

    def weighted(found: tuple[Term, ...]) -> float:
        return float(((summed(found) - values).square() * fisher).sum())

    plain = SensitiveTables("lookup3·row + sparse1%", weighted=False).terms_of(values, fisher)
    assert weighted(terms) < weighted(plain)
    nothing_felt = SensitiveTables("lookup3·row").terms_of(values, torch.zeros_like(values))
    evenly = parse_term("lookup3·row").nearest(values)
    torch.testing.assert_close(nothing_felt[0].dense(), evenly.dense())


def test_claq_has_a_table_a_column_and_no_index() -> None:
    graph = canonical()
    weights = stored(graph, ColumnCodebooks())
    weight = weights["model.layers.0.mlp.down_proj.weight"]
    assert set(weight.arrays()) == {"0.codes", "0.table"}
    by_rows = errors(graph, stored(graph, Gptq("int3·row·zero", sequencing="independent")))
    found = errors(graph, stored(graph, ColumnCodebooks(sequencing="independent")))
    assert sum(found.values()) < sum(by_rows.values())


def test_claq_parts_columns_and_keeps_outliers_as_planned() -> None:
    graph = canonical()
    one = ColumnCodebooks("lookup2·col", wide_per_million=100_000, outliers=True)
    weights = stored(graph, one)
    for linear in linears(graph):
        name = name_of(linear.inputs[1])
        assert weights[name].format == one.planned_format(linear.inputs[1])
    weight = weights["model.layers.0.mlp.up_proj.weight"]
    assert str(weight.format).startswith("columns7(lookup4·col) + columns57(lookup2·col) + sparse")
    plain = errors(graph, stored(graph, ColumnCodebooks("lookup2·col", sequencing="independent")))
    independent = ColumnCodebooks(
        "lookup2·col", wide_per_million=100_000, outliers=True, sequencing="independent"
    )
    parted = errors(graph, stored(graph, independent))
    assert sum(parted.values()) < sum(plain.values())


def test_claq_ranks_columns_even_where_nothing_is_far_out() -> None:
    columns = torch.ones(5, 8) * torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0]).unsqueeze(1)
    assert outlier_ratios(columns).argsort(descending=True).tolist() == [3, 4, 1, 2, 0]


def test_adadim_takes_the_axis_that_loses_less() -> None:
    """A large input with small weights needs groups of its own; a large output row does, too."""
    generator = torch.Generator().manual_seed(0)
    along, across = parse_term("int3·g16·zero"), parse_term("int3·o16·zero")
    values = torch.randn(64, 64, generator=generator)
    column, row, h = values.clone(), values.clone(), torch.eye(64)
    column[:, 7] /= 10
    h[7, 7] = 1e4
    row[7] *= 10
    assert better_axis(column, h, along, across) == across
    assert better_axis(row, torch.eye(64), along, across) == along


def test_adadim_loses_no_more_than_either_axis() -> None:
    graph = canonical()

    def of(text: str, one: type[Pass]) -> dict[str, float]:
        options = {"sequencing": "independent", "values": "nearest"}
        return errors(graph, stored(graph, one(text, **options)))  # type: ignore[call-arg]

    from qc.passes.quantize.round_to_nearest import RoundToNearest

    chosen = of("int3·g16·zero", AdaptiveAxis)
    inputs, outputs = (
        errors(graph, stored(graph, RoundToNearest(text)))
        for text in ("int3·g16·zero", "int3·o16·zero")
    )
    for name, lost in chosen.items():
        assert lost == pytest.approx(min(inputs[name], outputs[name]), rel=1e-4)


@pytest.mark.parametrize(
    ("cls", "text"),
    [(Spqr, "rank4"), (SensitiveTables, "sparse1%"), (ColumnCodebooks, "lookup3·row"),
     (AdaptiveAxis, "int3·g16·min·scale(uint6·g8)·minimum(uint6·g8)")],
)  # fmt: skip
def test_formats_that_do_not_fit_are_refused(cls: type[Pass], text: str) -> None:
    with pytest.raises(FormatError):
        cls(text)  # type: ignore[call-arg]


@pytest.mark.parametrize("one", [Spqr(), SensitiveTables(samples=2), ColumnCodebooks(),
                                 AdaptiveAxis("int3·g16·zero")])  # fmt: skip
def test_all_run_on_a_model_and_report_coverage(one: Pass) -> None:
    data = calibration()
    weights = stored(canonical(), one, data)
    assert len(data.coverage) == 14
    assert all(bits_are_bytes(weight) for weight in weights.values())
    assert all(w.bits_per_element < 9 for n, w in weights.items() if n in data.coverage)


def bits_are_bytes(weight: Weight) -> bool:
    return weight.bits == 8 * sum(a.numel() * a.element_size() for a in weight.arrays().values())
