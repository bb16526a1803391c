"""What every op is: a frozen dataclass with a type rule and a torch meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from qc.ir.types import TensorType, ValueType

Sizes = Mapping[str, int]
"""Concrete sizes of the symbolic dimensions while a graph is being evaluated."""


@dataclass(frozen=True)
class Op:
    """Fields are attributes; `infer` checks and infers the type; `meaning` is the reference."""

    name: ClassVar[str]

    def infer(self, *types: Any) -> ValueType:
        """Return the type of the result, or raise ValueError saying what does not fit."""
        raise NotImplementedError

    def meaning(self, *values: Any, **sizes: Any) -> Any:
        """Compute the result in torch from the values of the inputs; ops take `sizes: Sizes` by
        name (spelled here so that a type checker lets each op name its inputs)."""
        raise NotImplementedError

    @property
    def structure(self) -> object:
        """What is equal for two ops that do the same, whatever values they hold."""
        return self

    def attributes(self) -> str:
        """Print the fields that differ from their defaults, as in `axis=1, keepdim=True`."""
        shown = [
            (f.name, getattr(self, f.name))
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return ", ".join(f"{name}={value}" for name, value in shown)

    def __str__(self) -> str:
        attributes = self.attributes()
        return f"{self.name}({attributes})" if attributes else self.name


def same_float(*types: TensorType) -> None:
    """Require floating-point values; ValueError otherwise."""
    for type in types:
        if not type.is_float:
            raise ValueError(f"expected floating-point values, got {type}")
