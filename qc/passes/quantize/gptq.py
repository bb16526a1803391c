"""GPTQ: round column by column, and let later columns make up for the error of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qc.errors import FormatError
from qc.ir.weights.rounding import Ranges, Rounding
from qc.ir.weights.weight import Term, TermFormat
from qc.passes.calibration import Drift, Hessian, Statistic
from qc.passes.quantize.calibrated import StoreByData
from qc.passes.quantize.error_feedback import (
    Curvature,
    descend,
    feed_back,
    output_error,
    prepare,
)


def gptq(
    values: Tensor, curvature: Curvature, rounding: Rounding, *, static: bool, refinements: int = 0
) -> Term:
    """Store a matrix [out, in]; minimises tr((W - Q) H (W - Q)^T) greedily.

    `static` fits the grids of all groups to W first, so that the order of the columns is free.
    Each refinement solves for all grids at once with the codes fixed, then descends on the codes.
    """
    columns = values.T.contiguous()
    if static:
        rounding.fit(0, columns, curvature.importance)
    result, _ = feed_back(columns, curvature, rounding, fitted=static)
    return refined(columns, curvature, rounding, result, refinements)


def refined(
    columns: Tensor, curvature: Curvature, rounding: Rounding, result: Tensor, rounds: int
) -> Term:
    """Improve grids and codes in turn, `rounds` times or until it stops paying."""
    term = rounding.term()
    least = output_error(columns - result, curvature.hessian) if rounds else 0.0
    for _ in range(rounds):
        rounding.refit(columns, curvature.hessian)
        result = descend(columns, curvature, rounding, rounding.values())
        error = output_error(columns - result, curvature.hessian)
        if not error < least:
            break
        term, least = rounding.term(), error
    return term


def repairing(hessian: Tensor, drift: Tensor, damping: float) -> Tensor:
    """Return D = 2/n (Y - X)^T X (H + damping)^-1: with W + W D, X gives what Y gave with W as
    nearly as a linear can. float64[in, in]; dead inputs stay as they are."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal += damping * diagonal.mean() + 1e-30
    solved: Tensor = torch.linalg.solve(damped, drift.double().T).T
    return solved


@dataclass(frozen=True)
class Gptq(StoreByData):
    """Store the weights of linears so that the error of what they compute on data is small.

        %w = weight dense f32    -->  %w = weight int4·g128·zero
        linear(%x, %w)                linear(%x, %w)

    Lossy: minimises ||X W^T - X Q^T||^2 greedily, column by column. Frantar et al. 2022 (GPTQ),
    algorithm 1. `act_order` takes columns by falling H_ii ("desc_act"); `static_groups` fits the
    grids before, so that this costs nothing at run time. In a sum of terms the first that can be
    rounded by columns is; terms that take outliers are chosen before it, others around it.
    `ranges` "mse" searches for the grid of least error, weighted by H_ii.

    Beyond the paper: `refinements`, see `gptq`; `repair` (0 to 1) also makes up for the part of the
    earlier errors that a weight can undo, ||Y W^T - X Q^T||^2 with the original inputs Y, at twice
    the evaluations. Li et al. 2025 (GPTAQ), section 3, for the objective; here solved for the
    weights in front of the rounding.
    """

    name: ClassVar[str] = "gptq"
    act_order: bool = True
    static_groups: bool = True
    damping: float = 0.01
    ranges: Ranges = "extremes"
    refinements: int = 0
    repair: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(each.rounding((64, 64)) for each in self.weights.terms):
            raise FormatError(
                f"{self.format} has no term that GPTQ can round column by column; "
                "int4·g128·zero or lookup3·row has"
            )

    def statistics(self) -> tuple[Statistic, ...]:
        return (Hessian(), Drift()) if self.repair else (Hessian(),)

    def prepare(self, hessian: Tensor, name: str) -> Curvature:
        return prepare(hessian, self.damping, self.act_order, name)

    def correction(self, hessian: Tensor, drift: Tensor) -> Tensor:
        return repairing(hessian, drift, self.damping).float() * self.repair

    def store_term(self, format: TermFormat, values: Tensor, prepared: Curvature) -> Term:
        rounding = format.rounding((values.shape[0], values.shape[1]), self.ranges)
        if rounding is None:
            return format.nearest(values)
        static = rounding.group >= values.shape[1] or (self.static_groups and rounding.group > 1)
        if self.act_order and not static and rounding.group > 1:
            raise FormatError(
                f"groups of {rounding.group} inputs that are fitted as they come need their inputs "
                "in order: act_order needs static_groups"
            )
        return gptq(values, prepared, rounding, static=static, refinements=self.refinements)
