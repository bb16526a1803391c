"""qc, a compiler for quantized neural networks.

    artifact = qc.compile(model, target="cpu-w4")
    artifact.generate(input_ids, max_new_tokens=64)

Names are loaded when they are first used: `import qc` costs nothing, and an artifact runs with
`qc.load` where only numpy is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qc.compiler import check as check
    from qc.compiler import compile as compile
    from qc.compiler import trace as trace
    from qc.errors import QcError as QcError
    from qc.ir.target import Target as Target
    from qc.loading import load as load
    from qc.passes.pipeline import Pass as Pass
    from qc.passes.pipeline import Pipeline as Pipeline
    from qc.passes.recipes import RECIPES as RECIPES
    from qc.passes.recipes import Recipe as Recipe
    from qc.runtime import Artifact as Artifact

__version__ = "0.1.0"

PLACES = {
    "compile": "qc.compiler",
    "check": "qc.compiler",
    "trace": "qc.compiler",
    "load": "qc.loading",
    "Artifact": "qc.runtime",
    "Pipeline": "qc.passes.pipeline",
    "Pass": "qc.passes.pipeline",
    "Recipe": "qc.passes.recipes",
    "RECIPES": "qc.passes.recipes",
    "Target": "qc.ir.target",
    "QcError": "qc.errors",
}
"""Where each public name is defined."""

__all__ = sorted([*PLACES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'qc' has no attribute {name!r}")
    value = getattr(import_module(PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__]
