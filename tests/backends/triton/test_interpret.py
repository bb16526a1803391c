"""The emulation of inline PTX, and the conversions that are written in it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl

from qc.backends.triton.device.fragments import (
    conversion,
    conversion_to,
    half_pair,
    small_floats_to,
)
from qc.backends.triton.device.streams import conversion_of_pairs
from qc.backends.triton.interpret import (
    halves,
    install,
    lop3,
    narrowed,
    run_ptx,
    scaled_codes,
    widened,
)
from qc.ir.quantized import QuantizedTensor
from qc.ir.types import ActivationFormat


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


CONVERSIONS = [
    (1, 1, 0), (1, 2, 1), (1, 1, 4), (2, 1, 0), (2, 1, 1), (2, 2, 0), (4, 1, 8), (4, 1, 0),
    (4, 2, 0), (4, 4, 0), (4, 8, 0), (8, 1, 128), (8, 1, 0),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "unit", "zero"), CONVERSIONS)
def test_a_conversion_gives_every_code_exactly(bits: int, unit: int, zero: int) -> None:
    words = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32)
    count = 16 // bits
    found = run_ptx(conversion(bits, unit, zero), [words], count)
    for number, register in enumerate(found):
        for lane in (0, 1):
            codes = (words >> np.uint32(16 * lane + bits * number)) & np.uint32((1 << bits) - 1)
            expected = unit * codes.astype(np.int64) - zero
            assert np.array_equal(halves(register)[:, lane].astype(np.int64), expected)


def test_the_codes_of_pairs_come_apart() -> None:
    words = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32)
    found = run_ptx(conversion_of_pairs(8), [words], 8)
    for number, register in enumerate(found):
        codes = (words >> np.uint32(16 * (number % 2) + 4 * (number // 2))) & np.uint32(15)
        values = register.astype(np.uint16).view(np.float16)
        assert np.array_equal(values, codes.astype(np.float16) - 8)


def brain_pairs(words: np.ndarray) -> np.ndarray:
    """View registers as pairs of bfloat16, widened."""
    return widened(words).reshape(*words.shape, 2)


@pytest.mark.parametrize(
    ("bits", "unit", "zero"), [*CONVERSIONS, (1, 1, 16), (2, 2, 3), (2, 1, 4), (8, 1, 100)]
)
def test_a_conversion_to_bfloat16_gives_every_code_exactly(bits: int, unit: int, zero: int) -> None:
    words = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32)
    found = run_ptx(conversion_to(tl.bfloat16, bits, unit, zero), [words], 16 // bits)
    for number, register in enumerate(found):
        for lane in (0, 1):
            codes = (words >> np.uint32(16 * lane + bits * number)) & np.uint32((1 << bits) - 1)
            expected = unit * codes.astype(np.int64) - zero
            assert np.array_equal(brain_pairs(register)[:, lane].astype(np.int64), expected)


def test_bfloat16_is_rounded_as_torch_does() -> None:
    values = torch.randn(4096) * torch.logspace(-38, 38, 4096)
    wanted = values.bfloat16()
    found = narrowed(values.numpy())
    assert np.array_equal(found, wanted.view(torch.uint16).numpy())
    assert np.array_equal(widened(found), wanted.float().numpy())
    assert np.isnan(widened(narrowed(np.array([np.nan], np.float32)))).all()


@pytest.mark.parametrize(
    ("type", "pairs"), [(tl.float16, halves), (tl.bfloat16, brain_pairs)], ids=["f16", "bf16"]
)
@pytest.mark.parametrize(
    ("bits", "place", "scale", "dtype"),
    [(8, 7, 256.0, torch.float8_e4m3fn), (8, 8, 1.0, torch.float8_e5m2), (4, 9, 16384.0, None)],
)
def test_small_floats_become_halves_bit_for_bit(
    type: Any, pairs: Callable[[Any], Any], bits: int, place: int, scale: float,
    dtype: torch.dtype | None,
) -> None:  # fmt: skip
    words = np.random.default_rng(0).integers(0, 1 << 32, 4096, dtype=np.uint32)
    found = run_ptx(small_floats_to(type, bits, bits - 1, place), [words], 16 // bits)
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for number, register in enumerate(found):
        for lane in (0, 1):
            codes = (words >> np.uint32(16 * lane + bits * number)) & np.uint32((1 << bits) - 1)
            bytes = torch.from_numpy(codes.astype(np.uint8))
            exact = e2m1[codes] if dtype is None else bytes.view(dtype).double().numpy()
            number_of = np.isfinite(exact)
            with np.errstate(invalid="ignore"):  # of codes that are no number
                got = pairs(register)[:, lane].astype(np.float64) * scale
            assert np.array_equal(got[number_of], exact[number_of])


def test_the_interpreter_is_not_taught_where_triton_compiles() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        install()


def test_floats_of_4_bits_are_those_of_the_format() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (6, 32), dtype=np.uint8)
    scale = random.integers(1, 0x7F, (6, 4), dtype=np.uint8)
    format = ActivationFormat(4, 16, "e2m1")
    one = torch.ones(6, 1)
    held = QuantizedTensor(torch.from_numpy(codes), torch.from_numpy(scale), format, one)
    assert np.array_equal(scaled_codes(codes, scale), held.dequantize().numpy())
