"""Which terms are codes times factors, and how their codes are laid out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qc.backends.triton.linear.coded import Coded, coded_term, fragments, packed, planes_of
from qc.backends.triton.linear.place import Place
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import Weight


def place(text: str, outer: int = 64, inner: int = 512) -> Place:
    """Return the first term of a weight as operand 1 of a kernel."""
    return Place(1, "0", parse_weights(text).terms[0], (outer, inner))


def term_of(text: str) -> Coded:
    found = coded_term(place(text))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "group", "offsets"),
    [
        ("int4·g128", 128, [-8]),
        ("int4·g32", 32, [-8]),
        ("int8·row", 128, [-128]),
        ("int4·g64·zero", 64, [0, None]),
        ("int3·g64·min", 64, [0, None]),
        ("signs2·g128", 128, [-1, -1]),
        ("planes2·g64", 64, [0, 0, None]),
        ("ternary2bit·g128", 128, [-1]),
        ("e4m3·tensor", 128, [0]),
        ("e2m1·g32", 32, [0]),
        ("e5m2·g64", 64, [0]),
        ("int4·g32·min·scale(uint6·g8)·minimum(uint6·g8)", 32, [0, None]),
    ],
)
def test_codes_and_factors_are_found(text: str, group: int, offsets: list[int | None]) -> None:
    found = term_of(text)
    assert found.group == group
    assert [part.stream and part.stream.offset for part in found.parts] == offsets


@pytest.mark.parametrize("text", ["int4·g16", "int4·o32·min", "lookup4·g128", "e3m2·row",
                                  "dense f16", "ternary·row"])  # fmt: skip
def test_what_varies_within_a_run_is_decoded(text: str) -> None:
    assert coded_term(place(text)) is None


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_hold_all_bits_once(bits: int) -> None:
    places = [place + bit for width, place in planes_of(bits) for bit in range(width)]
    assert sorted(places) == list(range(bits))


def unpacked(words: Tensor, bits: int, outer: int, inner: int) -> Tensor:
    """Read fragments word by word, as device/fragments.py describes them."""
    codes = torch.zeros(outer, inner, dtype=torch.int32)
    columns = 256 // bits
    for block in range(words.shape[0]):
        for step in range(words.shape[1]):
            for number in range(256):
                word = int(words[block, step, number]) & 0xFFFF
                g, t, s, h, p = (number >> 5, number >> 3 & 3, number >> 2 & 1, number >> 1 & 1,
                                 number & 1)  # fmt: skip
                for code in range(16 // bits):
                    run, lower = divmod(code, 2)
                    row = 16 * block + 8 * lower + g
                    column = step * columns + 32 * run + 16 * s + 8 * h + 2 * t + p
                    if row < outer and column < inner:
                        codes[row, column] = word >> (bits * code) & ((1 << bits) - 1)
    return codes


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("outer", "inner"), [(16, 256), (7, 33), (33, 129)])
def test_fragments_hold_every_code_where_tensor_cores_want_it(
    bits: int, outer: int, inner: int
) -> None:
    codes = torch.randint(0, 1 << bits, (outer, inner), dtype=torch.int32)
    assert torch.equal(unpacked(fragments(codes, bits), bits, outer, inner), codes)


@pytest.mark.parametrize("text", ["int3·g32", "int4·g128·zero", "int5·g32", "int8·row"])
def test_repacking_keeps_the_bits(text: str) -> None:
    """A multiple of all block sizes takes as many bytes as the codes that are stored."""
    at = place(text, 64, 512)
    weight = Weight("w", at.shape, (at.format.nearest(torch.randn(at.shape)),))
    found = term_of(text)
    (stream,) = [part.stream for part in found.parts if part.stream is not None]
    planes = [packed(stream, at.shape, bits, low, weight) for bits, low in planes_of(stream.bits)]
    stored = weight.arrays()[stream.array]
    assert sum(plane.numel() * 2 for plane in planes) == stored.numel()
