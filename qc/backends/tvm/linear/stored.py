"""The arrays of a term as they are stored, for kernels that read them element by element."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from qc.backends.tvm.linear.plan import ArrayLayout, packed
from qc.backends.tvm.linear.rendering import StoredArray
from qc.backends.tvm.linear.skeleton import Signature
from qc.backends.tvm.linear.term import STORED_NAMES, Place, held
from qc.ir.weights.expression import Expr
from qc.ir.weights.weight import ArraySpec, Weight


def plain_layouts(specs: Mapping[str, ArraySpec], *expressions: Expr) -> dict[str, ArrayLayout]:
    """Lay arrays out as they are stored; packed codes get room to be read in words."""
    codes = {name for expression in expressions for name in packed(expression)}
    return {
        name: ArrayLayout(spec, unit=8 if name in codes else None) for name, spec in specs.items()
    }


def declare_plain(signature: Signature, place: Place, *expressions: Expr) -> None:
    """Declare the arrays of a term as they are stored."""
    for name, layout in plain_layouts(place.specs, *expressions).items():
        kind = STORED_NAMES[layout.dtype]
        place.declare(signature, name, kind, layout.shape, partial(laid_out, name, layout))


def laid_out(name: str, layout: ArrayLayout, arrays: Mapping[str, Tensor]) -> Tensor:
    """Return one array in its layout."""
    return held(layout.repack(arrays[name]).contiguous())


def laid_out_of(name: str, layout: ArrayLayout, weight: Weight) -> Tensor:
    """Return one array of a weight in its layout."""
    return laid_out(name, layout, weight.arrays())


def plain_arrays(signature: Signature, place: Place, *expressions: Expr) -> dict[str, StoredArray]:
    """Return the arrays that `declare_plain` declared."""
    return {
        name: StoredArray(place.buffer(signature, name), layout.dtype, layout.shape)
        for name, layout in plain_layouts(place.specs, *expressions).items()
    }


def take(name: str, arrays: Mapping[str, Tensor]) -> Tensor:
    """Return one stored array."""
    return held(arrays[name])
