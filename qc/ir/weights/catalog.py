"""Find every storage format: the classes that the files of this folder define."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

import qc.ir.weights
from qc.ir.weights.weight import TermFormat


@cache
def term_formats() -> dict[str, type[TermFormat]]:
    """Return all formats by class name; a new file is found by being there."""
    found: dict[str, type[TermFormat]] = {}
    for module in iter_modules(qc.ir.weights.__path__):
        for value in vars(import_module(f"qc.ir.weights.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, TermFormat):
                found[value.__name__] = value
    del found[TermFormat.__name__]
    return found
