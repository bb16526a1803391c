"""Norms, softmax and quantization over rows of any length, against their torch meaning."""

from __future__ import annotations

import pytest
import torch

from qc.backends.tvm.rows import row_rules
from qc.ir.node import Node, make
from qc.ir.ops import (
    Binary,
    GatedActivation,
    LayerNorm,
    Quantize,
    Reduce,
    RMSNorm,
    Scalar,
    Softmax,
    Unary,
)
from qc.ir.target import CPUS
from qc.ir.types import ActivationFormat, symbol
from tests.backends.tvm.kernels import Case, check, compiled, fused, kernel_of, value
from tests.backends.tvm.test_elementwise import cases_of

BATCH, SEQ = symbol("batch"), symbol("seq")
SIZES = ({"batch": 1, "seq": 1}, {"batch": 2, "seq": 40})


def roots_of(size: int) -> list[Node]:
    """Return row-local bodies over [batch, seq, size]."""
    x, y = value("x", BATCH, SEQ, size), value("y", BATCH, SEQ, size)
    gain, bias = value("gain", size), value("bias", size)
    norm = make(RMSNorm(1e-5), x, gain)
    gate = make(GatedActivation("silu"), x, y)
    total = make(Binary("add"), x, y)
    return [
        make(Quantize(ActivationFormat(8, 32)), norm),
        make(Quantize(ActivationFormat(8)), gate),
        make(Quantize(ActivationFormat(4, 24)), x),
        make(Binary("mul"), make(LayerNorm(1e-5), total, gain, bias), make(Scalar(2.0))),
        make(RMSNorm(1e-6), make(Unary("tanh"), total), gain),
        make(Softmax(2), x),
        make(Reduce("mean", (2,)), x),
    ]


@pytest.mark.parametrize("size", [1, 7, 31, 33, 127, 129, 576])
def test_rows(size: int) -> None:
    check(cases_of(roots_of(size), SIZES), row_rules)


def test_heads_and_half_precision() -> None:
    heads = value("q", BATCH, SEQ, 3, 64)
    halves = value("h", BATCH, SEQ, 33, dtype=torch.float16)
    gain = value("g", 33, dtype=torch.float16)
    check(cases_of([make(RMSNorm(1e-6), heads, value("g", 64))], SIZES), row_rules)
    cases = cases_of([make(RMSNorm(1e-6), halves, gain)], SIZES)
    check([Case(c.node, c.sizes, c.values, 2e-3) for c in cases], row_rules)


def test_rows_of_zeros_and_of_minus_infinity() -> None:
    x = value("x", BATCH, SEQ, 40)
    zeros = fused(make(Quantize(ActivationFormat(8, 32)), x))
    masked = torch.randn(1, 1, 40).masked_fill(torch.arange(40) > 3, -torch.inf)
    sizes = {"batch": 1, "seq": 1}
    cases = [Case(zeros, sizes, (torch.zeros(1, 1, 40),)),
             Case(fused(make(Softmax(2), x)), sizes, (masked,))]  # fmt: skip
    check(cases, row_rules)


@pytest.mark.parametrize("architecture", ["x86_64-v2", "avx512-vnni"])
def test_other_machines_compile(architecture: str) -> None:
    target = CPUS[architecture]
    compiled([kernel_of(fused(root), row_rules, target) for root in roots_of(129)], target)
