"""Round a matrix column by column and let later columns make up for the errors of earlier ones.

The engine behind GPTQ and its family. For one row w of a weight and H = 2/n sum x x^T, the error
(w - q) H (w - q)^T is made small greedily: with U upper triangular, H^-1 = U^T U, column i leaves
e = (w_i - q_i) / U_ii, and every later column j becomes w_j - e U_ij. Frantar et al. 2022 (GPTQ),
algorithm 1. Arrays are transposed, [in, out].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qc.errors import ModelError
from qc.ir.device import CPU, moved
from qc.ir.weights.rounding import Rounding

LAZY = 32
"""Columns between two updates of all that follow: GPTQ, section 3, step 2. The paper's 128 keep a
GPU busy; on a CPU the columns of one block then leave the caches."""

ATTEMPTS = 5
"""Times the damping is raised tenfold until a factor exists; 10^5 times damps everything away."""

Exempt = Callable[[int, Tensor, Tensor], Tensor | None]
"""(column, values, rounded values) -> bool[out]: weights that are kept as they are, without error;
None: no weight of this column."""


@dataclass(frozen=True)
class Curvature:
    """H ready for use: damped, without dead inputs, and factored in some order of the columns."""

    hessian: Tensor
    factor: Tensor
    order: Tensor
    dead: Tensor

    @property
    def importance(self) -> Tensor:
        """The diagonal of H, in the order of the matrix: [in, 1]."""
        return self.hessian.diagonal().float().unsqueeze(1)


def prepare(hessian: Tensor, damping: float, sort: bool, name: str = "") -> Curvature:
    """Damp H and factor its inverse; `sort` puts the columns with the largest H_ii first.

    Inputs that are always 0 (H_ii = 0) get H_ii = 1 and their weights become 0. H_ii grows by
    `damping` times the mean of the diagonal, ten times more where that is not enough.
    """
    h = hessian.double().clone()
    diagonal = h.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1
    columns = torch.arange(len(h))
    order = diagonal.argsort(descending=True, stable=True) if sort else columns
    mean = float(diagonal.mean())
    for attempt in range(ATTEMPTS):
        damped = h.clone()
        damped.diagonal().add_(damping * mean * 10**attempt)
        factor = inverse_factor(damped[order][:, order])
        if factor is not None:
            return Curvature(damped, factor.float(), order, dead)
    raise ModelError(
        f"the inputs of {name or 'a linear'} have a Hessian that stays singular with a damping of "
        f"{damping * 10 ** (ATTEMPTS - 1):.3g}: they hold NaN, infinities or nothing"
    )


def inverse_factor(h: Tensor) -> Tensor | None:
    """Return U, upper triangular, with H^-1 = U^T U; None where H is not positive definite.

    With the order of the columns reversed, H = L L^T; reversed back, L is upper triangular and its
    inverse is U: one factorisation and no inverse of H.
    """
    factor, info = torch.linalg.cholesky_ex(h.flip(0, 1))
    if int(info) or not bool(torch.isfinite(factor).all()):
        return None
    upper = factor.flip(0, 1)
    identity = torch.eye(len(h), dtype=h.dtype)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse


def feed_back(
    values: Tensor,
    curvature: Curvature,
    rounding: Rounding,
    *,
    fitted: bool,
    exempt: Exempt | None = None,
    entering: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, float]:
    """Round all columns in the order of the curvature; return the result [in, out] and its loss.

    `fitted` says that all groups are fitted already; else each is when the first of its columns
    comes, from the values that it has by then, which takes the natural order of the columns, or
    groups of one. `entering(column, values, U_ii of the group)` sees a group before it is fitted
    and returns the values to fit it to. Weights that are `exempt` leave no error. The loss is
    sum (w - q)^2 / U_ii^2, the error of the damped objective.
    """
    order, factor = moved(curvature.order, CPU).tolist(), curvature.factor
    steps = moved(factor.diagonal(), CPU).tolist()
    left = values[curvature.order].contiguous()
    left[curvature.dead[curvature.order]] = 0
    result = torch.empty_like(left)
    block = LAZY if fitted else -(-LAZY // rounding.group) * rounding.group
    importance = curvature.importance
    loss = 0.0
    for first in range(0, len(left), block):
        last = min(first + block, len(left))
        errors = torch.empty(last - first, left.shape[1])
        for i in range(first, last):
            if not fitted and i % rounding.group == 0:
                group = slice(i, min(i + rounding.group, len(left)))
                seen = left[group]
                if entering is not None:
                    seen = entering(i, seen, factor.diagonal()[group])
                rounding.fit(order[i], seen, importance[curvature.order[group]])
            w = left[i]
            q = rounding.round(order[i], w)
            kept = None if exempt is None else exempt(order[i], w, q)
            if kept is not None:
                q = torch.where(kept, w, q)
            result[i] = q
            error = torch.sub(w, q, out=errors[i - first]).div_(steps[i])
            if i + 1 < last:
                left[i + 1 : last].addr_(factor[i, i + 1 : last], error, alpha=-1)
        loss += float(errors.square().sum(dtype=torch.float64))
        left[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    restored = torch.empty_like(result)
    restored[curvature.order] = result
    return restored, loss


def descend(values: Tensor, curvature: Curvature, rounding: Rounding, current: Tensor) -> Tensor:
    """Choose every code once more, the others fixed; return the result [in, out].

    With E = W - Q, the best value of column i alone is q_i + (H E)_i / H_ii, rounded; the error
    never rises. Behdin et al. 2023 (QuantEase), algorithm 2; blocks of columns as in GPTQ.
    """
    h = curvature.hessian.float()
    inverse = moved(1 / h.diagonal(), CPU).tolist()
    left = torch.where(curvature.dead.unsqueeze(1), 0.0, values).sub_(current)
    rounded = current.clone()
    for first in range(0, len(h), LAZY):
        last = min(first + LAZY, len(h))
        pull = h[first:last] @ left
        for i in range(first, last):
            new = rounding.round(i, torch.add(rounded[i], pull[i - first], alpha=inverse[i]))
            change = new - rounded[i]
            if i + 1 < last:
                pull[i + 1 - first :].addr_(h[i + 1 : last, i], change, alpha=-1)
            left[i] -= change
            rounded[i] = new
    return rounded


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """Return tr(E H E^T) of E^T [in, out]: the squared error of the outputs, times 2 / tokens;
    in the precision of H."""
    wide = difference.to(hessian.dtype)
    return float((hessian @ wide).mul_(wide).sum(dtype=torch.float64))
