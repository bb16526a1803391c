"""Codes widened 32 at a time: products are right, and the way to widen is the one meant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qc.backends.tvm.linear.code_lanes import CodeLanes
from qc.backends.tvm.linear.code_products import code_products
from qc.backends.tvm.linear.code_values import CodeValues, Halves, Integers, Planes, choose_values
from qc.backends.tvm.linear.rule import linear_rule
from qc.ir.target import CPUS, Target, host_cpu
from qc.ir.weights.expression import COL, ROW
from qc.ir.weights.packing import pack_codes
from tests.backends.tvm.linear.cases import (
    Case,
    assert_exact,
    build,
    compile_cases,
    in_turns,
    term,
    worst_error,
)

FORMATS = (
    "fp4", "nvfp4", "mxfp4", "nf4·g64", "e2m1·g16", "lookup4·tensor", "lookup3·t64xall",
    "lookup2·tensor·by(g32)", "fp6", "e2m3·g32", "fp8", "e5m2·g64", "ue4m3·row", "e3m1·g8",
    "e4m3b11·col·scale(e5m2·row)", "int4·o128·min", "int8·o16", "int6·t16x16·zero", "int3·tensor",
    "int3·g16·min·scale(int3·o16·min)·minimum(int3·o16·min)", "uint4·g16·scale(uint8·row)",
    "int4·g32·min·scale(uint6·g8)·minimum(uint6·g8)", "lookup1·tensor",
    "lookup5·tensor", "lookup5·t32xall·by(g32)",
)  # fmt: skip

SIZES = ((33, 129), (7, 33), (48, 576), (31, 63), (3, 32), (16, 127))
"""Outputs and inputs: blocks and steps that are full, and that are not."""


QUICK = ("nvfp4", "fp6", "int4·o128·min")
"""Tables, halves and column factors; LLVM takes one to two seconds for a kernel."""


def test_products_are_exact_up_to_rounding() -> None:
    assert_exact(linear_rule, in_turns(QUICK, SIZES), host_cpu())


@pytest.mark.slow
@pytest.mark.parametrize("case", in_turns(FORMATS, SIZES), ids=lambda case: str(case.formats[0]))
def test_every_format_is_exact_up_to_rounding(case: Case) -> None:
    for target in (CPUS["x86_64-v2"], host_cpu()):
        assert_exact(linear_rule, [case], target)


@pytest.mark.fast_rules
@pytest.mark.parametrize(
    "turn", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_the_rule_takes_every_case(turn: int) -> None:
    targets = [CPUS[name] for name in ("x86_64-v2", "x86_64-v3", "avx512-vnni")]
    for number, case in enumerate(in_turns(FORMATS, SIZES)):
        (kernel,) = compile_cases(linear_rule, [case], targets[(number + turn) % 3])
        assert kernel.rule == "linear_coded"


@pytest.mark.fast_rules
def test_kernels_of_64_bytes_are_right_where_nothing_is_looked_up() -> None:
    """Any machine can run 64-byte vectors, split by LLVM; lookups need the instruction."""
    wide = replace(CPUS["x86_64-v4"], llvm_cpu=host_cpu().llvm_cpu)
    chosen = in_turns(("fp8", "int6·t16x16·zero"), SIZES)
    errors = worst_error(linear_rule, chosen, wide, rows=(1, 13))
    assert max(errors.values()) < 1e-5, max(errors, key=lambda case: errors[case])


@pytest.mark.fast_rules
@pytest.mark.parametrize(
    ("target", "register"),
    [
        (CPUS["x86_64-v2"], "%xmm"),
        (CPUS["x86_64-v3"], "%ymm"),
        (CPUS["avx512-vnni"], "%zmm"),
    ],
    ids=str,
)
def test_tables_are_looked_up_a_byte_a_lane(target: Target, register: str) -> None:
    case = Case(32, 64, (term("fp4"),))
    assembly = build(compile_cases(linear_rule, [case], target), target).mod.inspect_source("asm")
    lookups = [line for line in assembly.splitlines() if "pshufb" in line and register in line]
    # two planes of 64 columns x 16 outputs in one loop of 32 columns, for one row and for a panel
    assert len(lookups) >= 2 * 2 * 32 * 16 // (target.vector_bytes)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("fp4", (Planes, 2)),  # all values are bfloat16
        ("nf4·g64", (Planes, 3)),  # a float16 has 10 bits of mantissa
        ("lookup4·tensor", (Planes, 3)),
        ("lookup5·tensor", (Planes, 3)),
        ("int4·o16", (Planes, 2)),
        ("int8·o16", (Integers, None)),
        ("e4m3·row", (Halves, (1, 0xBFFF))),
        ("e5m2·row", (Halves, (0, 0xFFFF))),
        ("e3m2·row", (Halves, (2, 0x9FFF))),
        ("e2m3·row", (Halves, (3, 0x8FFF))),
    ],
)
def test_codes_are_widened_the_cheapest_way(
    text: str, wanted: tuple[type[CodeValues], object]
) -> None:
    format, shape = term(text), (32, 64)
    products = code_products(format.decode(shape, ROW, COL), shape)
    assert products is not None
    found = choose_values(products.value, products.code, format.arrays(shape), CPUS["x86_64-v3"])
    kind, detail = wanted
    assert isinstance(found, kind)
    if isinstance(found, Planes):
        assert found.count == detail
    if isinstance(found, Halves):
        assert (found.shift, found.mask) == detail


@pytest.mark.parametrize("text", ["lookup4·row", "lookup8·tensor", "codebook1x8·d2", "trellis2·w9"])
def test_what_is_no_function_of_a_code_alone_is_left_alone(text: str) -> None:
    format, shape = term(text), (32, 64)
    products = code_products(format.decode(shape, ROW, COL), shape)
    target = CPUS["x86_64-v3"]
    assert products is None or (
        choose_values(products.value, products.code, format.arrays(shape), target) is None
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_every_code_lies_where_its_reader_looks(bits: int, size: int) -> None:
    outer, inner = 17, 33
    codes = torch.randint(0, 1 << bits, (outer, inner), dtype=torch.uint8)
    lanes = CodeLanes("codes", bits, outer, inner, Integers(size).order)
    stream = lanes.repack({"codes": pack_codes(codes, bits)})
    assert stream.shape == (2, lanes.block_bytes)
    for output, column in ((0, 0), (5, 31), (16, 32), (15, 7)):
        step, quad, place = column // 32, column % 32 // 4, column % 4
        byte = lanes.order.index(place * 16 + output % 16)
        found = 0
        for piece in lanes.pieces:
            number, above = divmod(quad, 8 // piece.width)
            at = step * lanes.step_bytes + piece.start + 64 * number + byte
            part = int(stream[output // 16, at]) >> (above * piece.width)
            found |= (part & ((1 << piece.width) - 1)) << piece.shift
        assert found == int(codes[output, column])
