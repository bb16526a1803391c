"""Which launches a linear becomes: their text, their number, what they share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qc.backends.region import region_of
from qc.backends.triton.kernel import Scratch
from qc.backends.triton.linear.rule import linear_rule
from qc.ir import ops
from qc.ir.fused import fuse
from qc.ir.node import make
from qc.ir.types import TensorType
from tests.backends.triton.cases import GPU, ROWS, Case, call_of

FUSED = Case("int4·g128 + rank32 + sparse1%", 4096, 4096, epilogue="all")


def test_the_text_of_a_fused_linear(golden: Callable[[str, str], None]) -> None:
    launches = call_of(FUSED.planned()).variant(1).launches
    golden("kernels/triton_linear.txt", "\n\n".join(each.source for each in launches))


@pytest.mark.parametrize(
    ("case", "rows", "functions"),
    [
        (Case("int4·g128", 14336, 64), 1, ["linear"]),
        (Case("int4·g128", 1024, 4096), 1, ["linear"]),
        (Case("int4·g128", 1024, 4096), 3, ["linear"]),
        (Case("int4·g128", 1024, 4096), 16, ["linear"]),
        (Case("int4·g128", 1024, 4096), 70, ["linear"]),
        (Case("int4·g128", 1024, 512, activation=32), 1, ["copy", "linear"]),
        (Case("int4·g128 + rank32", 1024, 512), 1, ["beside", "finish"]),
        (Case("int4·g128 + sparse1%", 1024, 512), 1, ["linear"]),
        (Case("int4·g128 + sparse1%", 14336, 512), 1, ["beside", "finish"]),
        (Case("int4·g128 + sparse1%", 14336, 4096), 1, ["linear"]),
        (Case("int4·g128 + sparse1%", 128256, 4096), 1, ["beside", "finish"]),
        (Case("int4·g128 + sparse1%", 1024, 512), 16, ["across", "beside", "finish"]),
        (Case("int4·g128 + sparse1%", 1024, 512), 70, ["across", "entries_alone", "linear"]),
        (FUSED, 1, ["linear"]),
        (FUSED, 2, ["beside", "finish"]),
        (FUSED, 16, ["together"]),
        (Case("int4·g32 + columns20%(int8·row)", 1024, 512, epilogue="gated"), 1, ["linear"]),
    ],
    ids=str,
)
def test_a_sum_is_as_few_launches_as_its_terms_allow(
    case: Case, rows: int, functions: list[str]
) -> None:
    launches = call_of(case.planned()).variant(rows).launches
    assert [each.function for each in launches] == functions


@pytest.mark.parametrize(
    ("case", "rows", "programs", "outputs"),
    [
        (Case("int4·g128", 14336, 4096, epilogue="gated"), 1, 264, 16),  # they take tiles in turn
        (Case("int4·g128", 14336, 4096, epilogue="gated"), 3, 896, 16),
        (Case("int4·g64", 14336, 4096, epilogue="gated"), 1, 224, 64),
        (Case("int4·g128", 1536, 576, epilogue="gated"), 1, 24, 64),
        (Case("int4·g128", 49152, 576), 1, 768, 64),
        (Case("int4·g128", 4096, 512), 1, 256, 16),
        (Case("int3·g128", 14336, 4096), 1, 896, 16),
        (Case("int2·g64·min", 14336, 4096), 1, 224, 64),
        (Case("int3·g128", 14336, 4096, epilogue="gated"), 64, 224, 64),
    ],
    ids=str,
)
def test_few_rows_work_in_the_tiles_that_were_the_fastest(
    case: Case, rows: int, programs: int, outputs: int
) -> None:
    launch = call_of(case.planned()).variant(rows).launches[0]
    assert dict(launch.constants)["BN"] == outputs
    assert launch.grid[1].count({}) == programs


def test_all_numbers_of_rows_read_the_same_packed_weights() -> None:
    """A weight is held once, whatever it is multiplied by."""
    call = call_of(FUSED.planned())
    packed = {
        parameter.name
        for variant in call.variants
        for launch in variant.launches
        for parameter in launch.parameters
        if "plane" in parameter.name
    }
    assert packed == {"w1_0_codes_plane4at0"}


def test_scratch_of_one_name_is_one_piece_of_memory() -> None:
    for variant in call_of(FUSED.planned()).variants:
        found: dict[str, Scratch] = {}
        for launch in variant.launches:
            for parameter in launch.parameters:
                if isinstance(parameter.argument, Scratch):
                    first = found.setdefault(parameter.argument.name, parameter.argument)
                    assert first == parameter.argument


def test_what_is_no_linear_is_left_to_other_rules() -> None:
    x = make(ops.Input("x", TensorType((ROWS, 64))))
    root = make(ops.Unary("silu"), x)
    assert linear_rule(region_of(fuse("elements", root, frozenset({root})), GPU)) is None
