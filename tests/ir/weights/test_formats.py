"""The laws of every storage format. A new file in qc/ir/weights is found by being there: its
layouts are drawn from the declared types of its fields."""

from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qc.ir.weights.catalog import term_formats
from qc.ir.weights.expression import COL, ROW, TorchRendering, rename_arrays, walk
from qc.ir.weights.weight import Term, TermFormat, Weight, WeightFormat

ROWS = (1, 2, 7)
COLS = (1, 7, 31, 33, 127, 129, 576)
GROUPS = (1, 16, 32, 64, 128)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

every_format = pytest.mark.parametrize("cls", term_formats().values(), ids=term_formats())


@st.composite
def layouts(draw: st.DrawFn, cls: type[TermFormat]) -> TermFormat:
    """Draw a layout: each field by its declared type, or what the constructor takes of it."""
    hints = get_type_hints(cls)
    values = {each.name: draw(field_values(hints[each.name])) for each in fields(cls)}  # type: ignore[arg-type]
    try:
        return cls(**values)
    except ValueError:
        assume(False)
        raise


def field_values(hint: Any) -> st.SearchStrategy[Any]:
    """Return values of a declared type."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if NoneType in get_args(hint):
        return st.sampled_from((None, *GROUPS))
    if hint is torch.dtype:
        return st.sampled_from(FLOATS)
    if hint is int:
        return st.integers(1, 8)
    if hint is bool:
        return st.booleans()
    raise TypeError(f"say here how to draw a field of type {hint}")


def arrays_for(layout: TermFormat, shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Draw what is stored: any bits for integers, moderate values for floats."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for name, spec in layout.arrays(shape).items():
        if spec.dtype.is_floating_point:
            drawn[name] = torch.randn(spec.shape, generator=generator).to(spec.dtype)
        else:
            limits = torch.iinfo(spec.dtype)
            drawn[name] = torch.randint(
                limits.min, limits.max + 1, spec.shape, generator=generator, dtype=spec.dtype
            )
    return drawn


@st.composite
def terms(draw: st.DrawFn, cls: type[TermFormat]) -> Term:
    """Draw a term of any layout and an odd size."""
    layout = draw(layouts(cls))
    shape = (draw(st.sampled_from(ROWS)), draw(st.sampled_from(COLS)))
    return layout.term(shape, arrays_for(layout, shape, draw(st.integers(0, 9))))


@every_format
@given(data=st.data())
def test_the_decode_expression_gives_the_dense_values(
    cls: type[TermFormat], data: st.DataObject
) -> None:
    term = data.draw(terms(cls))
    assert term.dense().shape == term.shape
    torch.testing.assert_close(Term.dense(term).float(), term.dense().float(), rtol=1e-6, atol=1e-6)


@every_format
@given(data=st.data())
def test_bits_are_the_stored_bytes(cls: type[TermFormat], data: st.DataObject) -> None:
    term = data.draw(terms(cls))
    stored = sum(len(a.contiguous().view(-1).view(torch.uint8)) for a in term.arrays().values())
    assert term.bits == 8 * stored
    assert term.format.bits(term.shape) == term.bits
    assert Weight("w", term.shape, (term,)).bits == term.bits


@every_format
@given(data=st.data())
def test_a_term_is_made_again_of_its_arrays(cls: type[TermFormat], data: st.DataObject) -> None:
    term = data.draw(terms(cls))
    again = term.format.term(term.shape, term.arrays())
    assert again.format == term.format
    assert hash(again.format) == hash(term.format)
    assert again.shape == term.shape
    assert torch.equal(again.dense(), term.dense())


@every_format
@given(data=st.data())
def test_stacked_rows_are_the_rows_joined(cls: type[TermFormat], data: st.DataObject) -> None:
    layout = data.draw(layouts(cls))
    cols = data.draw(st.sampled_from(COLS))
    parts = []
    for seed, rows in enumerate(data.draw(st.lists(st.sampled_from(ROWS), min_size=1, max_size=3))):
        parts.append(layout.term((rows, cols), arrays_for(layout, (rows, cols), seed)))
    whole = parts[0].stacked(parts[1:])
    assert whole.format == layout
    assert torch.equal(whole.dense(), torch.cat([part.dense() for part in parts]))


@every_format
@given(data=st.data())
def test_rows_are_taken_apart(cls: type[TermFormat], data: st.DataObject) -> None:
    term = data.draw(terms(cls))
    index = torch.tensor(data.draw(st.lists(st.integers(0, term.shape[0] - 1), min_size=1)))
    taken = term.rows(index)
    if taken is not None:
        assert torch.equal(taken.dense(), term.dense()[index])


def broken(name: str, array: Tensor) -> list[dict[str, Tensor]]:
    """Return replacements of one array, each wrong in another way; none at all is the first."""
    other = torch.int32 if array.dtype != torch.int32 else torch.int64
    return [
        {},
        {name: array.to(other)},
        {name: array[:-1]},
        {name: torch.cat([array, array], -1)},
        {name: array.unsqueeze(0)},
    ]


@every_format
@given(data=st.data())
@settings(max_examples=40)
def test_corrupt_arrays_are_refused_by_name(cls: type[TermFormat], data: st.DataObject) -> None:
    term = data.draw(terms(cls))
    name = data.draw(st.sampled_from(sorted(term.arrays())))
    others = {n: a for n, a in term.arrays().items() if n != name}
    wrong = data.draw(st.sampled_from(broken(name, term.arrays()[name])))
    with pytest.raises(ValueError, match=f"array '{name}'") as caught:
        term.format.term(term.shape, {**others, **wrong})
    assert "\n" not in str(caught.value)


@every_format
@given(data=st.data())
@settings(max_examples=40)
def test_expressions_read_stored_arrays_only(cls: type[TermFormat], data: st.DataObject) -> None:
    layout = data.draw(layouts(cls))
    shape = (3, data.draw(st.sampled_from(COLS)))
    loads = {e.array for e in walk(layout.decode(shape, ROW, COL)) if hasattr(e, "array")}
    assert loads <= layout.arrays(shape).keys()


@given(data=st.data())
@settings(max_examples=40)
def test_a_weight_is_the_sum_of_its_terms(data: st.DataObject) -> None:
    shape = (data.draw(st.sampled_from(ROWS)), data.draw(st.sampled_from(COLS)))
    drawn = data.draw(
        st.lists(st.sampled_from(list(term_formats().values())), min_size=1, max_size=3)
    )
    chosen = [data.draw(layouts(cls)) for cls in drawn]
    held = tuple(f.term(shape, arrays_for(f, shape, i)) for i, f in enumerate(chosen))
    weight = Weight("w", shape, held)
    assert weight.format == WeightFormat(tuple(chosen))
    assert str(weight.format) == " + ".join(map(str, chosen))
    assert weight.format.bits(shape) == weight.bits == sum(t.bits for t in held)
    assert weight.arrays().keys() == weight.format.arrays(shape).keys()
    row, col = torch.arange(shape[0]).unsqueeze(1), torch.arange(shape[1]).unsqueeze(0)
    rendering = TorchRendering(weight.arrays(), row.int(), col.int())
    decoded = rendering.value(weight.format.decode(shape, ROW, COL))
    torch.testing.assert_close(decoded.expand(shape), weight.dense(), rtol=1e-5, atol=1e-4)
    if len(held) == 1:
        own = rename_arrays(chosen[0].decode(shape, ROW, COL), "0.")
        assert own == weight.format.decode(shape, ROW, COL)
