"""Small floats: what codes mean, which is nearest, how scales are chosen."""

import pytest
import torch
from torch import Tensor

from qc.ir.weights.floating import FloatingFormat
from qc.ir.weights.notation import parse_term
from qc.ir.weights.packing import pack_codes, unpack_codes
from qc.ir.weights.weight import Term, decoded

PUBLISHED = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e8m0": torch.float8_e8m0fnu,
}


def floating(text: str) -> FloatingFormat:
    """Read a format of this file."""
    found = parse_term(text)
    assert isinstance(found, FloatingFormat)
    return found


def all_codes(format: FloatingFormat) -> Tensor:
    """Return every code that is a number, as one row."""
    codes = torch.arange(1 << format.bits_per_code)
    mask = (1 << format.magnitude_bits) - 1
    return codes[(codes & mask) <= mask - format.no_numbers].unsqueeze(0)


def values_of(format: FloatingFormat, codes: Tensor) -> Tensor:
    """Decode codes [1, n], both ways."""
    packed = pack_codes(codes.to(torch.uint8), format.bits_per_code)
    shape = (1, codes.shape[1])
    term = format.term(shape, {"codes": packed})
    assert torch.equal(decoded(format, shape, term.stored), term.dense())
    return term.dense()[0]


def codes_of(term: Term) -> Tensor:
    """Return the codes of a term."""
    assert isinstance(term.format, FloatingFormat)
    return unpack_codes(term.stored["codes"], term.format.bits_per_code, term.shape[1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_code_of_eight_bits_is_what_torch_says(name: str) -> None:
    format, dtype = floating(name), PUBLISHED[name]
    published = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = all_codes(format)
    assert torch.equal(values_of(format, codes), published[codes[0]])
    for code in torch.nonzero(~published.isfinite()).flatten().tolist():
        assert code not in codes
        with pytest.raises(ValueError, match=r"array 'codes' of .* is no number"):
            format.term((1, 1), {"codes": torch.tensor([[code]], dtype=torch.uint8)})
    assert len(codes[0]) == int(published.isfinite().sum())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("e3m0", [0, 0.25, 0.5, 1, 2, 4, 8, 16]),
        ("ue2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("ue2m0", [0.5, 1, 2, 4]),
        ("e1m1", [0, 1, 2, 3]),
        ("e2m1b3", [0, 0.125, 0.25, 0.375, 0.5, 0.75, 1, 1.5]),
    ],
)
def test_values_of_the_codes(name: str, values: list[float]) -> None:
    format = floating(name)
    expected = torch.tensor(values, dtype=torch.float32)
    if format.sign == "signed":
        expected = torch.cat([expected, -expected])
    assert values_of(format, torch.arange(len(expected)).unsqueeze(0)).tolist() == expected.tolist()


@pytest.mark.parametrize(("name", "top"), [("e2m3", 7.5), ("e3m2", 28), ("e4m3", 448)])
def test_the_largest_value(name: str, top: float) -> None:
    values = values_of(floating(name), all_codes(floating(name)))
    assert float(values.max()) == top
    assert float(floating(name).nearest(torch.tensor([[1e9, -1e9]])).dense()[0, 1]) == -top


@pytest.mark.parametrize(
    "name", ["e2m1", "e3m2", "e2m3", "e4m3", "e5m2", "e3m0", "ue4m3", "ue3m1b5"]
)
def test_the_nearest_value_is_chosen(name: str) -> None:
    format = floating(name)
    values = values_of(format, all_codes(format))
    wanted = torch.cat([torch.randn(500), torch.randn(500) * float(values.max()) / 2])
    found = format.nearest(wanted.unsqueeze(0)).dense()[0]
    least = (wanted.double().unsqueeze(1) - values.double()).abs().min(1).values
    assert torch.equal((wanted.double() - found.double()).abs(), least)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_halfway_the_even_code_is_chosen_as_torch_does(name: str) -> None:
    format = floating(name)
    points = torch.tensor(format.magnitudes())
    halfway = ((points[1:] + points[:-1]) / 2).unsqueeze(0)
    expected = halfway.to(PUBLISHED[name]).view(torch.uint8)
    assert torch.equal(codes_of(format.nearest(halfway)), expected)
    assert torch.equal(codes_of(format.nearest(-halfway)), expected | 128)


@pytest.mark.parametrize(
    ("short", "printed"),
    [
        ("fp4", "e2m1·g32"),
        ("fp6", "e3m2·row"),
        ("fp8", "e4m3·row"),
        ("mxfp4", "e2m1·g32·scale(e8m0)"),
        ("mxfp6", "e2m3·g32·scale(e8m0)"),
        ("mxfp8", "e4m3·g32·scale(e8m0)"),
        ("nvfp4", "e2m1·g16·scale(e4m3·tensor·scale(dense f32))"),
        ("ue4m3:o16", "ue4m3·o16"),
        ("ue8m0", "e8m0"),
        ("e4m3b11·t16x16", "e4m3b11·t16x16"),
    ],
)
def test_formats_print_as_reports_show_them(short: str, printed: str) -> None:
    assert str(parse_term(short)) == printed
    assert parse_term(printed) == parse_term(short)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mxfp4", 4 + 8 / 32),
        ("mxfp6", 6 + 8 / 32),
        ("nvfp4", 4 + 8 / 16 + 32 / 9 / 576),
        ("e8m0", 8),
    ],
)
def test_stored_bits_per_weight(name: str, bits: float) -> None:
    assert parse_term(name).bits((9, 576)) / (9 * 576) == pytest.approx(bits)


def test_scales_of_mx_are_powers_of_two_and_cut_off_only_where_that_is_better() -> None:
    format = floating("mxfp4")
    values = torch.randn(64, 32)
    scale = floating("e8m0").term((64, 1), {"codes": format.nearest(values).stored["scale.codes"]})
    power, best = scale.dense(), torch.full((64,), float("inf"))
    assert torch.equal(power.log2(), power.log2().round())
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        rounded = floating("e2m1").nearest(values / (power * factor)).dense() * power * factor
        best = torch.minimum(best, (rounded - values).square().sum(1))
    error = (format.nearest(values).dense() - values).square().sum(1)
    assert float((error / best).median()) == 1.0
    assert float(error.sum() / best.sum()) < 1.02


def test_small_weights_survive_a_float16_scale() -> None:
    values = torch.randn(4, 64) * 1e-5
    error = (parse_term("e5m2·row").nearest(values).dense() - values).norm() / values.norm()
    assert error < 0.07  # half a step of two bits of mantissa is 1/8 at most, 0.05 on average


def test_a_tile_of_zeros_leaves_the_scales_of_others_alone() -> None:
    values = torch.randn(4, 64) * 1e-3
    alone = parse_term("nvfp4").nearest(values).dense()
    beside = parse_term("nvfp4").nearest(torch.cat([values, torch.zeros(2, 64)])).dense()
    assert torch.equal(beside[:4], alone)
    assert not beside[4:].any()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "e4m3·tensor"])
def test_rows_are_taken_apart_with_their_scales(name: str) -> None:
    term = parse_term(name).nearest(torch.randn(5, 70))
    taken = term.rows(torch.tensor([3, 0, 3]))
    assert taken is not None
    assert torch.equal(taken.dense(), term.dense()[[3, 0, 3]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("e5m4", "2 to 8 bits"),
        ("e0m3·row", "at least one bit of exponent"),
        ("e8m0b120", "does not fit float32"),
        ("e4m3·row·zero", "'zero' is unknown here"),
        ("e4m3·scale(e9m9)", "2 to 8 bits"),
    ],
)
def test_impossible_layouts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_term(text)


def test_a_float_without_a_scale_has_no_tiles() -> None:
    with pytest.raises(ValueError, match="no tiles"):
        FloatingFormat(4, 3, group=32, scaling="none")
