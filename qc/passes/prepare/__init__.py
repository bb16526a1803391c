"""Passes that bring a captured graph into the form that all others expect."""

from __future__ import annotations

from qc.passes.pipeline import Pass
from qc.passes.prepare.aten import TranslateAten
from qc.passes.prepare.simplify import Simplify

PREPARE: tuple[Pass, ...] = (TranslateAten(), Simplify())
"""All of them in order."""
