"""Orthonormal transforms that spread outliers: Sylvester matrices times a small factor.

A transform of n = 2^k m channels is H = S (x) F: S is Sylvester's matrix of order 2^k, applied by
k rounds of sums and differences, and F any orthogonal factor of order m, applied as a matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 256
"""The largest order of a Hadamard factor. Each channel costs a factor's order in products; beyond
this, a factor of the odd part is much cheaper, and its entries are at most sqrt(2) times larger."""


def rotate(x: Tensor, factor: Tensor, block: int) -> Tensor:
    """Return x (S (x) factor) for each `block` channels of the last axis, in the dtype of x.

    Sylvester 1867: S_2n = [[S_n, S_n], [S_n, -S_n]] / sqrt(2), symmetric and its own inverse.
    """
    order = factor.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    mixed = x.to(wide).reshape(-1, order) @ factor.to(wide)
    stride = order
    while stride < block:
        low, high = mixed.reshape(-1, 2, stride).unbind(1)
        mixed = torch.stack((low + high, low - high), 1)
        stride *= 2
    return (mixed * math.sqrt(order / block)).reshape(x.shape).to(x.dtype)


def factor_for(size: int) -> Tensor:
    """Return the orthonormal factor float32[m, m] for transforms of size 2^k m.

    m is the least order of a Hadamard matrix known here, up to `LARGEST`, so that all entries of
    S (x) F are +-1/sqrt(size). Where there is none (size = 2 mod 4, an odd size, or an order that
    needs another construction, such as 92, 116 or 172), m is the odd part and F the Hartley matrix.
    """
    odd = size // (size & -size)
    order = 1 if odd == 1 else 4 * odd
    while order <= LARGEST and size % order == 0:
        found = hadamard(order)
        if found is not None:
            return (found / math.sqrt(order)).float()
        order *= 2
    return hartley(odd).float()


def hartley(order: int) -> Tensor:
    """F_jk = (cos + sin)(2 pi j k / m) / sqrt(m): orthogonal and symmetric. Bracewell 1983."""
    index = torch.arange(order)
    angle = (index.outer(index) % order).double() * (2 * math.pi / order)
    return (angle.cos() + angle.sin()) / math.sqrt(order)


def hadamard(order: int) -> Tensor | None:
    """Return a matrix of +-1 with orthogonal rows, float64[order, order]; None where neither
    construction of Paley 1933 applies with a prime q (prime powers are left out).

    I:  order = q + 1, q = 3 mod 4:    1 + C
    II: order = 2 (q + 1), q = 1 mod 4: C (x) [[1, 1], [1, -1]] + 1 (x) [[1, -1], [-1, -1]]
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if is_prime(order - 1) and order % 4 == 0:
        return torch.eye(order, dtype=torch.float64) + conference(order - 1)
    half = order // 2
    if order % 4 == 0 and half % 4 == 2 and is_prime(half - 1):
        on = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        off = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference(half - 1), on) + torch.kron(torch.eye(half), off)
    return None


def conference(q: int) -> Tensor:
    """Return C of order q + 1 with C C^T = q: bordered quadratic characters chi(i - j) modulo a
    prime; antisymmetric for q = 3 mod 4, symmetric for q = 1 mod 4."""
    index = torch.arange(q)
    squares = (index * index) % q
    chi = torch.isin(index, squares).double() * 2 - 1
    chi[0] = 0
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:] = 1
    matrix[1:, 0] = 1 if q % 4 == 1 else -1
    matrix[1:, 1:] = chi[(index.unsqueeze(1) - index) % q]
    return matrix


def is_prime(number: int) -> bool:
    """Try all divisors."""
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))
