"""Which terms are looked up in registers, and how their codes and tables are laid out."""

from __future__ import annotations

import pytest
import torch

from qc.backends.triton.linear.coded import coded_term, planes_of
from qc.backends.triton.linear.looked import (
    looked_term,
    packed_numbers,
    packed_tables,
    selectors,
)
from qc.backends.triton.linear.place import Place
from qc.ir.weights.lookup import LookupFormat
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import Weight


def place(text: str) -> Place:
    """Return the first term of a weight as operand 1 of a kernel."""
    return Place(1, "0", parse_weights(text).terms[0], (64, 512))


@pytest.mark.parametrize(
    ("text", "rows"),
    [("lookup4·row", 1), ("lookup3·t32xall", 32), ("lookup2·tensor·by(g64)", 64), ("nf4·g32", 64)],
)
def test_tables_of_rows_are_found(text: str, rows: int) -> None:
    found = looked_term(place(text))
    assert found is not None
    (part,) = found.parts
    assert part.stream is not None
    assert part.stream.table is not None
    assert part.stream.table.rows == rows
    assert coded_term(place(text)) is None


@pytest.mark.parametrize("text", ["int3·g128", "int3·g32·min", "int3·g64·zero"])
def test_integers_of_3_bits_are_looked_up(text: str) -> None:
    found = looked_term(place(text))
    assert found is not None
    assert found.parts[0].stream is not None
    assert found.parts[0].stream.bits == 3


@pytest.mark.parametrize(
    "text", ["lookup4·g128", "lookup3·col", "lookup5·row", "int4·g128", "int2·g64", "e2m1·g32"]
)
def test_other_tables_and_codes_are_not(text: str) -> None:
    assert looked_term(place(text)) is None


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_nibble_is_the_code_of_one_channel_of_an_output(bits: int) -> None:
    outputs, channels = 21, 300
    codes = torch.randint(0, 1 << bits, (outputs, channels), dtype=torch.int32)
    words = selectors(codes, bits)
    columns = 256 // bits
    read = torch.full((32, words.shape[1] * columns), -1, dtype=torch.int32)
    for block, step, number in torch.cartesian_prod(*map(torch.arange, words.shape)).tolist():
        g, t, s, h, lower = (number >> 5, number >> 3 & 3, number >> 2 & 1, number >> 1 & 1,
                             number & 1)  # fmt: skip
        word = int(words[block, step, number]) & 0xFFFF
        for nibble in range(4):
            for slot in range(4 // bits):
                run, p = divmod(nibble, 2)
                row = 16 * block + 8 * lower + g
                column = step * columns + 64 * slot + 32 * run + 16 * s + 8 * h + 2 * t + p
                read[row, column] = word >> (4 * nibble + bits * slot) & ((1 << bits) - 1)
    assert (read >= 0).all()
    assert torch.equal(read[:outputs, :channels], codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tables_are_words_of_low_bytes_then_of_high_ones(dtype: torch.dtype) -> None:
    term = LookupFormat(4).nearest(torch.randn(3, 64))
    words = packed_tables("0.table", dtype, Weight("w", (3, 64), (term,)))
    assert words.shape == (8, 3)
    bytes = words.T.contiguous().view(torch.uint8).view(3, 2, 16)
    values = (bytes[:, 0].int() | bytes[:, 1].int() << 8).to(torch.int16).view(dtype)
    assert torch.equal(values, term.stored["table"].view(3, 16).to(dtype))


def test_what_integers_stand_for_is_a_table_of_high_bytes() -> None:
    found = looked_term(place("int3·g128"))
    assert found is not None
    stream = found.parts[0].stream
    assert stream is not None
    term = parse_weights("int3·g128").terms[0].nearest(torch.randn(64, 512))
    weight = Weight("w", (64, 512), (term,))
    words = packed_numbers(stream, torch.float16, False, weight)
    assert words.shape == (2, 1)
    values = (words.T.contiguous().view(torch.uint8).to(torch.int16) << 8).view(torch.float16)
    assert values.flatten().tolist() == [-4, -3, -2, -1, 0, 1, 2, 3]


def test_planes_make_a_nibble_of_at_most_four_bits() -> None:
    assert planes_of(3) == ((1, 0), (2, 1))
