"""Terms on some input channels: which, how many, and matrices partitioned by channel."""

import pytest
import torch

from qc.errors import FormatError
from qc.ir.weights.columns import OnColumnsFormat, columns_term, partition
from qc.ir.weights.notation import parse_term, parse_weights
from qc.ir.weights.weight import Weight


def test_the_channels_with_the_largest_norm_are_stored() -> None:
    values = torch.randn(9, 10).half().float()
    values[:, [2, 7]] *= 16
    term = parse_term("columns2(f16)").nearest(values)
    assert term.stored["index"].tolist() == [2, 7]
    kept = torch.zeros(9, 10)
    kept[:, [2, 7]] = values[:, [2, 7]]
    assert torch.equal(term.dense(), kept)


def test_a_share_is_rounded_up() -> None:
    for text, cols, channels in (
        ("columns20%(int4·row)", 576, 116), ("columns20%(int4·row)", 1, 1),
        ("columns0.1%(int4·row)", 576, 1), ("columns100%(int4·row)", 33, 33),
        ("columns8(int4·row)", 33, 8),
    ):  # fmt: skip
        found = parse_term(text)
        assert isinstance(found, OnColumnsFormat)
        assert found.channels(cols) == channels
    # 2 bytes an index, half a byte a weight, 2 bytes a scale
    assert parse_term("columns20%(int4·row)").bits((64, 576)) == 16 * 116 + 64 * (4 * 116 + 16)


def test_channels_of_three_widths_are_a_partition() -> None:
    values = torch.randn(24, 60)
    order = torch.randperm(60)
    formats = [parse_term(text) for text in ("int2·row·min", "int4·g16", "f16")]
    terms = partition(values, order.split((30, 20, 10)), formats)
    weight = Weight("w", (24, 60), terms)
    assert str(weight.format) == (
        "columns30(int2·row·min) + columns20(int4·g16) + columns10(dense f16)"
    )
    assert parse_weights(str(weight.format)) == weight.format
    for listed, format in zip(order.split((30, 20, 10)), formats, strict=True):
        index = listed.sort().values
        torch.testing.assert_close(
            weight.dense()[:, index], format.nearest(values[:, index]).dense().float()
        )
    with pytest.raises(ValueError, match="exactly once"):
        partition(values, (order[:10], order[5:]), formats[:2])


def test_a_given_term_is_put_on_given_channels() -> None:
    inner = parse_term("int8·row").nearest(torch.randn(4, 3))
    format = OnColumnsFormat(inner.format, count=3)
    term = columns_term(format, 9, torch.tensor([0, 4, 8]), inner)
    assert torch.equal(term.dense()[:, [0, 4, 8]], inner.dense())
    for index, says in (([0, 4, 9], "expected 0 to 8"), ([0, 4, 4], "names a position twice")):
        with pytest.raises(ValueError, match=f"^array 'index' .*{says}"):
            columns_term(format, 9, torch.tensor(index), inner)


def test_what_cannot_be_is_refused() -> None:
    why = parse_term("columns8(int4·row)").refusal((33, 7))
    assert why is not None
    assert "8 input channels" in why
    assert "rank7" in str(parse_term("columns7(rank8)").refusal((33, 31)))
    for text in ("columns(int4)", "columns20%", "columns0(f16)", "columns0%(f16)", "columns5(f17)"):
        with pytest.raises(FormatError):
            parse_term(text)
