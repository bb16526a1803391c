"""Scales of any kind as pairs of float16: nothing is lost but what float16 rounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qc.backends.triton.linear.affine import affine_term
from qc.backends.triton.linear.coded import Stream
from qc.backends.triton.linear.place import Place
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.packing import unpack_codes
from qc.ir.weights.weight import Weight

SHAPE = 40, 256


def stored(format: str, values: Tensor) -> Weight:
    """Store values in a format of one term."""
    (term,) = parse_weights(format).terms
    return Weight("w", SHAPE, (term.nearest(values),))


def numbers_of(stream: Stream, weight: Weight) -> Tensor:
    """Return what the codes of a stream stand for, f32[outputs, channels]."""
    codes = unpack_codes(weight.arrays()[stream.array][stream.lead], stream.bits, SHAPE[1]).int()
    if stream.half is None:
        return codes.float() * stream.digit + stream.offset
    magnitude, place = stream.half
    bits = (codes & ((1 << magnitude) - 1)) << place | (codes >> magnitude) << 15
    return bits.to(torch.int16).view(torch.float16).float()


@pytest.mark.parametrize(
    ("format", "spread", "moved", "error"),
    [
        ("mxfp4", 60, True, 0.0),
        ("nvfp4", 0, True, 0.0),
        ("int4·g32·scale(e4m3·tensor)", 0, True, 0.0),
        ("int4·g32·scale(dense f32)", 60, True, 2.0**-11),
        ("int4·g16·min", 0, False, 2.0**-11),
    ],
)
def test_scales_of_any_kind_are_pairs_of_float16(
    format: str, spread: int, moved: bool, error: float
) -> None:
    torch.manual_seed(0)
    rows = (torch.rand(SHAPE[0], 1) * 2 - 1) * spread
    values = torch.randn(SHAPE) * rows.round().exp2()
    weight = stored(format, values)
    place = Place(0, "0", weight.format.terms[0], SHAPE)
    term = affine_term(place)
    assert term is not None
    factors = term.factors_of_groups
    assert factors.moved == moved
    scale, offset = factors.values(weight)
    assert scale.half().isfinite().all()
    found = scale.half().float().T.repeat_interleave(term.group, 1)
    found = found * numbers_of(factors.stream, weight)
    if offset is not None:
        found = found + offset.half().float().T.repeat_interleave(term.group, 1)
    if moved:
        found = found * factors.whole(weight)[:, None]
    exact = weight.dense()
    largest = exact.abs().amax(1, keepdim=True)
    assert ((found - exact).abs() / largest).max() <= max(error * 2, 1e-7)


def test_a_row_of_zeros_stays_one() -> None:
    values = torch.randn(SHAPE)
    values[3] = 0
    weight = stored("mxfp4", values)
    term = affine_term(Place(0, "0", weight.format.terms[0], SHAPE))
    assert term is not None
    assert term.factors_of_groups.whole(weight).isfinite().all()
