"""Ternary weights: five trits a byte, fields of two bits, absolute means."""

import pytest
import torch

from qc.ir.weights.expression import Const
from qc.ir.weights.notation import parse_term
from qc.ir.weights.ternary import pack_trits, third_digit, trits_of_bytes

COLS = (1, 5, 7, 31, 33, 127, 129, 576)


def test_constants_fold_to_the_digits_of_base_three() -> None:
    for number in range(243):
        digits = [number // 3**place % 3 for place in (4, 3, 2, 1, 0)]
        byte = int(pack_trits(torch.tensor([digits]))[0, 0])
        assert byte == -(-256 * number // 243)
        assert [third_digit(Const(byte), Const(k)) for k in range(5)] == list(map(Const, digits))
        assert trits_of_bytes()[byte].tolist() == digits


@pytest.mark.parametrize("name", ["ternary·row", "ternary2bit·row"])
@pytest.mark.parametrize("cols", COLS)
def test_ternary_weights_are_stored_exactly(name: str, cols: int) -> None:
    trits = torch.randint(-1, 2, (7, cols)).float()
    trits[:, 0] = 1  # so that no row is all zero
    mean = trits.abs().mean(1, keepdim=True).half().float()
    assert torch.equal(parse_term(name).nearest(trits).dense(), trits * mean)


def test_the_scale_is_the_mean_magnitude_of_each_tile() -> None:
    values = torch.randn(6, 33)
    term = parse_term("ternary·g16").nearest(values)
    means = [values[:, cut].abs().mean(1) for cut in (slice(0, 16), slice(16, 32), slice(32, 33))]
    torch.testing.assert_close(term.stored["scale"], torch.stack(means, 1).half())
    scale = term.stored["scale"][:, [0] * 16 + [1] * 16 + [2]].float()
    assert torch.equal(term.dense(), (values / scale).round().clamp(-1, 1) * scale)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("ternary·g128", 1.6 + 16 / 128),
        ("ternary2bit·g128", 2.125),
        ("ternary·g64·scale(uint8·row)", 1.6 + 8 / 64 + 16 / 640),
    ],
)
def test_stored_bits_per_weight(name: str, bits: float) -> None:
    assert parse_term(name).bits((10, 640)) / 6400 == pytest.approx(bits)


@pytest.mark.parametrize("text", ["ternary:g128", "ternary2bit·o32·scale(e4m3·tensor)"])
def test_formats_print_as_reports_show_them(text: str) -> None:
    assert str(parse_term(text)) == text.replace(":", "·")


@pytest.mark.parametrize(("name", "byte"), [("ternary·row", 20), ("ternary2bit·row", 0b11)])
def test_codes_that_no_trit_has_are_refused(name: str, byte: int) -> None:
    arrays = parse_term(name).nearest(torch.ones(2, 3)).arrays()
    arrays["codes"][1, 0] = byte
    with pytest.raises(ValueError, match=r"array 'codes' of .* no trit has"):
        parse_term(name).term((2, 3), arrays)


def test_thirteen_bytes_are_no_trits() -> None:
    assert int((trits_of_bytes() == 3).all(1).sum()) == 13


def test_a_tile_of_zeros_is_zero() -> None:
    assert not parse_term("ternary·g16").nearest(torch.zeros(3, 40)).dense().any()
