"""Tensor trains: exact at full bond, bounded below it, few parameters, few ways to cut a size."""

from math import prod

import pytest
import torch

from qc.errors import FormatError
from qc.ir.weights.notation import parse_term
from qc.ir.weights.tensor_train import TensorTrainFormat, factorise


@pytest.mark.parametrize("sites", [2, 3])
@pytest.mark.parametrize("shape", [(36, 64), (64, 36), (27, 8)])
def test_a_full_bond_gives_the_matrix_back(sites: int, shape: tuple[int, int]) -> None:
    values = torch.randn(shape)
    found = parse_term(f"train{sites}·bond10000·factors(dense f32)").nearest(values).dense()
    assert float((found - values).norm() / values.norm()) < 1e-5


def test_two_sites_are_the_best_sum_of_kronecker_products() -> None:
    values = torch.randn(24, 30)
    paired = values.view(4, 6, 5, 6).permute(0, 2, 1, 3).reshape(20, 36)
    tail = torch.linalg.svdvals(paired)[7:]
    error = values - parse_term("train2·bond7·factors(dense f32)").nearest(values).dense()
    assert float(error.norm()) == pytest.approx(float(tail.norm()), rel=1e-4)


def test_three_sites_lose_no_more_than_both_cuts() -> None:
    values = torch.randn(36, 64)
    paired = values.view(3, 3, 4, 4, 4, 4).permute(0, 3, 1, 4, 2, 5)
    cuts = (paired.reshape(12, -1), paired.reshape(-1, 16))
    errors = []
    for bond in (2, 5, 9, 12):
        found = parse_term(f"train3·bond{bond}·factors(dense f32)").nearest(values).dense()
        bound = sum(float(torch.linalg.svdvals(cut)[bond:].square().sum()) for cut in cuts)
        errors.append(float((found - values).square().sum()))
        assert errors[-1] <= bound * (1 + 1e-5)
    assert errors == sorted(errors, reverse=True)


def test_singular_values_are_split_evenly_so_that_small_weights_fit_float16() -> None:
    values = torch.randn(64, 64)
    first = parse_term("train3·bond8·factors(dense f32)").nearest(values).stored["core1.values"]
    paired = values.view(4, 4, 4, 4, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(16, -1)
    norms = first.view(16, 8).norm(dim=0)
    torch.testing.assert_close(norms, torch.linalg.svdvals(paired)[:8].sqrt(), rtol=1e-4, atol=0)
    exact = TensorTrainFormat(3, 256)
    for scale in (1e-5, 1.0, 1e5):
        error = exact.nearest(scale * values).dense() - scale * values
        assert float(error.norm() / (scale * values).norm()) < 2e-3
    assert not bool(exact.nearest(torch.zeros(36, 36)).dense().any())


def test_parameters_are_counted_as_in_the_paper() -> None:
    # 216 = 6 * 6 * 6: 36 X + 36 X^2 + 36 X, float16
    for bond in (4, 16, 36):
        assert TensorTrainFormat(3, bond).bits((216, 216)) == 16 * (72 * bond + 36 * bond**2)
    assert TensorTrainFormat(3, 99).bits((216, 216)) == TensorTrainFormat(3, 36).bits((216, 216))


def test_sizes_are_cut_into_factors_as_equal_as_can_be() -> None:
    expected = {576: (8, 8, 9), 1536: (8, 12, 16), 192: (4, 6, 8), 49152: (32, 32, 48)}
    assert {size: factorise(size, 3) for size in expected} == expected
    for size in range(1, 300):
        for count in (2, 3):
            assert prod(factorise(size, count)) == size


def test_primes_are_refused() -> None:
    assert "127 is no product" in str(parse_term("train2·bond4").refusal((36, 127)))
    why = str(parse_term("train3·bond4").refusal((33, 576)))
    assert "train2·bond4" in why
    assert "rank4" in why
    for text in ("train2", "train4·bond8", "train2·bond0", "train2·bond8·g16", "train3·8"):
        with pytest.raises(FormatError):
            parse_term(text)
