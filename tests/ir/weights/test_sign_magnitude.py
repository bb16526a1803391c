"""Signs times low-rank magnitudes: what is stored, what each block leaves."""

import pytest
import torch
from torch import Tensor

from qc.ir.weights.notation import parse_term
from qc.ir.weights.sign_magnitude import SignMagnitudeFormat, leading_product


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(text: str, values: Tensor) -> float:
    dense = parse_term(text).nearest(values).dense()
    return float((values - dense).square().sum() / values.square().sum())


def test_blocks_mean_what_the_page_says() -> None:
    layout = SignMagnitudeFormat(2, 3)
    signs = torch.tensor([[[0b10101010, 1]], [[0, 0]]], dtype=torch.uint8)  # 9 columns
    left, right = gaussian(2, 1, 3).half(), gaussian(2, 3, 9, seed=1).half()
    dense = layout.term((1, 9), {"signs": signs, "left": left, "right": right}).dense()
    for col in range(9):
        first, second = (
            sum(float(left[b, 0, k]) * float(right[b, k, col]) for k in range(3)) for b in range(2)
        )
        sign = 1 if col % 2 or col == 8 else -1
        assert float(dense[0, col]) == pytest.approx(sign * first - second, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "shape", "bits"),
    [  # n (1 + 16 k (m + n) / (m n)) a weight
        ("bitstack1·rank4", (576, 576), 1.2222),
        ("bitstack1·rank16", (4096, 4096), 1.125),
        ("bitstack4·rank4", (1536, 576), 4 * 1.15278),
    ],
)
def test_stored_bits_per_weight(text: str, shape: tuple[int, int], bits: float) -> None:
    assert parse_term(text).bits(shape) / (shape[0] * shape[1]) == pytest.approx(bits, rel=1e-4)


def test_every_block_leaves_less() -> None:
    values = gaussian(96, 128)
    errors = [relative_error(f"bitstack{n}·rank4", values) for n in range(1, 6)]
    for before, after in zip([1.0, *errors], errors, strict=False):
        assert after < 0.6 * before  # 1 - 2 / pi = 0.36 for the first block, then more slowly


def test_a_higher_rank_leaves_less() -> None:
    values = gaussian(96, 128)
    errors = [relative_error(f"bitstack2·rank{rank}", values) for rank in (16, 4, 1)]
    assert errors == sorted(errors)
    assert relative_error("bitstack1·rank1", values) == pytest.approx(1 - 2 / torch.pi, abs=0.01)


def test_magnitudes_need_fewer_bits_than_values() -> None:
    """BitStack's ablation: the singular vectors of W itself at the same size are far worse."""
    values = gaussian(128, 128)
    size = parse_term("bitstack2·rank4").bits((128, 128))
    rank = size // (16 * (128 + 128))
    u, s, v = torch.linalg.svd(values)
    plain = (u[:, :rank] * s[:rank]) @ v[:rank]
    of_values = float((values - plain).square().sum() / values.square().sum())
    assert relative_error("bitstack2·rank4", values) < 0.5 * of_values


def test_the_first_blocks_are_the_term_of_fewer_blocks() -> None:
    values = gaussian(20, 33)
    five, two = (parse_term(f"bitstack{n}·rank2").nearest(values).arrays() for n in (5, 2))
    for name, array in two.items():
        assert torch.equal(five[name][:2], array)


def test_later_blocks_take_up_the_rounding_of_earlier_ones() -> None:
    values = gaussian(16, 16)
    errors = [relative_error(f"bitstack{n}·rank16", values) for n in (1, 2)]
    assert errors[0] < 1e-6  # of full rank: the rounding to float16 alone
    assert errors[1] < 1e-2 * errors[0]


def test_signs_times_a_product_are_recovered_and_zero_counts_as_positive() -> None:
    a, b = gaussian(12, 1).abs(), gaussian(1, 40, seed=1).abs()
    signs = gaussian(12, 40, seed=2).sign()
    assert relative_error("bitstack1·rank1", signs * (a @ b)) < 1e-6
    zeros = parse_term("bitstack1·rank1").nearest(torch.zeros(2, 8))
    assert zeros.arrays()["signs"].tolist() == [[[255], [255]]]
    assert not zeros.dense().any()


def test_a_rank_that_the_matrix_lacks_is_stored_as_zeros() -> None:
    left, right = leading_product(gaussian(3, 50).abs(), 5)
    assert left.shape == (3, 5)
    assert right.shape == (5, 50)
    assert not left[:, 3:].any()
    assert not right[3:].any()


def test_rows_are_taken_apart() -> None:
    term = parse_term("bitstack2·rank2").nearest(gaussian(6, 33))
    index = torch.tensor([4, 1])
    taken = term.rows(index)
    assert taken is not None
    assert torch.equal(taken.dense(), term.dense()[index])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bitstack0·rank1", "1 to 16 blocks"),
        ("bitstack2·rank17", "rank 1 to 16, not 17"),
        ("bitstack2·g32", "'g32' is unknown here"),
        ("bitstack2·rank1·rank2", "'rank2' is unknown here"),
    ],
)
def test_impossible_blocks_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_term(text)
