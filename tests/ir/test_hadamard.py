"""Factors of rotations are orthogonal, and Hadamard wherever a construction is known."""

import math

import pytest
import torch
from torch import Tensor

from qc.ir.hadamard import LARGEST, conference, factor_for, hadamard, hartley, rotate

EVEN = [1, *range(2, 257, 2)]
LARGE = [576, 1536, 2048, 4096, 11008, 14336]  # channels of published models

FLAT = {
    1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 60, 64, 68, 72, 76, 80, 84, 88, 96, 104,
    108, 112, 120, 124, 128, 132, 136, 140, 144, 148, 152, 160, 164, 168, 176, 180, 192, 196, 200,
    204, 208, 212, 216, 220, 224, 228, 240, 248, 252, 256, 576, 1536, 2048, 4096, 14336,
}  # fmt: skip
"""Sizes whose transform has entries +-1/sqrt(size) alone."""


def whole(size: int) -> Tensor:
    return rotate(torch.eye(size), factor_for(size), size)


@pytest.mark.parametrize("size", [*EVEN, 576, 1536])
def test_a_transform_is_orthogonal(size: int) -> None:
    matrix = whole(size).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double(), rtol=0, atol=1e-6)
    flat = bool(((matrix.abs() * math.sqrt(size) - 1).abs() < 1e-5).all())
    assert flat == (size in FLAT)


@pytest.mark.parametrize("size", LARGE)
def test_large_transforms_are_orthogonal_by_their_parts(size: int) -> None:
    factor = factor_for(size).double()
    order = len(factor)
    assert order <= LARGEST
    assert math.log2(size / order).is_integer()
    torch.testing.assert_close(factor @ factor.T, torch.eye(order).double(), rtol=0, atol=1e-6)
    flat = bool(((factor.abs() * math.sqrt(order) - 1).abs() < 1e-6).all())
    assert flat == (size in FLAT)
    x = torch.randn(3, size)
    there = rotate(x, factor.float(), size)
    torch.testing.assert_close(there.norm(dim=1), x.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rotate(there, factor.T.float(), size), x, rtol=0, atol=4e-6)


@pytest.mark.parametrize("order", [12, 20, 24, 28, 36, 44, 60, 76, 108, 124, 148])
def test_paley_matrices(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order).double())


@pytest.mark.parametrize("order", [2, 6, 52, 92, 100, 116, 172])
def test_orders_that_need_something_else(order: int) -> None:
    assert hadamard(order) is None


@pytest.mark.parametrize("q", [3, 5, 7, 13, 17])
def test_conference_matrices(q: int) -> None:
    matrix = conference(q)
    assert torch.equal(matrix @ matrix.T, q * torch.eye(q + 1).double())
    assert torch.equal(matrix.T, matrix if q % 4 == 1 else -matrix)


@pytest.mark.parametrize("order", [3, 43, 127])
def test_hartley_matrices_are_nearly_flat(order: int) -> None:
    matrix = hartley(order)
    torch.testing.assert_close(matrix @ matrix, torch.eye(order).double(), rtol=0, atol=1e-12)
    assert float(matrix.abs().max()) * math.sqrt(order) <= math.sqrt(2)


def test_blocks_are_rotated_apart() -> None:
    x = torch.randn(2, 24)
    found = rotate(x, factor_for(12), 12)
    torch.testing.assert_close(found, torch.cat([part @ whole(12) for part in x.split(12, 1)], 1))


def test_half_precision_is_rounded_once() -> None:
    x = torch.randn(2, 48).half()
    expected = rotate(x.float(), factor_for(48), 48).half()
    assert torch.equal(rotate(x, factor_for(48), 48), expected)
