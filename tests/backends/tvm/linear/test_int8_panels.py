"""Integer products of many rows, rows as lanes, equal what torch computes from both sides."""

from __future__ import annotations

import pytest
import torch

from qc.backends.linear_region import match_linear
from qc.backends.tvm.linear.int8_panels import PANEL_TILES, TALL
from qc.backends.tvm.linear.rule import choose_kernels, linear_rule
from qc.ir.target import CPUS
from qc.ir.types import ActivationFormat
from qc.ir.weights.grouped import GroupedFormat
from qc.ir.weights.low_rank import LowRankFormat
from tests.backends.tvm.linear.cases import Case, buffers, build, compile_cases, worst_error

HERE = CPUS["x86_64-v3"]
G32 = ActivationFormat(8, 32)
ROWS = (2, 4, 7, TALL - 1, TALL, TALL + 1, 2 * TALL, 3 * TALL - 5)


def case(inner: int, format: GroupedFormat, a: ActivationFormat = G32, epilogue: str = "") -> Case:
    """Return a linear with a block that is not full."""
    return Case(33, inner, (format,), a, epilogue)


CASES = (
    case(96, GroupedFormat(4, 32, "minimum"), epilogue="gated"),
    case(128, GroupedFormat(4, 64, "zero"), epilogue="residual"),
    case(64, GroupedFormat(3, 32, "symmetric")),
    case(96, GroupedFormat(6, 32, "zero"), ActivationFormat(8), "bias"),
    case(320, GroupedFormat(4, None, "minimum"), ActivationFormat(8)),  # one unit of ten steps
)


@pytest.mark.fast_rules
def test_only_products_of_bytes_are_made_in_tall_tiles() -> None:
    mixed = Case(32, 64, (GroupedFormat(4, 32), LowRankFormat(4)), G32)
    heights = []
    for chosen, target in ((CASES[0], HERE), (mixed, HERE), (CASES[0], CPUS["avx512-vnni"])):
        linear = match_linear(chosen.region(target))
        assert linear is not None
        heights.append(choose_kernels(linear).tile_heights())
    assert heights[0] == PANEL_TILES
    assert all(TALL not in other for other in heights[1:])


def test_sums_are_exact_up_to_rounding() -> None:
    errors = worst_error(linear_rule, CASES, HERE, ROWS)
    assert max(errors.values()) < 1e-5, max(errors, key=lambda case: errors[case])


def test_a_row_does_not_depend_on_its_place_in_a_tile() -> None:
    chosen = CASES[0]
    kernels = compile_cases(linear_rule, [chosen], HERE)
    function = build(kernels, HERE)["k0"]
    x, *weights = chosen.values(1)
    repeated = type(x)(x.codes.expand(75, -1), x.scale.expand(75, -1), x.format)
    result = torch.full((75, chosen.outer), float("nan"))
    function(*buffers(kernels[0], [repeated, *weights], result))
    assert torch.equal(result, result[:1].expand_as(result))
