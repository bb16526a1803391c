"""Lookups in tables of sums equal what torch computes from the dequantized sides."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear import byte_lookup, int8_dot
from qc.backends.tvm.linear.rule import linear_rule
from qc.backends.tvm.linear.vectors import lanes_of, pure
from qc.ir.ops import Parameter
from qc.ir.quantized import quantize_activation
from qc.ir.target import CPUS, Target, host_cpu
from qc.ir.types import ActivationFormat
from qc.ir.weights.planes import PlanesFormat, planes_term
from qc.ir.weights.ternary import TernaryFormat
from qc.ir.weights.weight import TermFormat, Weight
from tests.backends.tvm.linear.cases import Case, buffers, build, compile_cases, worst_error

ROWS = (1, 2, 13)
G32, PER_TOKEN = ActivationFormat(8, 32), ActivationFormat(8)
V4 = CPUS["x86_64-v4"]

FORMATS: tuple[TermFormat, ...] = (
    PlanesFormat(1, group=32),
    PlanesFormat(2, group=128),
    PlanesFormat(3, group=64, offset="none"),
    PlanesFormat(4),
    PlanesFormat(2, tile_rows=None),
    PlanesFormat(1, "signs", 128, "none"),
    PlanesFormat(3, "signs", 32),
    PlanesFormat(2, "signs", None, "none"),
    PlanesFormat(1, "trits", 64, "none"),
    PlanesFormat(2, "trits", 128, "stored", packing="fields"),
    TernaryFormat(32),
    TernaryFormat(128, packing="fields"),
    TernaryFormat(None, None),
)


def cases() -> list[Case]:
    """Two sizes for every format; sizes, activations and epilogues take turns."""
    outer, inner = cycle((127, 1, 7, 16, 33, 48)), cycle((32, 64, 576, 64, 1536))
    activation = cycle((G32, PER_TOKEN, ActivationFormat(8, 96), G32, ActivationFormat(8, 128)))
    epilogue = cycle(("", "bias", "residual", "", "gated", "", ""))
    return [
        Case(next(outer), next(inner), (format,), next(activation), next(epilogue))
        for format in FORMATS
        for _ in range(2)
    ]


@pytest.mark.parametrize("target", [CPUS["x86_64-v2"], host_cpu()], ids=["ssse3", "host"])
def test_sums_are_exact_up_to_rounding(target: Target) -> None:
    chosen = cases() if target == host_cpu() else cases()[::5]
    errors = worst_error(linear_rule, chosen, target, ROWS)
    assert max(errors.values()) < 1e-5, max(errors, key=lambda case: errors[case])


@pytest.mark.fast_rules
def test_the_lookup_takes_every_case() -> None:
    for target in (CPUS["x86_64-v2"], host_cpu()):
        rules = {kernel.rule for kernel in compile_cases(linear_rule, cases(), target)}
        assert rules == {"linear_bit_serial"}


def in_parts(result: str, intrinsic: str, *operands: Any) -> Any:
    """Compute instructions on bytes and pairs in vectors of 16 bytes, which every machine has."""
    for table in (byte_lookup.SHUFFLES, int8_dot.MULTIPLY_BYTES, int8_dot.ADD_PAIRS):
        if intrinsic not in table.values():
            continue
        kind, _, lanes = result.rpartition("x")
        size = next(size for size, name in table.items() if name == intrinsic)
        count = size // 16
        whole = [T.Bind(operand) for operand in operands]

        def piece(value: Any, number: int) -> Any:
            each = lanes_of(value) // count  # noqa: B023
            return T.Shuffle([value], [T.int32(number * each + n) for n in range(each)])

        parts = [
            T.Bind(pure(f"{kind}x{int(lanes) // count}", table[16], *(piece(v, n) for v in whole)))
            for n in range(count)
        ]
        return T.Shuffle(parts, [T.int32(n) for n in range(int(lanes))])
    return pure(result, intrinsic, *operands)


def test_kernels_of_64_bytes_are_right_but_for_the_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any machine can run 64-byte vectors, split by LLVM, with the lookups of 16 bytes."""
    monkeypatch.setattr(byte_lookup, "pure", in_parts)
    wide = replace(V4, llvm_cpu=host_cpu().llvm_cpu)
    chosen = [cases()[number] for number in (1, 3, 13, 20)]  # small ones: LLVM takes long
    errors = worst_error(linear_rule, chosen, wide, ROWS)
    assert max(errors.values()) < 1e-5, max(errors, key=lambda case: errors[case])


@pytest.mark.fast_rules
@pytest.mark.parametrize(
    ("target", "register"), [(CPUS["x86_64-v2"], "%xmm"), (CPUS["x86_64-v3"], "%ymm"), (V4, "%zmm")]
)
def test_the_kernel_looks_up_in_registers(target: Target, register: str) -> None:
    chosen = [
        Case(48, 64, (PlanesFormat(2, group=64),), G32),
        Case(48, 64, (TernaryFormat(),), G32),
    ]
    assembly = build(compile_cases(linear_rule, chosen, target), target).mod.inspect_source("asm")
    lookups = [line for line in assembly.splitlines() if "pshufb" in line and register in line]
    assert len(lookups) >= 2 * 2 * 4


@pytest.mark.parametrize(
    "format", [PlanesFormat(3), PlanesFormat(2, "trits", None, "none")], ids=str
)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_sums_do_not_overflow(format: PlanesFormat, sign: float) -> None:
    """Every activation at the end of its range, every digit the same, and alternating ones."""
    outer, inner = 16, 256
    case = Case(outer, inner, (format,), PER_TOKEN)
    (kernel,) = compile_cases(linear_rule, [case], host_cpu())
    run = build([kernel], host_cpu())["k0"]
    for step in (0, 1):
        top = 2 if format.alphabet == "trits" else 1
        column = top * (1 - torch.arange(inner, dtype=torch.uint8) * step % 2)
        digits = column.expand(format.planes, outer, inner).contiguous()
        coefficients = torch.ones(*format.tile.grid((outer, inner)), format.planes + 1)
        weight = Weight("w0", (outer, inner), (planes_term(format, digits, coefficients),))
        values = [quantize_activation(torch.full((1, inner), sign), PER_TOKEN), weight]
        result = torch.full((1, outer), float("nan"))
        run(*buffers(kernel, values, result))
        assert torch.allclose(result.double(), case.expected(values), rtol=1e-6, atol=0)


def test_other_activations_and_groups_are_left_to_other_rules() -> None:
    for case in (
        Case(16, 64, (PlanesFormat(1, group=32),)),
        Case(16, 64, (PlanesFormat(1, group=32),), ActivationFormat(8, 16)),
        Case(16, 64, (PlanesFormat(1, group=48),), G32),
        Case(16, 40, (PlanesFormat(1),), G32),
        Case(32, 64, (TernaryFormat(32, 16),), G32),
        Case(16, 64, (TernaryFormat(32, 1, TernaryFormat()),), G32),
    ):
        (kernel,) = compile_cases(linear_rule, [case], host_cpu())
        assert kernel.rule != "linear_bit_serial"


@pytest.mark.fast_rules
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_stored_bits_stay_the_same(format: PlanesFormat | TernaryFormat) -> None:
    """But for trits, which take 2 bits, and a coefficient a row in place of one for all rows."""
    if format.tile_rows is None:
        format = replace(format, tile_rows=1)
    case = Case(32, 320, (format,), G32)
    (kernel,) = compile_cases(linear_rule, [case], host_cpu())
    op = case.node.inputs[1].op
    assert isinstance(op, Parameter)
    stream = kernel.repack[1, "0.bit_planes"](op.weight)
    stored = op.weight
    trits = isinstance(format, TernaryFormat) or format.alphabet == "trits"
    if trits and format.packing == "base3":
        packed = "0.codes" if isinstance(format, TernaryFormat) else "0.planes"
        planes = 1 if isinstance(format, TernaryFormat) else format.planes
        scales = stored.bits - 8 * stored.arrays()[packed].numel()
        assert 8 * stream.numel() == scales + 2 * planes * 32 * 320
    else:
        assert 8 * stream.numel() == stored.bits
