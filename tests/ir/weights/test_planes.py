"""Bit planes: what the digits mean, what the fit reaches."""

import pytest
import torch
from torch import Tensor

from qc.ir.weights.notation import parse_term
from qc.ir.weights.planes import PlanesFormat, combinations, fit, nearest_level, planes_term


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planes(text: str) -> PlanesFormat:
    found = parse_term(text)
    assert isinstance(found, PlanesFormat)
    return found


def relative_error(text: str, values: Tensor) -> float:
    return float(
        (values - planes(text).nearest(values).dense()).square().sum() / values.norm() ** 2
    )


@pytest.mark.parametrize("alphabet", ["bits", "signs", "trits"])
@pytest.mark.parametrize("offset", ["stored", "none"])
def test_planes_mean_what_the_page_says(alphabet: str, offset: str) -> None:
    layout = PlanesFormat(2, alphabet, 16, offset, 2)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    most = 3 if alphabet == "trits" else 2
    digits = torch.randint(0, most, (2, 3, 33), generator=generator).to(torch.uint8)
    coefficients = gaussian(2, 3, 3 if offset == "stored" else 2).half()
    dense = planes_term(layout, digits, coefficients).dense()
    meaning = {"bits": (0, 1), "signs": (-1, 1), "trits": (-1, 0, 1)}[alphabet]
    for row in range(3):
        for col in range(33):
            at = coefficients[row // 2, col // 16].tolist()
            expected = sum(c * meaning[int(digits[p, row, col])] for p, c in enumerate(at[:2]))
            expected += at[2] if offset == "stored" else 0
            assert float(dense[row, col]) == pytest.approx(expected, abs=1e-6)


def test_signs_are_bit_planes_of_twice_the_coefficients() -> None:
    """alpha (2b - 1) summed + offset = 2 alpha b summed + (offset - sum alpha), exactly: all
    numbers are multiples of 1/64 that float16 holds."""
    generator = torch.Generator().manual_seed(2)
    digits = torch.randint(0, 2, (3, 5, 40), generator=generator).to(torch.uint8)
    alpha = torch.randint(1, 64, (5, 3, 3), generator=generator) / 64
    offset = torch.randint(-64, 64, (5, 3, 1), generator=generator) / 64
    signs = planes_term(planes("signs3·g16·offset"), digits, torch.cat([alpha, offset], -1))
    shifted = offset - alpha.sum(-1, keepdim=True)
    bits = planes_term(planes("planes3·g16"), digits, torch.cat([2 * alpha, shifted], -1))
    assert torch.equal(signs.dense(), bits.dense())


def test_one_bit_of_a_row_is_one_bit_of_a_plane() -> None:
    digits = torch.zeros(2, 1, 20, dtype=torch.uint8)
    digits[1, 0, 11] = 1
    term = planes_term(planes("planes2·row·nooffset"), digits, torch.ones(1, 1, 2))
    assert term.arrays()["planes"].tolist() == [[[0, 0, 0]], [[0, 1 << 3, 0]]]


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("planes2·g64", 2 + 3 * 16 / 64),  # ELUTQ: b + 16 (b + 1) / g
        ("planes3·g192", 3 + 4 * 16 / 192),
        ("planes2·row·nooffset", 2 + 2 * 16 / 576),
        ("signs1·row", 1 + 16 / 576),
        ("trits2·g64", 2 * (116 * 8 / 576 + 16 / 64)),  # 116 bytes hold 576 trits
        ("trits2·g64·2bit", 4 + 2 * 16 / 64),
    ],
)
def test_stored_bits_per_weight(text: str, bits: float) -> None:
    assert planes(text).bits((64, 576)) / (64 * 576) == pytest.approx(bits)


def test_the_error_of_the_fit_never_rises() -> None:
    tiles = gaussian(50, 32)
    weights = gaussian(50, 32, seed=1).square()  # an importance
    for text in ("planes3·g32", "signs2·g32", "trits2·g32", "trits2·g32·offset"):
        layout = planes(text)
        found = layout.even(tiles, weights)
        before = torch.full((50,), float("inf"))
        first = None
        for _ in range(12):
            levels = found @ layout.design().T
            nearest = levels.gather(1, nearest_level(tiles, levels))
            error = (weights * (tiles - nearest).square()).sum(1)
            assert bool((error <= before * (1 + 1e-5)).all()), text
            first, before = (error if first is None else first), error
            found = fit(tiles, weights, layout.design(), found, rounds=1)
        assert float(before.sum()) < 0.9 * float(first.sum()), text


def test_the_nearest_level_is_the_nearest() -> None:
    levels, tiles = gaussian(20, 9), gaussian(20, 33, seed=1)
    by_hand = (tiles.unsqueeze(-1) - levels.unsqueeze(1)).abs()
    chosen = nearest_level(tiles, levels).unsqueeze(-1)
    assert torch.equal(by_hand.gather(-1, chosen).squeeze(-1), by_hand.amin(-1))


def test_weights_of_no_importance_do_not_pull() -> None:
    tiles = torch.tensor([[0.0, 1.0, 2.0, 3.0, 900.0]])
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])
    layout = planes("planes2·g5")
    found = fit(tiles, weights, layout.design(), layout.even(tiles, weights))
    assert (found @ layout.design().T).sort()[0][0].tolist() == pytest.approx(
        [0, 1, 2, 3], abs=1e-5
    )


def test_two_trit_planes_with_ratio_3_are_recovered() -> None:
    trits = combinations("trits", 2)[torch.arange(0, 9 * 64, 1).remainder(9)]  # all nine levels
    scale = torch.tensor([0.5, 1.0, 0.03125]).unsqueeze(1)
    values = scale * (3 * trits[:, 0] + trits[:, 1])
    assert torch.equal(planes("trits2·row").nearest(values).dense(), values)


def test_more_planes_and_smaller_groups_err_less() -> None:
    values = gaussian(64, 256)
    by_planes = [relative_error(f"trits{n}·g64", values) for n in (3, 2, 1)]
    assert by_planes == sorted(by_planes)
    by_group = [relative_error(f"trits2·g{n}", values) for n in (32, 64, 128)]
    assert by_group == sorted(by_group)
    assert by_planes[2] == pytest.approx(0.19, abs=0.02)  # the best ternary of a Gaussian: 0.19
    assert 0.15 < by_planes[1] ** 0.5 < 0.19  # PTQTP reports 0.178 to 0.19
    absmean = 1 - 2 / torch.pi  # one sign and the mean magnitude
    assert relative_error("signs1·row", values) == pytest.approx(absmean, abs=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fitted_planes_beat_the_even_grid(bits: int) -> None:
    values = gaussian(32, 256)
    even = parse_term(f"int{bits}·g64·min").nearest(values).dense()
    of_grid = float((values - even).square().sum() / values.square().sum())
    assert relative_error(f"planes{bits}·g64", values) < 0.9 * of_grid


def test_a_tile_of_equal_weights_is_stored_exactly() -> None:
    values = torch.full((2, 40), 0.25)
    for text in ("planes2·g16", "signs2·g16", "signs1·t2x16·offset", "trits2·row"):
        dense = planes(text).nearest(values).dense()
        torch.testing.assert_close(dense, values, rtol=1e-3, atol=0)
        assert not planes(text).nearest(torch.zeros(2, 40)).dense().any()


def test_rows_share_tiles_or_are_taken_apart() -> None:
    values = gaussian(6, 33)
    index = torch.tensor([4, 1])
    taken = planes("trits2·g16·offset").nearest(values).rows(index)
    assert taken is not None
    assert torch.equal(taken.dense(), planes("trits2·g16·offset").nearest(values).dense()[index])
    assert planes("planes2·t2x16").nearest(values).rows(index) is None


@pytest.mark.parametrize("text", ["trits1·g16", "trits1·g16·2bit"])
def test_bytes_that_no_trits_give_are_refused(text: str) -> None:
    term = planes(text).nearest(gaussian(2, 16))
    stored = term.arrays()
    stored["planes"] = torch.full_like(stored["planes"], 79)  # 0b01001111: fields of 3
    with pytest.raises(ValueError, match="holds a code that no trit has"):
        term.format.term(term.shape, stored)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("planes9", "at most 256 levels"),
        ("signs0", "1 plane at least"),
        ("trits6", "at most 256 levels"),
        ("planes2·offset", "'offset' is unknown here"),
        ("signs2·g32·2bit", "only trits"),
    ],
)
def test_impossible_planes_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_term(text)
