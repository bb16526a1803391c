"""Trellis codes: what a window names, that the best path is the best, what it reaches."""

from itertools import product

import pytest
import torch
from torch import Tensor

from qc.ir.weights.notation import parse_term
from qc.ir.weights.trellis import (
    MULTIPLIERS,
    TrellisFormat,
    best_path,
    gaussian_levels,
    trellis_term,
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(text: str, values: Tensor) -> float:
    dense = parse_term(text).nearest(values).dense()
    return float((values - dense).square().sum() / values.square().sum())


@pytest.mark.parametrize(
    ("layout", "cols"),
    [(TrellisFormat(2, 1, 7), 9), (TrellisFormat(3, 2, 15), 33), (TrellisFormat(4, 1, 4), 5)],
)
def test_a_window_slides_along_the_stream(layout: TrellisFormat, cols: int) -> None:
    generator = torch.Generator().manual_seed(3)
    spec = layout.arrays((2, cols))
    stored = {
        "codes": torch.randint(0, 256, spec["codes"].shape, generator=generator).to(torch.uint8),
        "table": gaussian(*spec["table"].shape).half(),
        "scale": gaussian(2, seed=1).half(),
    }
    dense = layout.term((2, cols), stored).dense()
    for row in range(2):
        stream = int.from_bytes(bytes(stored["codes"][row].tolist()), "little")
        for col in range(cols):
            start = col // layout.dim * layout.step_bits
            state = (stream >> start) % (1 << layout.window)
            hashed = state * MULTIPLIERS[col % layout.dim] % (1 << 15)
            level = stored["table"][hashed >> (15 - layout.table_bits)]
            expected = float(level) * float(stored["scale"][row])
            assert float(dense[row, col]) == pytest.approx(expected, rel=1e-6)


def test_every_level_is_named_by_as_many_states() -> None:
    for dim in (1, 2):
        layout = TrellisFormat(2 * dim, dim, 12)
        for each in layout.entries(torch.arange(1 << 12)).unbind(-1):
            counts = each.bincount(minlength=64)
            assert int(counts.min()) >= 56
            assert int(counts.max()) <= 72


def paths(layout: TrellisFormat, steps: int) -> Tensor:
    """List the states of every stream of so many steps."""
    bits = (steps - 1) * layout.step_bits + layout.window
    streams = torch.arange(1 << bits).unsqueeze(1)
    return (streams >> (torch.arange(steps) * layout.step_bits)) % (1 << layout.window)


@pytest.mark.parametrize(
    ("layout", "cols"),
    [
        (TrellisFormat(1, 1, 4), 9),
        (TrellisFormat(2, 1, 4), 5),
        (TrellisFormat(3, 1, 3), 4),  # every step names its state anew
        (TrellisFormat(3, 2, 5), 7),  # the last step gives one weight
    ],
)
def test_the_best_path_is_the_best_of_all(layout: TrellisFormat, cols: int) -> None:
    targets = gaussian(20, cols)
    levels = gaussian(1 << layout.window, layout.dim, seed=1)
    every = levels[paths(layout, layout.steps(cols))].flatten(1)[:, :cols]
    least = torch.cdist(targets, every).square().amin(1)
    found = best_path(targets, levels, layout.step_bits)
    reached = (targets - levels[found].flatten(1)[:, :cols]).square().sum(1)
    torch.testing.assert_close(reached, least, rtol=1e-4, atol=1e-4)


def test_the_best_path_beats_the_greedy_one() -> None:
    targets, levels = gaussian(16, 64), gaussian(256, 1, seed=1)
    state = (targets[:, :1] - levels.T).square().argmin(1)
    greedy = (targets[:, 0] - levels[state, 0]).square()
    for col in range(1, 64):
        following = (state >> 2).unsqueeze(1) | (torch.arange(4) << 6)
        errors = (targets[:, col : col + 1] - levels[following, 0]).square()
        state = following.gather(1, errors.argmin(1, keepdim=True)).squeeze(1)
        greedy += errors.amin(1)
    found = best_path(targets, levels, 2)
    best = (targets - levels[found, 0]).square().sum(1)
    assert bool((best < greedy).all())
    assert float(best.sum()) < 0.7 * float(greedy.sum())


@pytest.mark.parametrize("layout", [TrellisFormat(2, 1, 7), TrellisFormat(5, 2, 9)])
def test_a_stored_path_is_read_back(layout: TrellisFormat) -> None:
    targets = gaussian(4, 33)
    levels = gaussian(1 << layout.window, layout.dim, seed=1)
    states = best_path(targets, levels, layout.step_bits)
    table = gaussian_levels(layout.table_bits)
    term = trellis_term(layout, (4, 33), states, table, torch.ones(4))
    assert torch.equal(layout.states(33, term.arrays()["codes"]), states)


@pytest.mark.parametrize(
    ("text", "bytes_of_a_row"),
    [
        ("trellis2·w10", (2 * 576 + 8) // 8),  # the first window has 8 bits more than a step
        ("trellis1.5·d2·w9", (3 * 288 + 6 + 2) // 8),
        ("trellis4·w4", 4 * 576 // 8),
    ],
)
def test_stored_bytes(text: str, bytes_of_a_row: int) -> None:
    arrays = parse_term(text).arrays((7, 576))
    assert arrays["codes"].shape == (7, bytes_of_a_row)
    assert arrays["scale"].bytes == 14


def test_the_levels_of_a_gaussian() -> None:
    levels = gaussian_levels(6)
    torch.testing.assert_close(levels, -levels.flip(0), rtol=1e-5, atol=1e-6)
    by_sample = gaussian(1 << 18).sort()[0].unflatten(0, (64, -1)).mean(1)
    torch.testing.assert_close(levels, by_sample, rtol=0.02, atol=0.02)


def test_gaussian_weights_come_near_the_published_errors() -> None:
    """Q-Palette's errors of its trellis with 16 bits of state: 1.5 bits 0.1403, 2 bits 0.0710,
    3 bits 0.0189, 4 bits 0.0059. Fewer states cost some percent; scalars would be at 0.1175 (2
    bits), pairs at 0.1086."""
    values = gaussian(32, 512)
    assert relative_error("trellis2·w10", values) == pytest.approx(0.0710, rel=0.04)
    assert relative_error("trellis2·w8", values) == pytest.approx(0.0710, rel=0.16)
    assert relative_error("trellis3·w9", values) == pytest.approx(0.0189, rel=0.14)
    assert relative_error("trellis1.5·d2·w9", values) == pytest.approx(0.1403, rel=0.12)


def test_a_longer_window_errs_less() -> None:
    values = gaussian(32, 256)
    errors = [relative_error(f"trellis2·w{window}", values) for window in (10, 8, 6, 4, 2)]
    assert errors == sorted(errors)
    assert errors[0] < 0.6 * errors[-1]


def test_the_scale_of_a_row_takes_its_size() -> None:
    values = gaussian(4, 64)
    values[1] = 0
    values[2] *= 1000
    term = parse_term("trellis3·w8").nearest(values)
    assert not term.dense()[1].any()
    by_row = (values - term.dense()).square().sum(1)[[0, 2, 3]]
    assert float((by_row / values.square().sum(1)[[0, 2, 3]]).max()) < 0.06
    index = torch.tensor([3, 1])
    taken = term.rows(index)
    assert taken is not None
    assert torch.equal(taken.dense(), term.dense()[index])


def test_streams_of_few_columns() -> None:
    for cols, text in product((1, 2, 3), ("trellis1·w5", "trellis3·w10", "trellis2.5·d2·w7")):
        assert relative_error(text, gaussian(3, cols)) < 0.25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trellis2·w16", "2 .* to 15 bits, not 16"),
        ("trellis4·w3", "4 .* to 15 bits, not 3"),
        ("trellis0·w8", "1 to 8 bits, not 0"),
        ("trellis1.5·w8", "need 2 weights a step"),
        ("trellis1·d3·w8", "1 or 2 weights, not 3"),
        ("trellis2·g32", "'g32' is unknown here"),
    ],
)
def test_impossible_trellises_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_term(text)
