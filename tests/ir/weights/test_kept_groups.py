"""Group sparsity: which groups are kept, what they cost, and what a corrupt file may not say."""

import pytest
import torch

from qc.errors import FormatError
from qc.ir.weights.kept_groups import KeptGroupsFormat, kept_groups_term
from qc.ir.weights.notation import parse_term


def test_the_largest_groups_are_kept() -> None:
    values = torch.ones(2, 12)
    values[0, 4:8], values[1, 0:4], values[1, 8:12] = 5.0, -3.0, 2.0
    found = parse_term("kept50%·g4(f16)").nearest(values)
    expected = torch.where(values == 1, 0, values)
    assert torch.equal(found.dense(), expected)
    assert found.stored["starts"].tolist() == [0, 1, 3]
    assert found.stored["places"].tolist() == [1, 0, 2]


def test_each_group_has_a_scale_of_its_own() -> None:
    values = torch.randn(6, 64) * 10.0 ** torch.arange(-3, 3).unsqueeze(1)
    whole = parse_term("kept100%·g16(int4·row·zero)").nearest(values).dense()
    torch.testing.assert_close(whole, parse_term("int4·g16·zero").nearest(values).dense())


def test_bits_are_those_of_the_paper() -> None:
    # GQSA counts, per kept weight, 4 bits and (16 scale + 8 zero + 16 place) / 16; and a row start
    found = parse_term("kept50%·g16(int4·row·zero)")
    assert found.bits((576, 576)) == 0.5 * 576 * 576 * (4 + 40 / 16) + 577 * 32
    assert isinstance(found, KeptGroupsFormat)
    assert found.kept((3, 48)) == 5  # half of 9, rounded up


def test_marked_groups_are_kept() -> None:
    values, kept = torch.randn(4, 32).half().float(), torch.zeros(4, 4, dtype=torch.bool)
    kept[1, 2] = kept[3] = True
    format = parse_term("kept31%·g8(f16)")
    assert isinstance(format, KeptGroupsFormat)
    found = kept_groups_term(format, values, kept).dense()
    assert torch.equal(found, values * kept.repeat_interleave(8, 1))
    with pytest.raises(ValueError, match=r"8 groups are marked, .* stores 5"):
        kept_groups_term(format, values, kept.index_fill(1, torch.tensor(0), True))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("starts", 7, "decreases"), ("places", 4, "0 to 3"), ("places", -1, "0 to 3")],
)
def test_corrupt_positions_are_refused(name: str, value: int, says: str) -> None:
    term = parse_term("kept50%·g8(int4·row)").nearest(torch.randn(3, 32))
    stored = {array: held.clone() for array, held in term.arrays().items()}
    stored[name][1] = value
    with pytest.raises(ValueError, match=f"^array '{name}' .*{says}"):
        term.format.term(term.shape, stored)


def test_what_cannot_be_is_refused() -> None:
    format = parse_term("kept50%·g16(int4·row)")
    assert "g11 would" in str(format.refusal((7, 33)))
    assert "g7 would" in str(format.refusal((7, 7)))
    for text in ("kept50%", "kept50%·g16", "kept50%·of(f16)", "kept0%·g16(f16)", "kept5·g4(f16)"):
        with pytest.raises(FormatError):
            parse_term(text)
