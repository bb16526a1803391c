"""Float products equal what torch computes from the decoded weights."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from qc.backends.tvm.linear.float_dot import float_dot
from qc.ir.target import CPUS, Target, host_cpu
from qc.ir.weights.dense import DenseFormat
from qc.ir.weights.grouped import GroupedFormat
from tests.backends.tvm.linear.cases import Case, worst_error
from tests.needs import needs

ROWS = (1, 2, 3, 7, 13, 33)


def cases() -> list[Case]:
    """Dense dtypes with odd sizes; every width of codes; epilogues take turns."""
    epilogue = cycle(("bias", "residual", "gated", ""))
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    sizes = ((33, 31), (127, 129), (16, 7))
    found = [
        Case(outer, inner, (DenseFormat(dtype),), None, next(epilogue))
        for dtype, (outer, inner) in zip(dtypes, sizes, strict=True)
    ]
    found += [
        Case(40, 96, (GroupedFormat(bits, group, offset),), None, next(epilogue))
        for bits, group, offset in (
            (4, 32, "minimum"), (4, 64, "symmetric"), (3, None, "zero"), (2, 32, "zero"),
            (8, 96, "symmetric"), (5, 32, "minimum"),
        )
    ]  # fmt: skip
    return found


@pytest.mark.parametrize(
    "target",
    [CPUS["x86_64-v2"], host_cpu(), pytest.param(CPUS["avx512-vnni"], marks=needs("avx512"))],
    ids=["sse", "host", "avx512"],
)
def test_products_are_exact_up_to_rounding(target: Target) -> None:
    errors = worst_error(float_dot, cases(), target, ROWS)
    assert max(errors.values()) < 1e-5, max(errors, key=lambda case: errors[case])
