"""Attention, cache appends and rotations against their torch meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qc.backends.tvm.append import append_rules
from qc.backends.tvm.attention import attention_rules
from qc.ir.node import Node, make
from qc.ir.ops import Append, Attention, Input, Rope
from qc.ir.target import CPUS
from qc.ir.types import Dim, bind_dim, symbol
from tests.backends.tvm.kernels import Case, check, compiled, fused, kernel_of, value

BATCH, SEQ, PAST = symbol("batch"), symbol("seq"), symbol("past")
SIZES = (
    {"batch": 1, "seq": 1, "past": 1},
    {"batch": 2, "seq": 3, "past": 70},
    {"batch": 1, "seq": 1, "past": 333},
    {"batch": 2, "seq": 37, "past": 5},
    {"batch": 1, "seq": 130, "past": 64},
    {"batch": 1, "seq": 8, "past": 129},
)
F16, F32 = torch.float16, torch.float32


def attention(
    heads: tuple[int, int],
    dims: tuple[int, int],
    cache: torch.dtype | None = None,
    rotary: int | None = None,
    mask: torch.dtype | None = None,
    seq: Dim = SEQ,
    **attributes: Any,
) -> Node:
    """Fuse attention of `heads` = (query, key) heads, over plain values or caches."""
    q = value("q", BATCH, seq, heads[0], dims[0])
    k, v = (value(n, BATCH, seq, heads[1], d) for n, d in zip("kv", dims, strict=True))
    stop: tuple[Node, ...] = ()
    if cache is not None:
        pasts = (value(f"past_{n}", BATCH, PAST, heads[1], d, dtype=cache)
                 for n, d in zip("kv", dims, strict=True))  # fmt: skip
        k, v = stop = tuple(make(Append(), p, new) for p, new in zip(pasts, (k, v), strict=True))
    if rotary is not None:
        q = make(Rope(), q, value("cos", 1, seq, rotary), value("sin", 1, seq, rotary))
    masks = [] if mask is None else [value("mask", BATCH, 1, seq, k.tensor.shape[1], dtype=mask)]
    op = Attention(dims[0] ** -0.5, **attributes)
    return fused(make(op, q, k, v, *masks), stop)


def cases_of(node: Node, tolerance: float) -> list[Case]:
    """Draw operands for all sizes."""
    torch.manual_seed(0)
    cases = []
    for chosen in SIZES:
        fixed = isinstance(node.inputs[0].tensor.shape[1], int)
        sizes = {**chosen, "seq": 1} if fixed else chosen
        values = []
        for operand in node.inputs:
            shape = [bind_dim(d, dict(sizes)) for d in operand.tensor.shape]
            drawn = torch.randn(shape)
            if operand.tensor.dtype == torch.bool:
                # A query that sees nothing has no attention.
                values.append((drawn > -0.5) | (torch.arange(shape[-1]) == 0))
            else:
                values.append(drawn.to(operand.tensor.dtype))
        cases.append(Case(node, sizes, tuple(values), tolerance))
    return cases


ATTENTIONS = {
    "grouped heads over an f32 cache": attention((9, 3), (64, 64), F32, 64, causal=True),
    "an f16 cache": attention((9, 3), (64, 64), F16, 64, causal=True),
    "softcap": attention((4, 2), (20, 20), causal=True, softcap=5.0),
    "a window": attention((4, 4), (36, 12), F32, causal=True, window=9),
    "one key head, not causal": attention((6, 1), (6, 6), rotary=4),
    "an additive mask": attention((4, 2), (16, 16), F32, mask=F32, causal=True),
    "a bool mask": attention((2, 2), (16, 16), mask=torch.bool),
    "one query": attention((3, 1), (64, 64), F32, seq=1, causal=True),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str) -> None:
    # Half precision keeps 11 bits of keys and values; torch attends in float32 as this does.
    check(cases_of(ATTENTIONS[name], 2e-5), attention_rules)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("rotary", [None, 6, 36])
def test_append(dtype: torch.dtype, rotary: int | None) -> None:
    new = value("new", BATCH, SEQ, 3, 36)
    if rotary is not None:
        new = make(Rope(), new, value("cos", BATCH, SEQ, rotary), value("sin", BATCH, SEQ, rotary))
    node = fused(make(Append(), value("past", BATCH, PAST, 3, 36, dtype=dtype), new))
    kernels = check(cases_of(node, 1e-3 if dtype == F16 else 2e-6), append_rules)
    past = [n.op.label for n in node.inputs if isinstance(n.op, Input)].index("past")
    assert [k.in_place for k in kernels] == [past]


def test_rope() -> None:
    tables = value("cos", 1, SEQ, 64), value("sin", 1, SEQ, 64)
    check(cases_of(fused(make(Rope(), value("x", BATCH, SEQ, 9, 64), *tables)), 2e-6), append_rules)


@pytest.mark.parametrize("architecture", ["x86_64-v2", "avx512-vnni"])
def test_other_machines_compile(architecture: str) -> None:
    target = CPUS[architecture]
    compiled([kernel_of(ATTENTIONS["an f16 cache"], attention_rules, target)], target)
