"""Low rank: the best matrix of its rank, exact on both axes, in factors of any format."""

import pytest
import torch

from qc.errors import FormatError
from qc.ir.weights.low_rank import LowRankFormat, balanced_factors, low_rank_term
from qc.ir.weights.notation import parse_term


@pytest.mark.parametrize("shape", [(33, 129), (129, 33), (1, 7), (64, 64)])
def test_the_error_is_the_tail_of_the_singular_values(shape: tuple[int, int]) -> None:
    values = torch.randn(shape)
    singular = torch.linalg.svdvals(values.double())
    for rank in {1, min(shape) // 2 or 1, min(shape)}:
        error = values - parse_term(f"rank{rank}·factors(dense f32)").nearest(values).dense()
        assert float(error.norm()) == pytest.approx(float(singular[rank:].norm()), abs=2e-5)


def test_singular_values_are_split_evenly() -> None:
    up, down = balanced_factors(torch.randn(40, 60), 5)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
    torch.testing.assert_close(up.T @ up, torch.diag(up.square().sum(0)), rtol=0, atol=1e-4)


def test_a_matrix_of_lower_rank_leaves_no_noise() -> None:
    values = torch.outer(torch.randn(20), torch.randn(30))
    found = LowRankFormat(4).nearest(values)
    assert all(bool(a.isfinite().all()) for a in found.arrays().values())
    assert float((found.dense() - values).norm() / values.norm()) < 1e-3
    assert not bool(LowRankFormat(4).nearest(torch.zeros(9, 12)).dense().any())


def test_eight_bit_factors_cost_half_and_little_more_error() -> None:
    values = torch.randn(96, 16) @ torch.randn(16, 192) + 0.1 * torch.randn(96, 192)
    half, eight = parse_term("rank16"), parse_term("rank16·factors(int8·row)")
    errors = [float((f.nearest(values).dense() - values).norm()) for f in (half, eight)]
    assert errors[1] < 1.1 * errors[0]
    assert half.bits((96, 192)) == 16 * 16 * (96 + 192)
    assert eight.bits((96, 192)) == 8 * 16 * (96 + 192) + 16 * (96 + 16)


def test_given_factors_are_stored() -> None:
    up, down = torch.randn(7, 3).half().float(), torch.randn(3, 9).half().float()
    torch.testing.assert_close(low_rank_term(LowRankFormat(3), up, down).dense(), up @ down)


def test_a_rank_that_is_too_large_is_refused_with_the_largest() -> None:
    why = LowRankFormat(34).refusal((33, 576))
    assert why is not None
    assert "rank33" in why
    with pytest.raises(FormatError, match="at least 1"):
        parse_term("rank0")
