"""The laws of every storage format. A new file in qc/ir/weights is found by being there: what is
tried are the `examples` of its class, on matrices of odd sizes."""

import json
import re
import warnings
from functools import cache, partial

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import make
from qc.ir.plain import read_value, write_value
from qc.ir.serialize import graph_from_json, graph_to_json
from qc.ir.weights.catalog import example_formats, term_formats
from qc.ir.weights.columns import OnColumnsFormat
from qc.ir.weights.expression import COL, ENTRY, LANE, ROW, Expr, Index, Sum, TorchRendering, walk
from qc.ir.weights.kept_groups import KeptGroupsFormat
from qc.ir.weights.low_rank import LowRankFormat
from qc.ir.weights.notation import parse_term, parse_weights
from qc.ir.weights.structure import Chain, Entries, Part, Selected
from qc.ir.weights.weight import Term, TermFormat, Weight, WeightFormat, inside

pytestmark = pytest.mark.filterwarnings("error")

SIZES = (1, 7, 31, 33, 127, 129, 576)
MOST_ELEMENTS = 21_000
"""Larger matrices say nothing more, and take some formats seconds to fill."""

USUAL = ((33, 576), (36, 576))
SHAPES = tuple((r, c) for r in SIZES for c in SIZES if r * c <= MOST_ELEMENTS) + USUAL[1:]
KINDS = ("normal", "outliers", "equal", "zero")

FORMATS = {str(format): format for listed in example_formats().values() for format in listed}

every_class = pytest.mark.parametrize("name", term_formats())
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
few = settings(max_examples=8, suppress_health_check=list(HealthCheck))
fewer = settings(few, max_examples=2)


# ---------------------------------------------------------------- terms to try


def matrix(shape: tuple[int, int], kind: str) -> Tensor:
    """Return values of the size that weights have."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    values = 0.05 * torch.randn(shape, generator=generator)
    match kind:
        case "outliers":
            return torch.where(values.abs() > 0.1, 20 * values, values)
        case "equal":
            return torch.full(shape, 0.25)
        case "zero":
            return torch.zeros(shape)
    return values


@cache
def stored(format: TermFormat, shape: tuple[int, int], kind: str = "normal") -> Term:
    """Store a matrix; once, for some formats search long."""
    return format.nearest(matrix(shape, kind))


@cache
def accepted(format: TermFormat) -> tuple[tuple[int, int], ...]:
    """Return the shapes that a format can store."""
    return tuple(shape for shape in SHAPES if format.refusal(shape) is None)


@st.composite
def terms(draw: st.DrawFn, name: str) -> Term:
    """Draw a term of a class: any of its examples, any size, any kind of values."""
    usable = [format for format in example_formats()[name] if accepted(format)]
    format = draw(st.sampled_from(usable))
    return stored(format, draw(st.sampled_from(accepted(format))), draw(st.sampled_from(KINDS)))


# ---------------------------------------------------------------- what they mean


def elements(expr: Expr, arrays: dict[str, Tensor], indices: dict[str, Tensor]) -> Tensor:
    """Evaluate an expression where these indices meet."""
    shape = torch.broadcast_shapes(*(index.shape for index in indices.values()))
    return TorchRendering(arrays, indices).value(expr).expand(shape)


def some_rows(term: Term) -> Tensor:
    """Return rows to decode: all of them, or the last where each element is a sum: the reference
    adds up term by term, over the longest range of all elements."""
    rows = torch.arange(term.shape[0], dtype=torch.int32)
    return rows[-1:] if has_sum(term) else rows


def columns_of(term: Term) -> Tensor:
    return torch.arange(term.shape[1], dtype=torch.int32)[None]


def has_sum(term: Term) -> bool:
    return any(isinstance(each, Sum) for each in walk(term.format.decode(term.shape, ROW, COL)))


def check_decode(term: Term, row: Index = ROW, col: Index = COL) -> None:
    """Require that the decode expression gives the dense values."""
    dense = term.dense().float()
    assert dense.shape == term.shape
    expr = term.format.decode(term.shape, row, col)
    rows = some_rows(term)
    found = elements(expr, term.arrays(), {row.axis: rows[:, None], col.axis: columns_of(term)})
    assert found.dtype == torch.float32
    assert_near(found, dense[rows.long()], 1e-5)


def assert_near(found: Tensor, expected: Tensor, relative: float) -> None:
    """Compare to rounding errors of the largest value: sums may be added in another order."""
    most = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=relative, atol=relative * most)


def product(term: Term, x: Tensor) -> Tensor:
    """Multiply x [..., in] in float64 as the structure of a term says: the reference of it."""
    structure = term.format.structure(term.shape)
    match structure:
        case Selected(index, part):
            return multiplied(term, part, x[..., term.stored[index].long()])
        case Chain(steps):
            for step in steps:
                seen = x.reshape(*x.shape[:1], step.before, step.part.shape[1], step.after)
                x = multiplied(term, step.part, seen.transpose(2, 3)).transpose(2, 3)
            return x.reshape(x.shape[0], -1)
        case Entries():
            return gathered(term, structure, x)
    return x @ term.dense().double().T


def multiplied(term: Term, part: Part, x: Tensor) -> Tensor:
    """Multiply by a matrix inside a term, which may be structural too."""
    inner = part.format.term(part.shape, inside(part.prefix, term.stored))
    flat = product(inner, x.reshape(-1, x.shape[-1]))
    return flat.view(*x.shape[:-1], -1)


def gathered(term: Term, entries: Entries, x: Tensor) -> Tensor:
    """Add up the entries of every row."""
    arrays, rows = term.arrays(), torch.arange(term.shape[0], dtype=torch.int32)
    start, stop = (elements(e, arrays, {ROW.axis: rows}) for e in (entries.start, entries.stop))
    entry = torch.arange(int(stop.max()), dtype=torch.int32)[:, None]
    lane = torch.arange(entries.width, dtype=torch.int32)[None]
    column = elements(entries.column, arrays, {ENTRY.axis: entry})
    value = elements(entries.value, arrays, {ENTRY.axis: entry, LANE.axis: lane}).double()
    read = x[:, (column + lane).long()]  # no column lies beyond the input
    sums = (read * value).sum(2)
    parts = [sums[:, int(a) : int(b)].sum(1) for a, b in zip(start, stop, strict=True)]
    return torch.stack(parts, 1)


def check_structure(term: Term) -> None:
    """Require that the structure computes the product with the dense matrix."""
    generator = torch.Generator().manual_seed(term.shape[1])
    x = torch.randn(5, term.shape[1], generator=generator, dtype=torch.float64)
    assert_near(product(term, x), x @ term.dense().double().T, 1e-5)


# ---------------------------------------------------------------- the laws of one term


@every_format
def test_a_format_is_read_as_it_is_printed(format: TermFormat) -> None:
    for text in (str(format), str(format).replace("·", ":"), f"  {format} "):
        again = parse_term(text)
        assert again == format
        assert hash(again) == hash(format)
    assert parse_weights(f"{format} + {format}") == WeightFormat((format, format))
    written = json.loads(json.dumps(write_value(format), allow_nan=False))
    assert read_value(written, "a format") == format


@every_class
def test_examples_are_a_few_and_one_stores_a_usual_matrix(name: str) -> None:
    listed = example_formats()[name]
    assert len(set(listed)) == len(listed) >= 3
    assert any(format.refusal(shape) is None for format in listed for shape in USUAL)


@every_format
def test_a_refusal_is_one_sentence_that_arrays_meet_too(format: TermFormat) -> None:
    for shape in SHAPES:
        why = format.refusal(shape)
        if why is not None:
            assert "\n" not in why
            with pytest.raises(ValueError, match=re.escape(why)):
                format.planned(shape)


@every_class
@few
@given(data=st.data())
def test_the_decode_expression_gives_the_dense_values(name: str, data: st.DataObject) -> None:
    check_decode(data.draw(terms(name)))


@every_class
@few
@given(data=st.data())
def test_the_structure_computes_the_product(name: str, data: st.DataObject) -> None:
    check_structure(data.draw(terms(name)))


@every_class
@few
@given(data=st.data())
def test_bits_are_the_stored_bytes(name: str, data: st.DataObject) -> None:
    term = data.draw(terms(name))
    held = sum(len(as_bytes(array)) for array in term.arrays().values())
    assert term.bits == term.format.bits(term.shape) == 8 * held
    assert all(array.is_contiguous() for array in term.arrays().values())
    assert Weight("w", term.shape, (term,)).bits == term.bits
    assert term.format.planned(term.shape).bits == term.bits


@every_class
@few
@given(data=st.data())
def test_a_term_is_made_again_of_its_arrays(name: str, data: st.DataObject) -> None:
    term = data.draw(terms(name))
    again = term.format.term(term.shape, {**term.arrays(), "other": torch.zeros(1)})
    assert again.format == term.format
    assert again.shape == term.shape
    assert again.arrays().keys() == term.arrays().keys()
    assert torch.equal(again.dense(), term.dense())


@every_format
def test_nearest_gives_the_same_again_and_warns_of_nothing(format: TermFormat) -> None:
    shape = max(accepted(format), key=lambda s: (s[0] * s[1] < 5000, s[0] * s[1]), default=None)
    if shape is None:
        pytest.skip(str(format.refusal(USUAL[0])))
    for kind in ("normal", "zero"):
        first = stored(format, shape, kind).arrays()
        values = matrix(shape, kind)
        before = values.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = format.nearest(values).arrays()
        assert torch.equal(values, before)
        assert first.keys() == second.keys()
        assert all(same_bits(first[n], second[n]) for n in first)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Compare arrays as they would be written to a file."""
    alike = left.dtype == right.dtype and left.shape == right.shape
    return alike and torch.equal(as_bytes(left), as_bytes(right))


def as_bytes(array: Tensor) -> Tensor:
    """Return what a file would hold of an array."""
    copy = array.clone(memory_format=torch.contiguous_format)
    return copy.flatten().view(torch.uint8)


@every_class
@few
@given(data=st.data())
def test_rows_are_taken_apart(name: str, data: st.DataObject) -> None:
    term = data.draw(terms(name))
    index = torch.tensor(data.draw(st.lists(st.integers(0, term.shape[0] - 1), min_size=1)))
    taken = term.rows(index)
    if taken is not None:
        assert taken.shape == (len(index), term.shape[1])
        assert taken.bits == taken.format.bits(taken.shape)
        assert_near(taken.dense(), term.dense()[index], 1e-6)


# ---------------------------------------------------------------- what may not be


def broken(name: str, array: Tensor) -> list[dict[str, Tensor]]:
    """Return replacements of one array, each wrong in another way; none at all is the first."""
    other = torch.int64 if array.dtype != torch.int64 else torch.int32
    flat = array.flatten()
    return [
        {},
        {name: array.to(other)},
        {name: flat[1:]},
        {name: torch.cat([flat, flat])},
        {name: array.unsqueeze(0)},
    ]


@every_class
@few
@given(data=st.data())
def test_corrupt_arrays_are_refused_by_name(name: str, data: st.DataObject) -> None:
    term = data.draw(terms(name))
    array = data.draw(st.sampled_from(sorted(term.arrays())))
    assume(term.arrays()[array].numel())
    others = {n: a for n, a in term.arrays().items() if n != array}
    wrong = data.draw(st.sampled_from(broken(array, term.arrays()[array])))
    with pytest.raises(ValueError, match=re.escape(f"array '{array}'")) as caught:
        term.format.term(term.shape, {**others, **wrong})
    assert "\n" not in str(caught.value)


@every_class
@few
@given(data=st.data())
def test_any_integers_are_refused_in_a_sentence_or_decoded(name: str, data: st.DataObject) -> None:
    term = data.draw(terms(name))
    integers = [n for n, a in term.arrays().items() if not a.is_floating_point()]
    if not integers:
        return
    array = data.draw(st.sampled_from(integers))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    arrays = {**term.arrays(), array: any_integers(term.arrays()[array], generator)}
    why = refused(term, arrays)
    if why is not None:
        assert why.startswith(f"array '{array}'")
        assert "\n" not in why
        return
    assert term.format.dense(term.shape, arrays).shape == term.shape
    index = {ROW.axis: torch.zeros(1, 1, dtype=torch.int32), COL.axis: columns_of(term)}
    elements(term.format.decode(term.shape, ROW, COL), arrays, index)


def refused(term: Term, arrays: dict[str, Tensor]) -> str | None:
    """Say why arrays are refused; None where they are not."""
    try:
        term.format.term(term.shape, arrays)
    except ValueError as error:
        return str(error)
    return None


def any_integers(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw integers of the whole range of a dtype."""
    limits = torch.iinfo(like.dtype)
    drawn = torch.randint(
        limits.min, limits.max, like.shape, generator=generator, dtype=torch.int64
    )
    return drawn.to(like.dtype)


@every_class
@few
@given(data=st.data())
def test_expressions_read_stored_arrays_and_known_indices_only(
    name: str, data: st.DataObject
) -> None:
    format = data.draw(terms(name)).format
    shape = data.draw(st.sampled_from(accepted(format)))
    arrays = format.arrays(shape).keys()
    check_reads(format.decode(shape, ROW, COL), set(arrays), {ROW, COL})
    match format.structure(shape):
        case Entries(start, stop, column, value, width):
            assert width >= 1
            for expr, known in ((start, {ROW}), (stop, {ROW}), (column, {ENTRY})):
                check_reads(expr, set(arrays), known)
            check_reads(value, set(arrays), {ENTRY, LANE})
        case Selected(index, part):
            assert index in arrays
            check_part(part, set(arrays))
        case Chain(steps):
            assert steps[0].before * steps[0].part.shape[1] * steps[0].after == shape[1]
            assert steps[-1].before * steps[-1].part.shape[0] * steps[-1].after == shape[0]
            for step in steps:
                check_part(step.part, set(arrays))


def check_reads(expr: Expr, arrays: set[str], known: set[Index]) -> None:
    """Require that an expression reads known arrays, and known or counted indices."""
    nodes = walk(expr)
    assert {each.array for each in nodes if hasattr(each, "array")} <= arrays
    counted = {each.index for each in nodes if isinstance(each, Sum)}
    assert {each for each in nodes if isinstance(each, Index)} <= known | counted
    assert not counted & known


def check_part(part: Part, arrays: set[str]) -> None:
    """Require that a part's arrays are there."""
    assert {f"{part.prefix}.{name}" for name in part.format.arrays(part.shape)} <= arrays


@every_class
@fewer
@given(data=st.data())
def test_an_element_may_be_named_by_any_index(name: str, data: st.DataObject) -> None:
    """A sum inside must not count with an index that the row or the column reads."""
    term = data.draw(terms(name))
    expr = term.format.decode(term.shape, ROW, COL)
    for counted in {each.index for each in walk(expr) if isinstance(each, Sum)}:
        check_decode(term, row=counted)
        check_decode(term, col=counted)


# ---------------------------------------------------------------- the laws of sums


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    """Draw a sum of two or three terms, of any classes."""
    shape = draw(st.sampled_from((*USUAL, (7, 576), (127, 33))))
    usable = [format for format in FORMATS.values() if format.refusal(shape) is None]
    chosen = draw(st.lists(st.sampled_from(usable), min_size=2, max_size=3))
    return Weight("w", shape, tuple(stored(format, shape) for format in chosen))


@settings(few, max_examples=25)
@given(weights())
def test_a_weight_is_the_sum_of_its_terms(weight: Weight) -> None:
    formats = [term.format for term in weight.terms]
    summed = sum((term.dense().float() for term in weight.terms), torch.zeros(weight.shape))
    assert torch.equal(weight.dense(), summed)
    assert str(weight.format) == " + ".join(map(str, formats))
    assert parse_weights(str(weight.format)) == weight.format == WeightFormat(tuple(formats))
    assert weight.bits == weight.format.bits(weight.shape) == sum(t.bits for t in weight.terms)
    assert weight.arrays().keys() == weight.format.arrays(weight.shape).keys()
    row = torch.tensor([[weight.shape[0] // 2]], dtype=torch.int32)
    expr = weight.format.decode(weight.shape, ROW, COL)
    index = {ROW.axis: row, COL.axis: columns_of(weight.terms[0])}
    found = elements(expr, weight.arrays(), index)
    assert_near(found[0], summed[int(row)], 1e-5)


@settings(few, max_examples=15)
@given(weights())
def test_a_sum_comes_back_from_a_file_bit_for_bit(weight: Weight) -> None:
    before = Graph((), (make(ops.Parameter(weight)),), ("out",))
    content, arrays = graph_to_json(before)
    (loaded,) = graph_from_json(json.loads(json.dumps(content)), arrays).outputs
    assert isinstance(loaded.op, ops.Parameter)
    again = loaded.op.weight
    assert again.format == weight.format
    assert again.arrays().keys() == weight.arrays().keys()
    assert all(same_bits(again.arrays()[n], a) for n, a in weight.arrays().items())
    assert torch.equal(again.dense(), weight.dense())


# ---------------------------------------------------------------- formats inside formats

COMBINED = {
    "columns": partial(OnColumnsFormat, count=16),
    "kept groups": partial(KeptGroupsFormat, 250_000, 16),
    "low rank": partial(LowRankFormat, 16),
}


@every_format
@pytest.mark.parametrize("outer", COMBINED)
def test_any_format_may_stand_inside_another(outer: str, format: TermFormat) -> None:
    combined = COMBINED[outer](format)
    shape = (16, 32)
    why = combined.refusal(shape)
    if why is not None:
        pytest.skip(why)
    assert parse_term(str(combined)) == combined
    term = combined.nearest(matrix(shape, "normal"))
    assert term.bits == combined.bits(shape)
    check_decode(term)
    check_structure(term)
    prefix = "up" if outer == "low rank" else "inner"
    array = next(iter(inside(prefix, term.stored)))
    wrong = {**term.arrays(), f"{prefix}.{array}": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(ValueError, match=re.escape(f"array '{prefix}.{array}'")):
        combined.term(shape, wrong)
