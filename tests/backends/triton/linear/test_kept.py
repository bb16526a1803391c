"""The stream of kept groups: every group once, and programs that take equally many."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qc.backends.triton.linear.kept_layout import GROUPS, OUT, KeptLayout, takes
from qc.ir.weights.kept_groups import KeptGroupsFormat, kept_groups_term
from qc.ir.weights.notation import parse_term
from qc.ir.weights.weight import Term, Weight

FORMAT = parse_term("kept30%·g16(int4·row·zero)")
OUTER, INNER = 150, 320


def weight_of(chances: Tensor) -> Weight:
    """Keep a share of all groups, most in rows with the best chances."""
    assert isinstance(FORMAT, KeptGroupsFormat)
    torch.manual_seed(0)
    values = torch.randn(OUTER, INNER)
    scores = (torch.rand(OUTER, INNER // 16) + chances[:, None]).flatten()
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.topk(FORMAT.kept((OUTER, INNER))).indices] = True
    term: Term = kept_groups_term(FORMAT, values, kept.view(OUTER, -1))
    return Weight("w", (OUTER, INNER), (term,))


def layout_of(programs: int) -> KeptLayout:
    assert isinstance(FORMAT, KeptGroupsFormat)
    return KeptLayout("0", FORMAT, (OUTER, INNER), programs)


CHANCES = {
    "alike": torch.zeros(OUTER),
    "a few rows have all": torch.linspace(0, 3, OUTER),
    "the first": torch.linspace(3, 0, OUTER),
}


@pytest.mark.parametrize("chances", CHANCES.values(), ids=CHANCES.keys())
def test_every_group_is_there_once(chances: Tensor) -> None:
    weight, layout = weight_of(chances), layout_of(3)
    stored = weight.arrays()
    entry, exists = layout.entries(weight)
    assert entry.shape == (layout.most_steps, GROUPS, OUT)
    assert sorted(entry[exists].tolist()) == list(range(len(stored["0.places"])))
    steps = int(layout.firsts(weight)[-1])
    assert not exists[steps:].any()
    assert torch.equal(layout.scales(weight) != 0, exists)
    assert layout.codes(weight).shape == (layout.most_steps, GROUPS, 1, OUT)


@pytest.mark.parametrize("chances", CHANCES.values(), ids=CHANCES.keys())
def test_rows_are_those_of_their_slices(chances: Tensor) -> None:
    weight, layout = weight_of(chances), layout_of(3)
    starts = weight.arrays()["0.starts"].long()
    row_of = torch.arange(OUTER).repeat_interleave(starts.diff())
    entry, exists = layout.entries(weight)
    order, firsts = layout.order(weight).view(-1, OUT), layout.firsts(weight)
    assert sorted(order.flatten()[:OUTER].tolist()) == list(range(OUTER))
    for cell in range(layout.slices):
        here = slice(int(firsts[cell]), int(firsts[cell + 1]))
        rows = order[cell].expand_as(entry[here])[exists[here]]
        assert torch.equal(row_of[entry[here][exists[here]]].int(), rows)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.floats(0, 4))
def test_programs_take_equally_many_steps(programs: int, uneven: float) -> None:
    weight, layout = weight_of(torch.linspace(0, uneven, OUTER)), layout_of(programs)
    limits, firsts = layout.limits(weight), layout.firsts(weight)
    steps = limits.diff()
    assert (int(limits[0]), int(limits[-1])) == (0, int(firsts[-1]))
    assert int(steps.max() - steps.min()) <= 1
    pieces = [
        {p for p in range(programs) if max(limits[p], a) < min(limits[p + 1], b)}
        for a, b in pairwise(firsts)
    ]
    found = [set(range(first, first + count)) for first, count in layout.pieces(weight).tolist()]
    assert found == pieces
    numbers = [cell + program for cell, known in enumerate(pieces) for program in known]
    assert len(set(numbers)) == len(numbers)  # each piece has a place of its own
    assert max(numbers) < programs + layout.slices
    for program, begin in enumerate(layout.begins(weight).tolist()):
        if steps[program]:
            assert firsts[begin] <= limits[program] < firsts[begin + 1]


def test_marks_count_the_groups_in_front() -> None:
    weight, layout = weight_of(CHANCES["the first"]), layout_of(3)
    masks, befores = layout.masks(weight), layout.befores(weight)
    bits = (masks[..., None].int() >> torch.arange(8)) & 1
    assert torch.equal(bits.sum(2).cumsum(0)[:-1], befores[1:].int())
    dense = bits.transpose(0, 1).flatten(1)[:OUTER, : INNER // 16].bool()
    order = layout.order(weight)[:OUTER].long()
    kept = weight.terms[0].dense().view(OUTER, -1, 16).abs().amax(2) > 0
    assert torch.equal(dense, kept[order])


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("kept50%·g16(int4·row·zero)", True), ("kept5%·g128(uint4·row)", True),
        ("kept50%·g64(int4·g64)", True), ("kept50%·g8(int4·row)", False),
        ("kept50%·g48(int4·row)", False), ("kept50%·g16(int8·row)", False),
        ("kept50%·g16(int4·row·min)", False), ("kept50%·g32(int4·g16)", False),
        ("kept50%·g16(int4·row·scale(uint8·o16))", False), ("int4·g16", False),
    ],
)  # fmt: skip
def test_which_groups_are_words_of_codes(text: str, taken: bool) -> None:
    assert takes(parse_term(text)) == taken
