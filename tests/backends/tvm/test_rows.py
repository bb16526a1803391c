"""Norms, softmax and quantization over rows of any length, against their torch meaning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qc.backends.tvm.rows import row_rules
from qc.ir.hadamard import factor_for, rotate
from qc.ir.node import Node, make
from qc.ir.ops import (
    Binary,
    GatedActivation,
    Hadamard,
    LayerNorm,
    Parameter,
    Quantize,
    Reduce,
    RMSNorm,
    Scalar,
    Softmax,
    Unary,
)
from qc.ir.target import CPUS
from qc.ir.types import ActivationFormat, symbol
from qc.ir.weights.dense import dense_weight
from qc.passes.exactness import distance
from tests.backends.tvm.kernels import HERE, Case, check, compiled, fused, kernel_of, run, value
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


def rotated(x: Node, block: int) -> Node:
    return make(Hadamard(block), x, make(Parameter(dense_weight("f", factor_for(block)))))


ROTATIONS = [2, 6, 12, 20, 36, 44, 64, 86, 96, 576, 1536, 4096]


@pytest.mark.parametrize("vector_bytes", [16, 32, 64])
def test_rotations_are_exact_to_float32_rounding(vector_bytes: int) -> None:
    nodes = [fused(rotated(value("x", BATCH, size), size)) for size in ROTATIONS]
    target = replace(HERE, vector_bytes=vector_bytes)  # LLVM splits or joins them as it needs
    kernels = [kernel_of(node, row_rules, target) for node in nodes]
    module = compiled(kernels)
    for i, (node, size) in enumerate(zip(nodes, ROTATIONS, strict=True)):
        for rows in (1, 3):
            x = torch.randn(rows, size)
            found = run(module[f"k{i}"], kernels[i], Case(node, {"batch": rows}, (x,)))
            expected = rotate(x.double(), factor_for(size).double(), size)
            assert distance(expected, found.reshape(rows, size)) < 3e-7  # measured: 1.4e-7


@pytest.mark.parametrize("size", [6, 36, 64, 96, 576])
def test_rotations_with_what_is_around_them(size: int) -> None:
    x, gain, scale = value("x", BATCH, SEQ, size), value("gain", size), value("scale", size)
    norm = make(RMSNorm(1e-5), x, gain)
    turned = rotated(make(Binary("mul"), norm, scale), size)
    twice = rotated(rotated(make(Unary("tanh"), x), size), size // 2)
    roots = [
        make(Quantize(ActivationFormat(8, 32)), turned),
        make(Quantize(ActivationFormat(8)), rotated(x, size // 2)),
        make(Binary("add"), turned, make(Scalar(1.0))),
        make(RMSNorm(1e-5), make(Binary("add"), twice, x), gain),
        make(Hadamard(size), x, value("factor", *factor_for(size).shape)),
    ]
    check(cases_of(roots, SIZES), row_rules)


def test_rotations_of_half_precision() -> None:
    x = value("x", BATCH, SEQ, 48, dtype=torch.float16)
    cases = cases_of([rotated(x, 48), make(Unary("neg"), rotated(x, 16))], SIZES)
    check([Case(c.node, c.sizes, c.values, 2e-3) for c in cases], row_rules)


@pytest.mark.parametrize("architecture", ["x86_64-v2", "avx512-vnni"])
def test_other_machines_compile(architecture: str) -> None:
    target = CPUS[architecture]
    x = value("x", BATCH, SEQ, 576)
    roots = [*roots_of(129), rotated(x, 576), rotated(x, 64)]
    compiled([kernel_of(fused(root), row_rules, target) for root in roots], target)
