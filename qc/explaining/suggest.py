"""What would help a layer most for the bits that it costs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from qc.errors import FormatError
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import WeightFormat
from qc.passes.quantize.round_to_nearest import round_to_nearest
from qc.passes.transform.awq import total

FREE = 0.02
"""Bits a weight below which a change of format counts as costing so much: another axis is free."""


def alternatives(format: str) -> Iterator[tuple[str, str]]:
    """Yield changes of a printed format in words, and the format: one more bit, outliers, a rank,
    smaller groups, groups along the other axis."""
    bits = re.search(r"int(\d)", format)
    group = re.search(r"·g(\d+)", format)
    if bits and int(bits[1]) < 8:
        more = f"int{int(bits[1]) + 1}"
        yield f"{int(bits[1]) + 1} bits", format.replace(bits[0], more, 1)
    if group and int(group[1]) >= 32:
        half = int(group[1]) // 2
        yield f"groups of {half}", format.replace(group[0], f"·g{half}", 1)
        yield "groups along the outputs", format.replace(group[0], f"·o{group[1]}", 1)
    if "sparse" not in format:
        yield "1 % outliers", f"{format} + sparse1%"
    if "rank" not in format:
        yield "rank 8", f"{format} + rank8"


def relative_output_error(x: Tensor, error: Tensor, values: Tensor) -> float:
    """|X E^T| / |X W^T| in the Frobenius norm, x [tokens, in]."""
    return float((x @ error.T).norm() / (x @ values.T).norm().clamp_min(1e-30))


def suggest(values: Tensor, x: Tensor, format: str) -> str:
    """Name the change that lowers the output error of rounding most for each bit it costs.

    Formats are compared by round-to-nearest alone: what a better method gains comes on top.
    """
    known = storable(format, values)
    if known is None:
        return ""
    before = rounding_error(values, x, known)
    best, gain = "", 0.0
    for words, text in alternatives(format):
        other = storable(text, values)
        if other is None:
            continue
        after, size = rounding_error(values, x, other), tuple(values.shape)
        cost = max(FREE, (other.bits(size) - known.bits(size)) / values.numel())
        if after < 0.97 * before and (before - after) / cost > gain:  # 3 %: less is noise
            gain = (before - after) / cost
            best = f"{words}: error x{after / max(before, 1e-30):.2f} for {cost:+.2f} bits"
    return best


def storable(text: str, values: Tensor) -> WeightFormat | None:
    """Read a format; None where it is none, or does not fit."""
    try:
        format = parse_weights(text)
    except FormatError:
        return None
    return format if format.refusal(tuple(values.shape)) is None else None


def rounding_error(values: Tensor, x: Tensor, format: WeightFormat) -> float:
    """Return the relative output error of round-to-nearest."""
    stored = total(round_to_nearest(values, format))
    return relative_output_error(x, stored - values, values)
