"""Recognise what a network is made of: norms, rotary embeddings, attention, gates.

Every pass here is exact, and matches the shape of the graph and the values in it, never a name.
What is not recognised stays as it is and runs as it is.
"""

from __future__ import annotations

from qc.passes.lift.activations import LiftActivations
from qc.passes.lift.attention import LiftAttention
from qc.passes.lift.fused_linears import SplitLinears
from qc.passes.lift.layout import SinkLayout
from qc.passes.lift.masks import LiftMasks
from qc.passes.lift.norms import LiftNorms
from qc.passes.lift.positions import LiftPositions
from qc.passes.lift.rope import LiftRope
from qc.passes.pipeline import Pass
from qc.passes.prepare.simplify import Simplify

LIFT: tuple[Pass, ...] = (
    LiftNorms(),
    SinkLayout(),
    LiftRope(),
    SplitLinears(),
    LiftActivations(),
    LiftAttention(),
    LiftMasks(),
    LiftPositions(),
    SinkLayout(),
    Simplify(),
)
"""All of them in order. Layout sinks first, so that the patterns meet values in one layout, and
after them, so that the permutations around lifted ops meet and vanish. The result holds nothing
that `Simplify` would change."""
