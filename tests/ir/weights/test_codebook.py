"""Vector codebooks: what the codes mean, what the fit reaches."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qc.ir.weights.codebook import (
    CodebookFormat,
    choose_codes,
    codebook_term,
    k_means,
    nearest_entry,
    sum_of_entries,
    sweep,
)
from qc.ir.weights.notation import parse_term


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(text: str, values: Tensor) -> float:
    dense = parse_term(text).nearest(values).dense()
    return float((values - dense).square().sum() / values.square().sum())


@pytest.mark.parametrize("bits", [3, 8, 9, 16])
def test_a_weight_is_the_sum_of_its_entries(bits: int) -> None:
    layout = CodebookFormat(2, bits, 4)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (3, 9, 2), generator=generator)  # 33 columns, a tail of 1
    books, scale = gaussian(2, 1 << bits, 4).half(), gaussian(3, seed=1).half()
    dense = codebook_term(layout, (3, 33), codes, books, scale).dense()
    for row in range(3):
        for col in range(33):
            first, second = codes[row, col // 4].tolist()
            added = float(books[0, first, col % 4]) + float(books[1, second, col % 4])
            assert float(dense[row, col]) == pytest.approx(added * float(scale[row]), rel=1e-5)


def test_the_codes_of_a_vector_lie_side_by_side() -> None:
    codes = torch.tensor([[[1, 2], [3, 4], [5, 6]]])
    term = codebook_term(
        CodebookFormat(2, 8, 2), (1, 5), codes, torch.zeros(2, 256, 2), torch.ones(1)
    )
    assert term.arrays()["codes"].tolist() == [[1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize(
    ("text", "bits"),
    [  # codes, codebooks and scales of 1536 x 576
        ("codebook2x8·d8", 2 + 2 * 256 * 8 * 16 / (1536 * 576) + 16 / 576),
        ("codebook1x12·d8", 1.5 + 4096 * 8 * 16 / (1536 * 576) + 16 / 576),
        ("codebook1x6·d2", 3 + 64 * 2 * 16 / (1536 * 576) + 16 / 576),
    ],
)
def test_stored_bits_per_weight(text: str, bits: float) -> None:
    assert parse_term(text).bits((1536, 576)) / (1536 * 576) == pytest.approx(bits)


def test_the_nearest_entry_is_the_nearest_by_importance() -> None:
    vectors, importance, book = gaussian(50, 3), gaussian(50, 3, seed=1).square(), gaussian(9, 3)
    distances = (importance.unsqueeze(1) * (vectors.unsqueeze(1) - book).square()).sum(-1)
    chosen = nearest_entry(vectors, importance, book)
    torch.testing.assert_close(
        distances.gather(1, chosen.unsqueeze(1)).squeeze(1), distances.amin(1)
    )
    unweighted = nearest_entry(vectors, torch.ones_like(importance), book)
    assert not torch.equal(chosen, unweighted)


def test_the_error_of_a_sweep_never_rises() -> None:
    vectors, importance = gaussian(2000, 4), gaussian(2000, 4, seed=1).square()
    books = torch.stack([gaussian(16, 4, seed=2), 0.5 * gaussian(16, 4, seed=3)])
    codes = choose_codes(vectors, importance, books)
    errors = []
    for _ in range(6):
        left = vectors - sum_of_entries(books, codes)
        errors.append(float((importance * left.square()).sum()))
        sweep(vectors, importance, books, codes)
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


def test_clusters_are_found() -> None:
    centers = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)) * 10
    vectors = centers.repeat(20, 1) + 0.1 * gaussian(320, 2)
    book = k_means(vectors, torch.ones_like(vectors), 16)
    distances = torch.cdist(centers, book)
    assert float(distances.amin(1).max()) < 0.2
    assert len(distances.argmin(1).unique()) == 16


def test_few_vectors_are_their_own_codebook() -> None:
    values = gaussian(4, 64)
    assert relative_error("codebook1x5·d8", values) < 1e-6  # 32 vectors, 32 entries
    assert relative_error("codebook1x8·d8", values) < 1e-6


def test_longer_vectors_and_more_codebooks_err_less() -> None:
    values = gaussian(128, 256)
    scalar, pairs = (
        relative_error("codebook1x2·d1", values),
        relative_error("codebook1x4·d2", values),
    )
    assert pairs < scalar  # both 2 bits: what vectors gain
    assert scalar == pytest.approx(0.1175, rel=0.03)  # Lloyd-Max of a Gaussian
    assert pairs == pytest.approx(0.1086, rel=0.05)  # k-means of Gaussian pairs, Q-Palette
    by_books = [relative_error(f"codebook{n}x4·d4", values) for n in (3, 2, 1)]
    assert by_books == sorted(by_books)
    assert by_books[0] < 0.5 * by_books[1] < 0.25 * by_books[2] * 1.2


def test_two_fitted_codebooks_beat_residual_k_means() -> None:
    values = gaussian(64, 256)
    vectors = values.reshape(-1, 8)
    ones = torch.ones_like(vectors)
    left = vectors
    for _ in range(2):
        book = k_means(left, ones, 64)
        left = left - book[nearest_entry(left, ones, book)]
    residual = float(left.square().sum() / vectors.square().sum())
    assert relative_error("codebook2x6·d8", values) < 0.99 * residual


def test_the_scale_of_a_row_takes_its_size() -> None:
    values = gaussian(64, 128)
    larger = values * torch.logspace(-3, 3, 64).unsqueeze(1)
    dense = parse_term("codebook1x8·d4").nearest(larger).dense()
    by_row = (larger - dense).square().sum(1) / larger.square().sum(1)
    assert float(by_row.max()) < 0.6


def test_rows_of_zeros_and_short_tails_do_not_pull() -> None:
    values = gaussian(32, 33)
    values[3] = 0
    term = parse_term("codebook1x6·d8").nearest(values)
    assert not term.dense()[3].any()
    without = torch.cat([values[:3], values[4:]])
    assert relative_error("codebook1x6·d8", values) < 1.1 * relative_error(
        "codebook1x6·d8", without
    )
    tail = (values - term.dense())[:, 32:].square().mean() / values[:, 32:].square().mean()
    assert float(tail) < 0.2  # one weight with 6 bits, in entries made for eight


def test_a_row_is_taken_with_its_scale() -> None:
    term = parse_term("codebook2x4·d4").nearest(gaussian(6, 33))
    index = torch.tensor([4, 1])
    taken = term.rows(index)
    assert taken is not None
    assert torch.equal(taken.dense(), term.dense()[index])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("codebook1x17·d8", "1 to 16 bits, not 17"),
        ("codebook9x8·d8", "1 to 8 codebooks"),
        ("codebook1x8·d0", "at least one weight"),
        ("codebook1x8·g8", "'g8' is unknown here"),
        ("codebook1x8·d8·d4", "one size"),
    ],
)
def test_impossible_codebooks_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_term(text)


def test_the_size_of_a_vector_is_eight_by_default() -> None:
    assert str(parse_term("codebook2x8")) == "codebook2x8·d8"
