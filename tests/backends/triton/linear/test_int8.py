"""Products of bytes: where codes lie, and which terms are multiplied so."""

from __future__ import annotations

import pytest
import torch

from qc.backends.region import ArrayArgument
from qc.backends.triton.linear.int8 import byte_fragments, int8_term
from qc.backends.triton.linear.loop import Source
from qc.backends.triton.linear.place import Place
from qc.ir.weights.notation import parse_weights


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("outer", "inner"), [(16, 128), (7, 33), (33, 129)])
def test_bytes_hold_every_code_where_tensor_cores_want_it(
    bits: int, outer: int, inner: int
) -> None:
    codes = torch.randint(0, 1 << bits, (outer, inner), dtype=torch.int32)
    stored = byte_fragments(codes, bits)
    found = torch.zeros_like(codes)
    for block in range(stored.shape[0]):
        for step in range(stored.shape[1]):
            for number, byte in enumerate(stored[block, step].tolist()):
                g, t, r, h, i = (number >> 6, number >> 4 & 3, number >> 3 & 1, number >> 2 & 1,
                                 number & 3)  # fmt: skip
                for run in range(8 // bits):
                    row = 16 * block + 8 * r + g
                    column = step * 256 // bits + 32 * run + 16 * h + 4 * t + i
                    if row < outer and column < inner:
                        code = byte >> (bits * run) & ((1 << bits) - 1)
                        found[row, column] = code
    assert torch.equal(found, codes)


def quantized(group: int, channels: int = 512) -> Source:
    """Return int8 rows with a scale for `group` channels."""
    codes, scale = ArrayArgument(0, "codes"), ArrayArgument(0, "scale")
    return Source(codes, channels, "quantized", scale=scale, group=group)


@pytest.mark.parametrize(
    ("text", "group", "taken"),
    [
        ("int4·g128", 512, True),
        ("int8·row", 512, True),
        ("int4·g32·min", 128, True),
        ("int4·g128", 32, False),  # too many scales of rows
        ("int3·g128", 512, False),
        ("lookup4·g128", 512, False),
    ],
)
def test_codes_of_four_and_eight_bits_are_multiplied_as_bytes(
    text: str, group: int, taken: bool
) -> None:
    place = Place(1, "0", parse_weights(text).terms[0], (64, 512))
    assert (int8_term(place, quantized(group)) is not None) == taken
