"""Reading formats: every mistake is answered with what is wrong and what is near."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc.errors import FormatError
from qc.ir.weights.columns import OnColumnsFormat
from qc.ir.weights.dense import DenseFormat
from qc.ir.weights.grouped import GroupedFormat
from qc.ir.weights.low_rank import LowRankFormat
from qc.ir.weights.notation import parse_term, parse_weights, split_outside
from qc.ir.weights.sparse import SparseFormat
from qc.ir.weights.weight import WeightFormat


def test_a_sum_is_read_term_by_term() -> None:
    expected = WeightFormat((GroupedFormat(3, 64), LowRankFormat(16), SparseFormat(5000)))
    for text in ("int3·g64 + rank16 + sparse0.5%", "int3:g64+rank16 +sparse0.5%"):
        assert parse_weights(text) == expected
    assert str(expected) == "int3·g64 + rank16 + sparse0.5%"


def test_words_come_in_any_order_and_terms_stand_in_parentheses() -> None:
    assert parse_term("int4·zero·g32") == parse_term("int4·g32·zero")
    inner = parse_term("int4·g32·min·scale(uint6·g8)")
    assert parse_term(f"columns4({inner})") == OnColumnsFormat(inner, count=4)
    nested = "columns50%(rank4·factors(int8·row·scale(uint4·row)))"
    assert str(parse_term(nested)) == nested
    assert parse_term(" f16 ") == DenseFormat(torch.float16)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int4·g128·zeros", "'zeros' is unknown here; known are"),
        ("int9·row", "2 to 8 bits, not 9"),
        ("int4·g0", "at least one weight, not 0"),
        ("rank16·g32", "'g32' is unknown here"),
        ("rank16·factors(int9)", "2 to 8 bits, not 9"),
        ("int4·g32·scale(uint6", "parentheses .* do not match"),
        ("int4·g32)·zero", "parentheses .* do not match"),
        ("int4·g32)(", "parentheses .* do not match"),
        ("sparse0.5", 'did you mean "sparse0.5%"'),
        ("ranks16", 'did you mean "rank16"'),
        ("f61", 'did you mean .*"f16"'),
        ("", "unknown weight format ''; for example"),
        ("bananas", "unknown weight format 'bananas'; for example .*int4·g128"),
        ("columns20%(bananas)", "unknown weight format 'bananas'"),
    ],
)
def test_a_mistake_is_answered_in_one_line(text: str, says: str) -> None:
    with pytest.raises(FormatError, match=says) as caught:
        parse_term(text)
    assert "\n" not in str(caught.value)
    with pytest.raises(FormatError, match=says):
        parse_weights(f"int4·g32 + {text}")


def test_an_empty_term_is_refused() -> None:
    for text in ("", "int4 +", "+ int4", "int4 + + rank4"):
        with pytest.raises(FormatError):
            parse_weights(text)


@given(st.text("int48·grank()+columns%. ", max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_weights(text)
    except FormatError:
        return
    assert parse_weights(str(found)) == found


@given(st.lists(st.sampled_from(("a", "b(c+d)", "e(f(+)+)", "(+)")), min_size=1))
def test_only_separators_outside_parentheses_split(parts: list[str]) -> None:
    assert split_outside(" + ".join(parts), "+") == parts
