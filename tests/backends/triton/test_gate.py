"""Compiled linear kernels, on a machine without a GPU: what their machine code must be like."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qc.backends.region import region_of
from qc.backends.triton.compile import WARP, compile_launch, inspect
from qc.backends.triton.gate import (
    CONVERSIONS,
    INSTRUCTION,
    instructions_per_weight,
    loop_of,
    objections,
)
from qc.backends.triton.kernel import HIDDEN_PARAMETERS, Launch
from qc.backends.triton.linear.kept import STREAMS
from qc.backends.triton.linear.rule import linear_rule
from qc.ir.target import computing, parse_machine
from tests.backends.triton.cases import Case

SLOW = pytest.mark.slow
PLAIN = Case("int4·g128", 4096, 14336)
AT_ONCE = Case("int4·g128", 4096, 4096)
"""One row of it is multiplied without a loop."""
FUSED = Case("int4·g128 + rank32 + sparse1%", 4096, 14336, epilogue="all")

BUDGET = {
    80: {1: 2.25, 16: 2.55}, 86: {1: 2.25, 16: 2.55}, 89: {1: 2.25, 16: 2.55},
    90: {1: 3.00, 16: 3.05}, 120: {1: 2.20, 16: 2.45},
}  # fmt: skip
"""Instructions per weight by architecture and rows: what Triton 3.9 gave, and a tenth more, but
2.7 at most but on sm_90, where codes wait in registers and are moved once a step: it is faster
all the same. At 4.125 bits a weight, an H100 can issue 4.6 in the time that memory takes."""


def main_launch(case: Case, rows: int, architecture: int) -> Launch:
    """Return the launch that reads the packed weights, for planned values."""
    target = computing(parse_machine(f"cuda:sm_{architecture}"), case.dtype)
    call = linear_rule(region_of(case.planned(), target))
    assert call is not None
    return next(
        each
        for each in call.variant(rows).launches
        if any("_codes" in parameter.name for parameter in each.parameters)
    )


def weights_of_a_step(launch: Launch) -> int:
    """Return how many weights one step of the loop multiplies."""
    found = re.search(r"k = step \* (\d+)", launch.source)
    assert found is not None
    lanes = re.search(r"lanes.joined\(acc0, (\d+)\)", launch.source)
    outputs = dict(launch.constants).get("BN")
    if outputs is None:  # one of several roles
        role = re.search(r"linear_role\(.*BN=(\d+)", launch.source)
        assert role is not None
        outputs = int(role[1])
    assert isinstance(outputs, int)
    return int(found[1]) * outputs * int(lanes[1] if lanes else 1)


@pytest.mark.parametrize("architecture", [80, 90, pytest.param(120, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [1, 16])
def test_four_bits_stay_within_their_instructions(architecture: int, rows: int) -> None:
    launch = main_launch(PLAIN, rows, architecture)
    cubin = compile_launch(launch, architecture)
    budget = BUDGET[architecture][rows]
    assert objections(cubin, weights_of_a_step(launch), budget) == []


def test_all_codes_of_a_row_are_asked_for_before_it_is_there() -> None:
    """In the order of the machine code: every wide load, then the wait for other launches."""
    launch = main_launch(AT_ONCE, 1, 90)
    cubin = compile_launch(launch, 90)
    names = [name for _, name, _ in INSTRUCTION.findall(inspect(cubin.binary, "-sass"))]
    wait = names.index("ACQBULK")
    assert sum(name.endswith(".128") for name in names[:wait]) == 8
    assert not any(name.startswith(("HMMA", "HGMMA", "STS")) for name in names[:wait])
    assert not cubin.spills
    weights = 16 * 4096
    assert len(names) * WARP * cubin.num_warps / weights <= 2.75  # all of it, there is no loop


@pytest.mark.parametrize(("epilogue", "budget"), [("", 2.6), ("gated", 2.8), ("all", 2.8)])
def test_the_next_tile_is_asked_for_before_one_is_multiplied(
    epilogue: str, budget: float
) -> None:  # fmt: skip
    """In the order of the machine code: loads of the first tile, the wait for other launches, and
    in the loop those of the next one in front of the products. A gate and what it gates take turns
    in the same registers, and what an epilogue reads comes into those that codes have left."""
    launch = main_launch(Case("int4·g128", 14336, 4096, epilogue=epilogue), 1, 90)
    cubin = compile_launch(launch, 90)
    names = [name for _, name, _ in INSTRUCTION.findall(inspect(cubin.binary, "-sass"))]
    wait, first = names.index("ACQBULK"), next(
        at for at, name in enumerate(names) if name.startswith("HMMA")
    )  # fmt: skip
    wide = [at for at, name in enumerate(names) if name.endswith(".128")]
    assert [sum(at < wait for at in wide), sum(wait < at < first for at in wide)] == [8, 8]
    assert not any(name.startswith("HGMMA") for name in names)
    assert not cubin.spills
    assert cubin.registers * WARP * cubin.num_warps * 2 <= 65536  # two programs run at once
    weights = 16 * 4096
    assert len(names) * WARP * cubin.num_warps / weights <= budget


def test_a_low_rank_and_entries_are_added_in_the_same_registers() -> None:
    launch = main_launch(Case(FUSED.format, 4096, 4096, epilogue="all"), 1, 90)
    cubin = compile_launch(launch, 90)
    assert not cubin.spills
    assert cubin.registers * WARP * cubin.num_warps * 2 <= 65536
    names = [name for _, name, _ in INSTRUCTION.findall(inspect(cubin.binary, "-sass"))]
    wait = names.index("ACQBULK")
    # codes, a piece of the low rank and the entries are asked for before x is there
    assert sum(name.startswith("LDG.E.U16") for name in names[:wait]) >= 16
    assert sum(name.endswith(".128") for name in names[:wait]) >= 8


def test_programs_of_one_wave_find_room_for_two_on_a_multiprocessor() -> None:
    launch = main_launch(Case("int4·g128", 4096, 14336), 1, 90)
    taken = compile_launch(launch, 90).shared_bytes + 1024
    assert launch.grid[1].count({}) <= 2 * 132
    assert 2 * taken <= 228 << 10 < 3 * taken
    assert compile_launch(launch, 80).shared_bytes < 48 << 10


KEPT = Case("kept50%·g16(int4·row·zero)", 4096, 4096)


def test_the_next_groups_are_asked_for_before_some_are_multiplied() -> None:
    """In the order of the machine code: those of the first step, the wait for other launches, and
    in the loop those of the next one in front of the last third of the products."""
    cubin = compile_launch(main_launch(KEPT, 1, 90), 90)
    names = [name for _, name, _ in INSTRUCTION.findall(inspect(cubin.binary, "-sass"))]
    products = [at for at, name in enumerate(names) if name == "FFMA"]
    wait, middle = names.index("ACQBULK"), products[2 * len(products) // 3]
    wide = [at for at, name in enumerate(names) if name.endswith(".128")]
    assert [sum(at < wait for at in wide), sum(wait < at < middle for at in wide)] == [1, 1]
    assert not cubin.spills
    assert cubin.registers * WARP * cubin.num_warps * STREAMS <= 65536  # so many run at once
    weights = 64 * 4 * 16
    assert len(loop_of(cubin).instructions) * WARP * cubin.num_warps / weights <= 13.5  # and an end
    assert loop_of(cubin).count("FFMA") >= 48
    assert loop_of(cubin).count("I2F") <= 4  # zero points, one a group


@pytest.mark.parametrize(
    ("architecture", "kind"), [(90, "HGMMA"), pytest.param(80, "HMMA", marks=SLOW)]
)
def test_groups_are_put_where_tensor_cores_take_them(architecture: int, kind: str) -> None:
    cubin = compile_launch(main_launch(KEPT, 16, architecture), architecture)
    loop = loop_of(cubin)
    assert loop.count(kind)
    assert loop.count("I2F") <= 4  # zero points, one a group
    assert not cubin.spills
    dense = 64 * 128
    assert len(loop.instructions) * WARP * cubin.num_warps / dense <= 14


@pytest.mark.parametrize(("architecture", "rows", "budget"), [(80, 1, 1.5), (90, 16, 2.15)])
def test_four_bits_times_bytes_take_fewer(architecture: int, rows: int, budget: float) -> None:
    case = Case("int4·g128", 4096, 4096, activation=0)
    launch = main_launch(case, rows, architecture)
    cubin = compile_launch(launch, architecture)
    assert loop_of(cubin).count("IMMA", "IGMMA")
    # conversions of sums, not of weights: one a group
    found = objections(cubin, weights_of_a_step(launch), budget)
    assert [each for each in found if "conversions" not in each] == []


@pytest.mark.parametrize(
    ("format", "rows", "architecture", "budget"),
    [
        ("nvfp4", 1, 90, 5.1),
        ("nvfp4", 64, 90, 6.3),
        ("nvfp4", 16, 80, 4.8),
        ("mxfp4", 1, 90, 4.5),
        ("int4·g16", 16, 90, 4.3),
        ("int3·g16·min·scale(int3·o16·min)·minimum(int3·o16·min)", 1, 90, 4.9),
    ],
)
def test_weights_of_small_groups_are_made_in_registers(
    format: str, rows: int, architecture: int, budget: float
) -> None:
    """What Triton 3.9 gave, and a tenth more."""
    launch = main_launch(Case(format, 4096, 4096), rows, architecture)
    cubin = compile_launch(launch, architecture)
    assert launch.rule == "linear_affine"
    assert loop_of(cubin).count("HGMMA", "HMMA")
    assert objections(cubin, weights_of_a_step(launch), budget) == []


@pytest.mark.parametrize(("format", "budget"), [("e4m3·row", 4.5), ("e2m1·g32", 5.2)])
def test_small_floats_are_unpacked_like_codes(format: str, budget: float) -> None:
    launch = main_launch(Case(format, 4096, 14336), 1, 90)
    assert objections(compile_launch(launch, 90), weights_of_a_step(launch), budget) == []


@pytest.mark.parametrize(
    ("format", "rows", "budget"),
    [("int3·g128", 1, 3.6), ("lookup3·row", 1, 3.7), ("lookup4·row", 16, 5.5), ("nf4·g64", 1, 6.5)],
)
def test_tables_are_looked_up_in_registers(format: str, rows: int, budget: float) -> None:
    """What Triton 3.9 gave, and a tenth more; 3 bits as two planes took 4.3."""
    launch = main_launch(Case(format, 4096, 14336), rows, 90)
    cubin = compile_launch(launch, 90)
    assert objections(cubin, weights_of_a_step(launch), budget) == []
    assert loop_of(cubin).count("PRMT")


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [(90, "QGMMA"), *(pytest.param(n, "QMMA", marks=pytest.mark.slow) for n in (89, 120))],
)
def test_floats_of_8_bits_are_multiplied_as_such(architecture: int, kind: str) -> None:
    case = Case("e4m3·row", 4096, 4096, activation=0, kind="e4m3")
    cubin = compile_launch(main_launch(case, 16, architecture), architecture)
    loop = loop_of(cubin)
    assert loop.count(kind)
    assert not loop.count("HMMA", "HGMMA", *CONVERSIONS)
    assert not cubin.spills


@pytest.mark.parametrize("rows", [1, 16, pytest.param(64, marks=pytest.mark.slow), 1000])
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        (120, "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X"),
        pytest.param(100, "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale", marks=SLOW),
    ],
)
def test_floats_of_4_bits_are_multiplied_as_such(architecture: int, kind: str, rows: int) -> None:
    case = Case("nvfp4", 4096, 4096, activation=16, kind="e2m1", architecture="sm_120")
    cubin = compile_launch(main_launch(case, rows, architecture), architecture)
    products = set(re.findall(r"(?:mma\.sync|wgmma|tcgen05\.mma)\.\S+", cubin.ptx))
    assert products
    assert all(each.startswith(kind) for each in products)  # nothing is widened
    loop = loop_of(cubin)
    assert loop.count("OMMA", "UTCOMMA")
    assert not loop.count(*CONVERSIONS)
    assert any(name.startswith("LDGSTS") and ".128" in name for name in loop.instructions)
    assert not cubin.spills


def test_without_such_units_floats_of_4_bits_are_widened() -> None:
    case = Case("nvfp4", 4096, 4096, activation=16, kind="e2m1")
    for machine in ("cuda:sm_90", "cuda:sm_90+sm_120"):
        call = linear_rule(region_of(case.planned(), parse_machine(machine)))
        assert call is not None
        launches = call.variant(16).launches
        assert launches[0].rule == "copy"
        assert not any("fp4.more(" in each.source for each in launches)


def test_without_such_units_floats_of_8_bits_are_widened() -> None:
    case = Case("e4m3·row", 4096, 4096, activation=0, kind="e4m3")
    for machine in ("cuda:sm_80", "cuda:sm_80+sm_90"):
        call = linear_rule(region_of(case.planned(), parse_machine(machine)))
        assert call is not None
        launches = call.variant(16).launches
        assert not any(each.multiplies_small_floats for each in launches)
        assert launches[0].rule == "copy"


@pytest.mark.parametrize(
    ("architecture", "budget"), [(80, 2.7), pytest.param(90, 3.3, marks=pytest.mark.slow)]
)
def test_four_bits_in_bfloat16_take_few_more(architecture: int, budget: float) -> None:
    case = replace(PLAIN, dtype="bf16")
    launch = main_launch(case, 16, architecture)
    cubin = compile_launch(launch, architecture)
    assert objections(cubin, weights_of_a_step(launch), budget) == []


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("architecture", [86, 89])
def test_so_do_the_cards_between(architecture: int, rows: int) -> None:
    launch = main_launch(PLAIN, rows, architecture)
    cubin = compile_launch(launch, architecture)
    budget = BUDGET[architecture][rows]
    assert objections(cubin, weights_of_a_step(launch), budget) == []


@pytest.mark.parametrize("rows", [1, 16])
def test_what_is_fused_adds_little_to_the_loop(rows: int) -> None:
    """Rank 32, 1 % of outliers, bias, SiLU and residual: a tenth of the loop at most."""
    plain, fused = (main_launch(case, rows, 80) for case in (PLAIN, FUSED))
    used = [
        instructions_per_weight(compile_launch(launch, 80), weights_of_a_step(launch))
        for launch in (plain, fused)
    ]
    assert used[1] <= 1.1 * used[0]


@pytest.mark.parametrize("architecture", [86, 89])
def test_code_of_one_generation_is_only_assembled_anew(
    architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = main_launch(Case("int4·g32", 64, 128), 1, architecture)
    older = compile_launch(launch, 80, tmp_path)
    monkeypatch.setattr("qc.backends.triton.compile.build", None)  # cannot be called
    cubin = compile_launch(launch, architecture, tmp_path)
    assert f"sm_{architecture}" in inspect(cubin.binary, "-elf")
    assert cubin.binary != older.binary
    assert cubin.parameters == older.parameters


def test_a_kernel_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = main_launch(Case("int4·g32", 64, 128), 1, 80)
    first = compile_launch(launch, 80, tmp_path)
    monkeypatch.setattr("qc.backends.triton.compile.build", None)  # cannot be called
    assert compile_launch(launch, 80, tmp_path) == first


def test_half_a_kernel_in_the_cache_is_compiled_again(tmp_path: Path) -> None:
    launch = main_launch(Case("int4·g32", 64, 128), 1, 80)
    first = compile_launch(launch, 80, tmp_path)
    (description,) = tmp_path.rglob("*.json")
    description.write_text("{")
    assert compile_launch(launch, 80, tmp_path) == first


def test_the_parameters_of_a_binary_are_those_of_its_launch(tmp_path: Path) -> None:
    launch = main_launch(Case("int4·g32 + rank8", 64, 128, epilogue="all"), 1, 80)
    cubin = compile_launch(launch, 80, tmp_path)
    sizes = re.findall(r"Ordinal\s*:\s*0x\w+\s+Offset\s*:\s*0x\w+\s+Size\s*:\s*0x(\w+)",
                       inspect(cubin.binary, "-elf"))  # fmt: skip
    expected = [8 if each.startswith("*") else 4 for each in cubin.parameters]
    assert sorted(int(each, 16) for each in sizes) == sorted(expected + [8] * HIDDEN_PARAMETERS)


def test_a_loop_without_tensor_cores_is_objected_to(tmp_path: Path) -> None:
    launch = main_launch(Case("int4·g32", 64, 64), 1, 80)  # one step: no loop at all
    cubin = compile_launch(launch, 80, tmp_path)
    assert not loop_of(cubin).instructions
    assert "no tensor-core instruction in the loop" in objections(cubin, 1, 1.0)
