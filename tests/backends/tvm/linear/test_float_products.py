"""Float products equal what torch computes from the decoded weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import pytest
import torch

from qc.backends.tvm.linear.rule import linear_rule
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
    grouped = (
        GroupedFormat(4, 32, "minimum"),
        GroupedFormat(4, 64, "symmetric"),
        GroupedFormat(3, None, "zero"),
        GroupedFormat(2, 32, "zero"),
        GroupedFormat(8, 96, "symmetric"),
        GroupedFormat(5, 32, "minimum"),
    )
    found += [Case(40, 96, (format,), None, next(epilogue)) for format in grouped]
    return found


AVX512 = CPUS["avx512-vnni"]
WIDE = replace(AVX512, llvm_cpu=host_cpu().llvm_cpu)  # 64-byte vectors, split by LLVM


@pytest.mark.parametrize(
    "target",
    [CPUS["x86_64-v2"], host_cpu(), WIDE, pytest.param(AVX512, marks=needs("avx512"))],
    ids=["sse", "host", "wide", "avx512"],
)
def test_products_are_exact_up_to_rounding(target: Target) -> None:
    chosen = cases() if target == host_cpu() else cases()[::4]
    errors = worst_error(linear_rule, chosen, target, ROWS)
    assert max(errors.values()) < 1e-5, max(errors, key=lambda case: errors[case])
