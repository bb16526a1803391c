"""Find every storage format: the classes that the files of this folder define."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import qc.ir.weights
from qc.ir.weights.weight import TermFormat


def modules() -> Iterator[Any]:
    """Import every file of this folder, and every other folder on its path."""
    for module in iter_modules(qc.ir.weights.__path__):
        yield import_module(f"qc.ir.weights.{module.name}")


@cache
def term_formats() -> dict[str, type[TermFormat]]:
    """Return all formats by class name; a new file is found by being there."""
    found: dict[str, type[TermFormat]] = {}
    for module in modules():
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, TermFormat):
                found[value.__name__] = value
    del found[TermFormat.__name__]
    return found


@cache
def short_names() -> dict[str, str]:
    """Return the names that stand for a longer printed form: the SHORT_NAMES of all files."""
    found: dict[str, str] = {}
    for module in modules():
        found |= getattr(module, "SHORT_NAMES", {})
    return found


@cache
def example_formats() -> dict[str, list[TermFormat]]:
    """Return formats to test and to time, by class name: the EXAMPLES of each format's file."""
    from qc.ir.weights.notation import parse_term

    return {
        name: [parse_term(text) for text in cls.examples] for name, cls in term_formats().items()
    }
