"""Sparse entries: how many, which, in what order, and what a corrupt file may not say."""

import pytest
import torch

from qc.errors import FormatError
from qc.ir.weights.notation import parse_term
from qc.ir.weights.sparse import SparseFormat, sparse_term


def test_the_number_of_entries_is_exact() -> None:
    # 0.1 and 0.7 have no exact float: 0.7% of 1000 must be 7 entries, not 8
    for text, shape, entries in (
        ("sparse0.7%", (10, 100), 7), ("sparse0.1%", (10, 100), 1),
        ("sparse0.45%", (576, 576), 1493),
        ("sparse0.0001%", (1000, 1000), 1), ("sparse1%", (1, 1), 1), ("sparse100%", (7, 3), 21),
    ):  # fmt: skip
        found = parse_term(text)
        assert str(found) == text
        assert isinstance(found, SparseFormat)
        assert found.entries(shape) == entries
    assert SparseFormat(10_000).bits((576, 576)) == 3318 * 32 + 577 * 32


@pytest.mark.parametrize("text", ["sparse0%", "sparse100.1%", "sparse0.00001%", "sparse1%·g16"])
def test_impossible_shares_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse_term(text)


def test_the_largest_magnitudes_are_kept_and_the_first_of_equal_ones() -> None:
    values = torch.tensor([[1.0, -5.0, 2.0], [2.0, 0.5, -2.0]])
    kept = SparseFormat(500_000).nearest(values).dense()
    assert torch.equal(kept, torch.tensor([[0.0, -5.0, 2.0], [2.0, 0.0, 0.0]]))
    whole = torch.randn(33, 31).half().float()
    assert torch.equal(SparseFormat(1_000_000).nearest(whole).dense(), whole)


def test_chosen_entries_are_kept_and_room_that_is_left_is_zero() -> None:
    values = (1 + torch.rand(20, 50)).half().float()
    chosen = torch.zeros(20, 50, dtype=torch.bool)
    chosen[3, 7] = chosen[3, 49] = chosen[19, 0] = True
    term = sparse_term(SparseFormat(50_000), values, chosen)
    assert torch.equal(term.dense(), torch.where(chosen, values, 0))
    assert int(term.stored["starts"].diff().max()) < 10  # the 47 spare ones are not in one row
    with pytest.raises(ValueError, match="3 entries are chosen"):
        sparse_term(SparseFormat(2000), values, chosen)


def test_an_index_takes_two_bytes_where_it_fits() -> None:
    for cols, dtype in ((32768, torch.int16), (32769, torch.int32)):
        assert SparseFormat(1).arrays((1, cols))["columns"].dtype == dtype
    values = torch.zeros(2, 32768)
    values[1, 32767] = 3
    assert torch.equal(SparseFormat(100).nearest(values).dense(), values)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("starts", [(0, 1)], "from 0"),
        ("starts", [(-1, 99)], "number of entries"),
        ("starts", [(1, 5), (2, 2)], "decreases"),
        ("starts", [(1, -(2**31)), (2, 2**31 - 1)], "decreases"),
        ("columns", [(0, 40)], "expected 0 to 39"),
        ("columns", [(3, -1)], "expected 0 to 39"),
        ("columns", [(1, 0)], "not sorted"),
    ],
)
def test_corrupt_positions_are_refused(name: str, change: list[tuple[int, int]], says: str) -> None:
    values = torch.arange(400.0).view(10, 40)
    term = SparseFormat(30_000).nearest(values)
    stored = {array: held.clone() for array, held in term.arrays().items()}
    for at, value in change:
        stored[name][at] = value
    with pytest.raises(ValueError, match=f"^array '{name}' .*{says}"):
        term.format.term(term.shape, stored)
