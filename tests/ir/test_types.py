"""Symbolic shapes: arithmetic, quotients, broadcasting, printing, reading."""

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc.ir.dims import parse_dim
from qc.ir.types import (
    Dim,
    TensorType,
    as_dim,
    bind_dim,
    broadcast_shapes,
    dim_symbols,
    element_count,
    exact_quotient,
    symbol,
)

BATCH, SEQ, PAST = symbol("batch"), symbol("seq"), symbol("past")


def polynomials() -> st.SearchStrategy[Dim]:
    """Sums of products of three symbols with integer coefficients."""
    term = st.builds(
        lambda factor, b, s, p: factor * BATCH**b * SEQ**s * PAST**p,
        st.integers(-9, 99), st.integers(0, 2), st.integers(0, 2), st.integers(0, 1),
    )  # fmt: skip
    return st.lists(term, min_size=1, max_size=4).map(lambda terms: as_dim(sympy.Add(*terms)))


def test_equal_names_are_one_dimension() -> None:
    assert symbol("seq") == SEQ
    assert as_dim(SEQ + PAST - SEQ) == PAST
    assert as_dim(SEQ - SEQ + 3) == 3
    assert type(as_dim(sympy.Integer(3))) is int


@pytest.mark.parametrize("value", [1.5, "seq", None])
def test_only_sizes_are_dimensions(value: object) -> None:
    with pytest.raises(TypeError, match="a dimension is an int or a sympy expression"):
        as_dim(value)


@pytest.mark.parametrize(
    ("numerator", "denominator", "quotient"),
    [
        (12, 4, 3),
        (12, 5, None),
        (12, 0, None),
        (BATCH * SEQ * 48, 48 * SEQ, BATCH),
        (BATCH * SEQ * 48, 36, None),
        (BATCH * SEQ, PAST, None),
        (SEQ**2 + SEQ * PAST, SEQ + PAST, SEQ),
        (4 * SEQ, 6 * SEQ, None),
        (4 * SEQ, 2 * SEQ, 2),
    ],
)
def test_quotients_are_exact_or_none(
    numerator: Dim, denominator: Dim, quotient: Dim | None
) -> None:
    assert exact_quotient(numerator, denominator) == quotient


@given(polynomials(), polynomials())
def test_a_product_divides_by_its_factors(left: Dim, right: Dim) -> None:
    if right != 0:
        assert exact_quotient(as_dim(left * right), right) == left


@given(polynomials(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_binding_is_evaluation(dim: Dim, batch: int, seq: int, past: int) -> None:
    sizes = {"batch": batch, "seq": seq, "past": past}
    assert bind_dim(dim, sizes) == eval(str(dim), {}, sizes)


def test_binding_names_a_missing_symbol() -> None:
    with pytest.raises(KeyError, match="seq"):
        bind_dim(SEQ + 1, {"batch": 1})


@pytest.mark.parametrize(
    ("shapes", "result"),
    [
        ([(BATCH, SEQ, 8), (8,)], (BATCH, SEQ, 8)),
        ([(BATCH, 1, 8), (SEQ, 1)], (BATCH, SEQ, 8)),
        ([(), (3,)], (3,)),
        ([(1,), (SEQ + PAST,)], (SEQ + PAST,)),
    ],
)
def test_shapes_broadcast(shapes: list[tuple[Dim, ...]], result: tuple[Dim, ...]) -> None:
    assert broadcast_shapes(*shapes) == result


def test_shapes_that_clash_are_named() -> None:
    with pytest.raises(ValueError, match=r"shapes \[batch, 3\] and \[seq, 3\] do not broadcast"):
        broadcast_shapes((BATCH, 3), (SEQ, 3))


def test_types_print_as_graphs_show_them() -> None:
    assert str(TensorType((BATCH, PAST + SEQ, 576))) == "f32[batch, past + seq, 576]"
    assert str(TensorType((), torch.int64)) == "i64[]"
    assert dim_symbols((BATCH, PAST + SEQ, 4)) == {"batch", "past", "seq"}
    assert element_count((BATCH, SEQ, 4)) == 4 * BATCH * SEQ


@given(polynomials())
def test_printed_dimensions_are_read_back(dim: Dim) -> None:
    assert parse_dim(str(dim)) == dim


@pytest.mark.parametrize(
    "text",
    ["", "a b", "__import__('os')", "f(x)", "a.b", "a[0]", "1.5", "a / 2", "a ** b", "2 ** 64",
     "(a + b) * c", "(a + b) ** 8", "a // 0", "True", "lambda: 1", "9" * 500, "+".join("a" * 200),
     "é", "[1, 2]", "a if b else c", "a < b", "-" * 300 + "a"],
)  # fmt: skip
def test_anything_else_is_no_dimension(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_dim(text)
