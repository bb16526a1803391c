"""Data that passes look at, and what is measured on it."""

from qc.passes.calibration.calibration import SELF, Calibration, Sequencing
from qc.passes.calibration.checkpoint import Checkpoint
from qc.passes.calibration.coverage import Coverage
from qc.passes.calibration.schedule import LinearGroup
from qc.passes.calibration.selection import select_linears
from qc.passes.calibration.statistics import (
    AbsMax,
    Drift,
    Hessian,
    Moments,
    Samples,
    Statistic,
    Values,
)

__all__ = [
    "SELF",
    "AbsMax",
    "Calibration",
    "Checkpoint",
    "Coverage",
    "Drift",
    "Hessian",
    "LinearGroup",
    "Moments",
    "Samples",
    "Sequencing",
    "Statistic",
    "Values",
    "select_linears",
]
