"""Tables of values: k-means, the normal grid, where tables lie."""

import pytest
import torch

from qc.ir.weights.lookup import LookupFormat, fit_tables, normal_quantiles
from qc.ir.weights.notation import parse_term
from qc.ir.weights.packing import unpack_codes

# QLoRA (Dettmers et al. 2023), appendix E
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip

# Max (1960), table I: the least mean squared error of 2^bits values for a normal distribution
LEAST = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def test_the_normal_grid_is_the_published_one() -> None:
    torch.testing.assert_close(normal_quantiles(4), torch.tensor(NF4), rtol=0, atol=2e-7)
    stored = parse_term("nf4·g64").nearest(torch.randn(2, 64)).stored["table"]
    assert torch.equal(stored, torch.tensor(NF4).half().view(1, 1, 16))


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_grids_rise_from_minus_one_through_zero_to_one(bits: int) -> None:
    grid = normal_quantiles(bits)
    assert grid.shape == (1 << bits,)
    assert bool((grid.diff() > 0).all())
    assert grid[[0, (1 << (bits - 1)) - 1, -1]].tolist() == [-1, 0, 1]


@pytest.mark.parametrize("bits", LEAST)
def test_k_means_finds_the_best_grid_of_a_normal_distribution(bits: int) -> None:
    values = torch.special.ndtri((torch.arange(40_000).double() + 0.5) / 40_000).float()
    dense = LookupFormat(bits, None, None).nearest(values.view(200, 200)).dense()
    error = float((dense.flatten() - values).square().mean() / values.square().mean())
    assert error == pytest.approx(LEAST[bits], rel=0.01)


def test_codes_point_to_the_nearest_value_of_the_table() -> None:
    values = torch.randn(9, 65)
    term = parse_term("lookup3·t4x16").nearest(values)
    table = term.stored["table"].float()
    assert table.shape == (3, 5, 8)
    assert bool((table.diff() >= 0).all())
    codes = unpack_codes(term.stored["codes"], 3, 65)
    for row in range(9):
        for col in range(65):
            own = table[row // 4, col // 16]
            least = float((own - values[row, col]).abs().min())
            assert abs(float(own[int(codes[row, col])] - values[row, col])) == least


def test_few_distinct_values_are_kept_exactly() -> None:
    values = torch.zeros(4, 1000)
    values[:, ::50], values[:, 1::50] = 1.0, -1.0  # rare, so that no even quantile meets them
    assert torch.equal(parse_term("lookup2·row").nearest(values).dense(), values)
    few = torch.tensor([[1.0, -2.0, 0.5, 3.0, 7.0]])
    assert torch.equal(parse_term("lookup4·row").nearest(few).dense(), few)


def test_weights_move_tables_to_where_errors_count() -> None:
    values = torch.linspace(-1, 1, 101).unsqueeze(0)
    weights = torch.where(values > 0, 100.0, 1.0)
    plain, weighted = (fit_tables(values, w, 2) for w in (torch.ones_like(values), weights))
    torch.testing.assert_close(plain, torch.tensor([[-0.75, -0.25, 0.25, 0.75]]), rtol=0, atol=0.02)

    def loss(table: torch.Tensor) -> float:
        error = (values.unsqueeze(2) - table.unsqueeze(1)).square().amin(2)
        return float((weights * error).sum())

    assert int((weighted > 0).sum()) == 3
    assert loss(weighted) < 0.6 * loss(plain)


def test_what_fills_the_last_tile_up_is_no_weight() -> None:
    values = 5 + torch.rand(1, 20)
    dense = parse_term("lookup1·g16").nearest(values).dense()
    alone = parse_term("lookup1·row").nearest(values[:, 16:]).dense()
    assert torch.equal(dense[:, 16:], alone)
    assert float(dense.min()) >= 5


def test_scales_beside_a_table_are_the_extremes_of_their_tiles() -> None:
    values = torch.randn(6, 70) * torch.logspace(-3, 1, 6).unsqueeze(1)
    term = parse_term("lookup4·tensor·by(g64)").nearest(values)
    largest = torch.stack([values[:, :64].abs().amax(1), values[:, 64:].abs().amax(1)], 1)
    assert torch.equal(term.stored["scale"], largest.half())
    assert float(term.stored["table"].abs().max()) <= 1.001
    rows = (term.dense() - values).norm(dim=1) / values.norm(dim=1)
    assert float(rows.max()) < 0.3  # every row, though the last is 10^4 times the first


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("lookup4·row", 4 + 16 * 16 / 576),
        ("lookup3·tensor", 3 + 8 * 16 / (64 * 576)),
        ("nf4·g64", 4 + 16 / 64 + 16 * 16 / (64 * 576)),
    ],
)
def test_stored_bits_count_the_tables(name: str, bits: float) -> None:
    assert parse_term(name).bits((64, 576)) / (64 * 576) == pytest.approx(bits)


@pytest.mark.parametrize(
    "text", ["lookup4·tensor·by(g64)·scale(e4m3·tensor)", "nf3·o16", "lookup2·t64xall"]
)
def test_formats_print_as_reports_show_them(text: str) -> None:
    assert str(parse_term(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lookup9·row", "1 to 8 bits, not 9"),
        ("nf1·g64", "2 to 8 bits"),
        ("lookup4·row·by(g0)", "at least one weight"),
        ("lookup4·row·by(rank8)", r"by\(rank8\) names no tile"),
        ("lookup4·row·scale(uint8·row)", "without the tile of the scales"),
        ("lookup4·row·zero", "'zero' is unknown here"),
    ],
)
def test_impossible_layouts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_term(text)
