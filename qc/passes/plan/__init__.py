"""Passes that decide which nodes run together as one kernel."""

from __future__ import annotations

from qc.ir.target import Target
from qc.passes.pipeline import Pipeline
from qc.passes.plan.fuse import Fuse
from qc.passes.plan.widen import WidenActivations


def plan(target: Target) -> Pipeline:
    """Return the passes that group a quantized graph into kernels for a machine."""
    if target.device == "torch":
        return Pipeline()  # the reference runs node by node
    return Pipeline([Fuse()] if target.gpu is None else [WidenActivations(), Fuse()])
