"""Grouped codes: packing, sizes, names."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc.ir.weights.grouped import GroupedFormat, grouped_term
from qc.ir.weights.packing import pack_codes, unpack_codes

COLS = (1, 7, 31, 33, 127, 129, 576)


@given(st.integers(1, 16), st.integers(1, 5), st.sampled_from(COLS), st.integers(0, 99))
def test_packed_codes_are_unpacked(bits: int, rows: int, cols: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, cols), generator=generator)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, -(-cols * bits // 8))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, bits, cols).long(), codes)


@pytest.mark.parametrize("bits", range(1, 17))
def test_a_row_is_a_little_endian_bit_stream(bits: int) -> None:
    codes = (torch.arange(33) * 7919).remainder(1 << bits).unsqueeze(0)
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes[0]))
    expected = stream.to_bytes(-(-33 * bits // 8), "little")
    assert bytes(pack_codes(codes, bits)[0].tolist()) == expected


@pytest.mark.parametrize("offset", ["symmetric", "zero", "minimum"])
@pytest.mark.parametrize("group", [None, 1, 16, 32, 128])
def test_codes_scales_and_offsets_mean_what_the_page_says(offset: str, group: int | None) -> None:
    layout = GroupedFormat(4, group, offset)  # type: ignore[arg-type]
    codes = torch.randint(0, 16, (3, 33)).to(torch.uint8)
    groups = layout.groups(33)
    scale = torch.rand(3, groups).half()
    shift = {"symmetric": None, "zero": torch.randint(0, 16, (3, groups)), "minimum": -scale}[
        offset
    ]
    dense = grouped_term(layout, codes, scale, shift).dense()
    for row in range(3):
        for col in range(33):
            at = row, col // layout.group_size(33)
            q, s = int(codes[row, col]), float(scale[at])
            expected = {
                "symmetric": lambda q=q, s=s: (q - 8) * s,
                "zero": lambda q=q, s=s, at=at: (q - int(shift[at])) * s,  # type: ignore[index]
                "minimum": lambda q=q, s=s, at=at: q * s + float(shift[at]),  # type: ignore[index]
            }[offset]()
            assert float(dense[row, col]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("layout", "cols", "bits"),
    [
        (GroupedFormat(4, 32), 576, 4 + 16 / 32),
        (GroupedFormat(4, 32, "minimum"), 576, 4 + 32 / 32),
        (GroupedFormat(4, 128, "zero"), 576, 4 + 5 * 24 / 576),  # four groups and a tail of 64
        (GroupedFormat(3, None), 576, 3 + 16 / 576),
        (GroupedFormat(8, 64), 576, 8 + 16 / 64),
    ],
    ids=str,
)
def test_stored_bits_per_weight(layout: GroupedFormat, cols: int, bits: float) -> None:
    assert layout.bits((7, cols)) / (7 * cols) == pytest.approx(bits)


@pytest.mark.parametrize(
    ("layout", "printed"),
    [
        (GroupedFormat(4, 128), "int4·g128"),
        (GroupedFormat(3, None, "zero"), "int3·row·zero"),
        (GroupedFormat(4, 32, "minimum"), "int4·g32·min"),
    ],
)
def test_formats_print_as_reports_show_them(layout: GroupedFormat, printed: str) -> None:
    assert str(layout) == printed


@pytest.mark.parametrize(
    ("bits", "group", "message"),
    [(1, 32, "2 to 8 bits, not 1"), (9, 32, "2 to 8 bits, not 9"), (4, 0, "at least one weight")],
)
def test_impossible_layouts_are_refused(bits: int, group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedFormat(bits, group)
