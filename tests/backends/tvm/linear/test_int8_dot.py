"""Integer products equal what torch computes from the dequantized sides."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear import int8_dot
from qc.backends.tvm.linear.rule import linear_rule
from qc.backends.tvm.linear.vectors import pure
from qc.ir.ops import Parameter
from qc.ir.target import CPUS, Target, host_cpu
from qc.ir.types import ActivationFormat
from qc.ir.weights.grouped import GroupedFormat, Offset
from tests.backends.tvm.linear.cases import Case, build, compile_cases, worst_error
from tests.needs import needs

VNNI = CPUS["avx512-vnni"]
OFFSETS: tuple[Offset, ...] = ("symmetric", "zero", "minimum")
ROWS = (1, 2, 3, 5, 8, 33)
G32, PER_TOKEN = ActivationFormat(8, 32), ActivationFormat(8)


def cases() -> list[Case]:
    """Every width and offset of codes, groups of both sides, odd numbers of outputs, epilogues."""
    epilogue = cycle(("", "bias", "residual", "", "gated"))
    outer = cycle((16, 1, 33, 127))
    formats = [GroupedFormat(4, 32, offset) for offset in OFFSETS]
    formats += [GroupedFormat(8, 32), GroupedFormat(3, 32, "zero"), GroupedFormat(2, 32, "minimum")]
    found = [Case(next(outer), 96, (format,), G32, next(epilogue)) for format in formats]
    pairs = [(128, G32), (64, ActivationFormat(8, 128)), (None, PER_TOKEN), (32, PER_TOKEN)]
    found += [Case(48, 320, (GroupedFormat(4, group, "minimum"),), a) for group, a in pairs]
    found += [Case(300, 576, (GroupedFormat(bits, 128, "zero"),), G32) for bits in (5, 6, 7)]
    coded = GroupedFormat(6, None, "none")  # scales and minima as codes times a factor of the row
    found.append(Case(33, 96, (GroupedFormat(3, 32, "minimum", 1, coded, coded),), G32))
    found.append(Case(48, 192, (GroupedFormat(2, 64, "minimum", 1, None, coded),), G32))
    found.append(Case(16, 96, (GroupedFormat(4, 32, "symmetric", 1, coded),), G32, "bias"))
    found.append(Case(31, 160, (GroupedFormat(4, 32, "zero", 1, coded),), PER_TOKEN))
    return found


def assert_sums(chosen: list[Case], target: Target) -> None:
    errors = worst_error(linear_rule, chosen, target, ROWS)
    assert max(errors.values()) < 1e-5, max(errors, key=lambda case: errors[case])


def test_sums_are_exact_up_to_rounding() -> None:
    assert_sums(cases()[::2], host_cpu())


@pytest.mark.parametrize(
    "target",
    [CPUS["x86_64-v2"], pytest.param(VNNI, marks=needs("avx512"))],
    ids=["ssse3", "vnni"],
)
def test_sums_of_other_machines_are_exact_up_to_rounding(target: Target) -> None:
    if target == host_cpu():
        pytest.skip("this machine is the one")
    assert_sums(cases()[::5], target)


@pytest.mark.slow
def test_all_sums_are_exact_up_to_rounding() -> None:
    assert_sums(cases(), host_cpu())


def dot_of_bytes(result: str, intrinsic: str, *operands: Any) -> Any:
    """Compute vpdpbusd in int32: total + sum of 4 products of an unsigned and a signed byte."""
    if intrinsic != int8_dot.VNNI:
        return pure(result, intrinsic, *operands)
    total, unsigned, signed = operands
    codes, inputs = T.reinterpret(result, unsigned), T.reinterpret(result, signed)
    lanes = int(result.rpartition("x")[2])

    def constant(value: int) -> Any:
        return T.broadcast(T.int32(value), lanes)

    for byte in range(4):
        code = T.bitwise_and(T.shift_right(codes, constant(8 * byte)), constant(255))
        value = T.shift_right(T.shift_left(inputs, constant(24 - 8 * byte)), constant(24))
        total = total + code * value
    return total


def test_vnni_kernels_are_right_but_for_the_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any machine can run 64-byte vectors, split by LLVM, with the dot product written out."""
    monkeypatch.setattr(int8_dot, "pure", dot_of_bytes)
    wide = replace(VNNI, llvm_cpu=host_cpu().llvm_cpu)
    errors = worst_error(linear_rule, cases()[::3], wide, (1, 9, 17))
    assert max(errors.values()) < 1e-5, max(errors, key=lambda case: errors[case])


@pytest.mark.fast_rules
@pytest.mark.parametrize(
    ("target", "instruction"), [(VNNI, "vpdpbusd"), (CPUS["x86_64-v3"], "vpmaddubsw")]
)
def test_the_kernel_uses_byte_products(target: Target, instruction: str) -> None:
    case = Case(48, 64, (GroupedFormat(4, 32, "minimum"),), G32)
    assembly = build(compile_cases(linear_rule, [case], target), target).mod.inspect_source("asm")
    assert instruction in assembly


@pytest.mark.fast_rules
def test_stored_bits_stay_the_same() -> None:
    for bits in range(2, 9):
        for offset in OFFSETS:
            case = Case(32, 160, (GroupedFormat(bits, 64, offset),), G32)
            (kernel,) = compile_cases(linear_rule, [case], host_cpu())
            assert kernel.rule == "linear_int8_dot"
            op = case.node.inputs[1].op
            assert isinstance(op, Parameter)
            weight = op.weight
            stream = kernel.repack[1, "0.stream"](weight)
            assert 8 * stream.numel() == weight.bits
