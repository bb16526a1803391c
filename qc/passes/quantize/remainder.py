"""What of a weight is still to be rounded: all of it, or what a decomposition has left.

A decomposition in front of quantization makes `dense f32 + rank16` of a weight: its first term is
what is left, in 16 bits or more, the others are stored already and stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qc.ir.weights.dense import DenseFormat, dense_term
from qc.ir.weights.weight import Term, Weight, WeightFormat

LEFT = DenseFormat(torch.float32)


def decomposed(weight: Weight, left: Tensor, parts: tuple[Term, ...]) -> Weight:
    """Return the weight with `left` [out, in] still to be rounded, and parts that are stored."""
    stored = dense_term(left.float().contiguous())
    return with_parts(weight, stored, parts)


def with_parts(weight: Weight, left: Term, parts: tuple[Term, ...]) -> Weight:
    """Return the weight with more parts beside what is left."""
    kept = weight.terms[1:] if is_decomposed(weight) else ()
    return Weight(weight.name, weight.shape, (left, *kept, *parts), weight.dtype)


def is_decomposed(weight: Weight) -> bool:
    """Say whether a decomposition has left something to round."""
    return len(weight.terms) > 1 and weight.terms[0].format == LEFT


def is_unrounded(weight: Weight) -> bool:
    """Say whether the first term of a weight is plain values of 16 bits or more. A product of
    factors, such as a branch of its own, is stored already."""
    first = weight.terms[0]
    is_wide = first.bits >= 16 * weight.elements
    return is_wide and first.format.structure(first.shape) is None


def remainder(weight: Weight) -> Tensor:
    """Return the values that are still to be rounded [out, in]."""
    return weight.terms[0].dense() if is_decomposed(weight) else weight.dense()


def with_remainder(weight: Weight, terms: tuple[Term, ...]) -> Weight:
    """Return the weight with its remainder stored as `terms`, in front of what stays."""
    kept = weight.terms[1:] if is_decomposed(weight) else ()
    return Weight(weight.name, weight.shape, (*terms, *kept), weight.dtype)


def planned_remainder(weight: Weight, format: WeightFormat) -> Weight:
    """Return the weight without values, with its remainder in `format`."""
    terms = tuple(term.planned(weight.shape) for term in format.terms)
    kept = weight.terms[1:] if is_decomposed(weight) else ()
    planned = tuple(term.format.planned(weight.shape) for term in kept)
    return Weight(weight.name, weight.shape, (*terms, *planned), weight.dtype)
