"""What a kernel rule returns: one TVM function and what its arguments are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qc.backends.region import ArrayArgument, Region, Repack, SizeArgument

Argument = ArrayArgument | SizeArgument


@dataclass(frozen=True)
class Kernel:
    """A TVM PrimFunc (still without its global symbol) and its argument list.

    `repack` gives, by operand and array, how a weight is laid out for this kernel; an array without
    an entry is one of its format's own ("0.codes", "0.scale", ...).
    `in_place` is the operand whose buffer the result shares (a KV cache being appended to).
    `rule` names the kernel rule, for reports.
    """

    rule: str
    function: Any
    arguments: tuple[Argument, ...]
    repack: Mapping[tuple[int, str], Repack] = field(default_factory=dict)
    in_place: int | None = None


KernelRule = Callable[[Region], Kernel | None]
"""Region -> Kernel, or None: "not mine". The first rule that matches wins."""
