"""Tables of rows in registers: products, and which tables are laid out."""

from __future__ import annotations

import pytest
import torch

from qc.backends.tvm.linear.row_tables import RowCodes, RowTables, row_tables_term
from qc.backends.tvm.linear.rule import linear_rule
from qc.backends.tvm.linear.term import Place
from qc.ir.target import CPUS, Target, host_cpu
from qc.ir.weights.packing import pack_codes
from tests.backends.tvm.linear.cases import (
    Case,
    assert_exact,
    build,
    compile_cases,
    in_turns,
    term,
)

FORMATS = (
    "lookup4·row", "lookup4·g128", "lookup2·row", "lookup4·t3xall", "lookup1·row", "lookup3·row",
    "lookup4·row·by(g256)",
)  # fmt: skip

SIZES = ((33, 129), (7, 576), (48, 96), (31, 63), (1, 127), (17, 256), (16, 513))


def test_products_are_exact_up_to_rounding() -> None:
    assert_exact(linear_rule, in_turns(FORMATS, SIZES)[:2], host_cpu())


@pytest.mark.slow
@pytest.mark.parametrize("case", in_turns(FORMATS, SIZES), ids=lambda case: str(case.formats[0]))
def test_every_format_is_exact_up_to_rounding(case: Case) -> None:
    for target in (CPUS["x86_64-v2"], host_cpu()):
        assert_exact(linear_rule, [case], target)


@pytest.mark.fast_rules
def test_the_rule_takes_every_case() -> None:
    for target in (CPUS["x86_64-v2"], CPUS["x86_64-v3"], CPUS["avx512-vnni"]):
        kernels = compile_cases(linear_rule, in_turns(FORMATS, SIZES), target)
        assert {kernel.rule for kernel in kernels} == {"linear_row_tables"}


@pytest.mark.fast_rules
@pytest.mark.parametrize(
    ("target", "register"),
    [(CPUS["x86_64-v2"], "%xmm"), (CPUS["x86_64-v3"], "%ymm"), (CPUS["avx512-vnni"], "%zmm")],
    ids=str,
)
def test_tables_are_looked_up_a_byte_a_lane(target: Target, register: str) -> None:
    case = Case(16, 256, (term("lookup4·row"),))
    assembly = build(compile_cases(linear_rule, [case], target), target).mod.inspect_source("asm")
    lookups = [line for line in assembly.splitlines() if "pshufb" in line and register in line]
    assert len(lookups) >= 2 * 3 * 2  # one row and a panel, three planes, two vectors of codes


@pytest.mark.parametrize(
    ("text", "segment"),
    [("lookup4·row", None), ("lookup4·g128", 128), ("lookup4·row·by(g256)", 256)],
)
def test_tables_are_shared_by_as_many_columns_as_can(text: str, segment: int | None) -> None:
    kernel = row_tables_term(Place(0, "0.", term(text), (32, 512), CPUS["x86_64-v3"]))
    assert isinstance(kernel, RowTables)
    assert kernel.segment == segment


@pytest.mark.parametrize("text", ["lookup4·g16", "lookup5·row", "int4·g10"])
def test_short_segments_and_larger_tables_are_left_alone(text: str) -> None:
    assert row_tables_term(Place(0, "0.", term(text), (32, 512), CPUS["x86_64-v3"])) is None


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_every_code_lies_where_its_reader_looks(bits: int, size: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 600), dtype=torch.uint8)
    order = tuple(reversed(range(size)))
    layout = RowCodes("codes", bits, 600, size, order)
    packed = layout.repack({"codes": pack_codes(codes, bits)})
    assert packed.shape == (3, layout.row_bytes)
    for row, column in ((0, 0), (1, 31), (2, 599), (1, 300)):
        step, inside = divmod(column, layout.width)
        vector, place = divmod(inside, size)
        found = 0
        for piece in layout.pieces:
            number, above = divmod(vector, 8 // piece.width)
            at = step * layout.step_bytes + layout.start(piece) + number * size
            part = int(packed[row, at + order.index(place)]) >> (above * piece.width)
            found |= (part & ((1 << piece.width) - 1)) << piece.shift
        assert found == int(codes[row, column])
