"""The emulation of inline PTX, and the conversions that are written in it, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from qc.backends.triton.device.fragments import conversion, half_pair
from qc.backends.triton.interpret import halves, install, lop3, run_ptx


@pytest.mark.parametrize("table", [0xEA, 0x80, 0x3C, 0x00, 0xFF])
def test_lop3_is_its_truth_table(table: int) -> None:
    a, b, c = (np.array([word], np.uint32) for word in (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA))
    # in these three words, bit i of each byte is bit 2, 1 and 0 of i: the result is the table
    expected = table * 0x01010101
    assert int(lop3(a, b, c, np.array([table], np.uint32))[0]) == expected


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1 / 16, -72.0, 1024.0, -1025.0, 8.0, -2048.0])
def test_a_half_pair_is_the_float16_twice(value: float) -> None:
    word = np.array([int(half_pair(value), 0)], np.uint32)
    assert halves(word).tolist() == [[value, value]]


@pytest.mark.parametrize(
    ("bits", "unit", "zero"),
    [(1, 1, 0), (1, 2, 1), (1, 1, 4), (2, 1, 0), (2, 1, 1), (2, 2, 0), (4, 1, 8), (4, 1, 0),
     (4, 2, 0), (4, 4, 0), (4, 8, 0), (8, 1, 128), (8, 1, 0)],
)  # fmt: skip
def test_a_conversion_gives_every_code_exactly(bits: int, unit: int, zero: int) -> None:
    words = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32)
    count = 16 // bits
    found = run_ptx(conversion(bits, unit, zero), [words], count)
    for number, register in enumerate(found):
        for lane in (0, 1):
            codes = (words >> np.uint32(16 * lane + bits * number)) & np.uint32((1 << bits) - 1)
            expected = unit * codes.astype(np.int64) - zero
            assert np.array_equal(halves(register)[:, lane].astype(np.int64), expected)


def test_the_interpreter_is_not_taught_where_triton_compiles() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        install()
