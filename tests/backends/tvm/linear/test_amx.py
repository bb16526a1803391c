"""Products on AMX tiles equal what torch computes; any machine can run them, tiles written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import cycle
from typing import Any

import pytest
import torch
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear import amx, int8_dot
from qc.backends.tvm.linear.rule import linear_rule
from qc.ir.target import CPUS, host_cpu
from qc.ir.types import ActivationFormat
from qc.ir.weights.dense import DenseFormat
from qc.ir.weights.grouped import GroupedFormat, Offset
from qc.ir.weights.weight import TermFormat
from tests.backends.tvm.linear.cases import Case, build, compile_cases, worst_error
from tests.backends.tvm.linear.test_int8_dot import dot_of_bytes
from tests.needs import needs

AMX = CPUS["avx512-amx"]
EMULATED = replace(AMX, llvm_cpu=host_cpu().llvm_cpu)  # 64-byte vectors, split by LLVM
OFFSETS: tuple[Offset, ...] = ("symmetric", "zero", "minimum")
ROWS = (1, 7, 9, 16, 17, 33)
G32, G64, G128 = (ActivationFormat(8, group) for group in (32, 64, 128))
PER_TOKEN = ActivationFormat(8)


class WrittenOut(amx.Tiles):
    """Tiles in memory: each a buffer of its own, loaded and stored byte by byte.

    They start with the shapes and the garbage that no kernel may count on.
    """

    def configure(self) -> None:
        for tile, (rows, width) in amx.SHAPES.items():
            buffers[tile] = T.alloc_buffer((rows * width,), "int8", layout=None)
            with T.serial(T.int64(0), T.int64(rows * width)) as at:
                T.buffer_store(buffers[tile], T.int8(77), [at])

    def clear(self, tile: int) -> None:
        rows, width = amx.SHAPES[tile]
        with T.serial(T.int64(0), T.int64(rows * width)) as at:
            T.buffer_store(buffers[tile], T.int8(0), [at])

    def load(self, tile: int, buffer: Any, at: Sequence[Any], stride: int) -> None:
        rows, width = amx.SHAPES[tile]
        with T.serial(T.int64(0), T.int64(rows)) as row, T.serial(T.int64(0), T.int64(width)) as n:
            value = T.reinterpret("int8", buffer[tuple(moved(buffer, at, row, n, stride))])
            T.buffer_store(buffers[tile], value, [row * width + n])

    def store(self, tile: int, buffer: Any, at: Sequence[Any], stride: int) -> None:
        assert (tile, stride) == (amx.SUMS, 64)
        with T.serial(T.int64(0), T.int64(256)) as number:
            place = [at[0] + number]
            T.buffer_store(buffer, integer(buffers[tile], number), place)

    def multiply(self, sums: int, inputs: int, codes: int, signed: bool) -> None:
        quads, width = amx.SHAPES[codes][0], amx.SHAPES[inputs][1]
        assert (width, amx.SHAPES[codes][1]) == (4 * quads, 64)
        with (
            T.serial(T.int64(0), T.int64(16)) as row,
            T.serial(T.int64(0), T.int64(16)) as column,
            T.serial(T.int64(0), T.int64(width)) as n,
        ):
            code = buffers[codes][T.floordiv(n, T.int64(4)) * 64 + column * 4 + T.floormod(n, 4)]
            code = T.Cast("int32", code if signed else T.reinterpret("uint8", code))
            value = T.Cast("int32", buffers[inputs][row * width + n]) * code
            total = integer(buffers[sums], row * 16 + column) + value
            at = T.ramp((row * 16 + column) * 4, T.int64(1), 4)
            T.buffer_store(buffers[sums], T.reinterpret("int8x4", total), [at])

    def release(self) -> None:
        buffers.clear()


buffers: dict[int, Any] = {}


def moved(buffer: Any, at: Sequence[Any], row: Any, n: Any, stride: int) -> list[Any]:
    """Return the index of byte `n` of a row of a tile that starts at `at`."""
    if len(at) == 1:
        return [at[0] + row * stride + n]
    assert stride == int(buffer.shape[1])
    return [at[0] + row, at[1] + n]


def integer(tile: Any, number: Any) -> Any:
    """Return an int32 of a tile."""
    return T.reinterpret("int32", tile[T.ramp(number * 4, T.int64(1), 4)])


def case(
    outer: int, inner: int, format: TermFormat, a: ActivationFormat, epilogue: str = ""
) -> Case:
    """Return a linear of one term, int8 activations."""
    return Case(outer, inner, (format,), a, epilogue)


def cases() -> list[Case]:
    """Units of 32 to 576 inputs from groups of either side; odd outputs; all kinds of codes."""
    epilogue, outer = cycle(("", "bias", "residual", "gated")), cycle((16, 1, 33))
    offset = cycle(OFFSETS)
    groups = [
        (32, 32, G32), (64, 32, G32), (96, 96, PER_TOKEN), (64, 64, G64), (576, None, PER_TOKEN),
        (576, 64, G128), (576, 128, G128), (96, 32, PER_TOKEN), (320, 128, G64), (96, 96, G32),
        (192, 64, PER_TOKEN),
    ]  # fmt: skip
    found = [
        case(next(outer), inner, GroupedFormat(4, group, next(offset)), a, next(epilogue))
        for inner, group, a in groups
    ]
    codes = [GroupedFormat(2, 32, "minimum"), GroupedFormat(5, 32), GroupedFormat(8, 32)]
    codes += [GroupedFormat(7, 32), GroupedFormat(8, 64, "zero"), GroupedFormat(8, 32, "minimum")]
    return found + [case(next(outer), 64, format, G32) for format in codes]


def check(chosen: Sequence[Case], rows: Sequence[int] = ROWS) -> None:
    errors = worst_error(linear_rule, chosen, EMULATED, rows)
    assert max(errors.values()) < 1e-5, max(errors, key=lambda case: errors[case])


@pytest.fixture
def _tiles_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "Tiles", WrittenOut)
    monkeypatch.setattr(int8_dot, "pure", dot_of_bytes)


@pytest.mark.usefixtures("_tiles_written_out")
@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.slow if part % 3 else ()) for part in range(6)]
)
def test_kernels_are_right_but_for_the_instructions(part: int) -> None:
    check(cases()[part::6])


@pytest.mark.usefixtures("_tiles_written_out")
@pytest.mark.parametrize("epilogue", ["gated", pytest.param("", marks=pytest.mark.slow)])
def test_other_terms_of_a_sum_take_tall_tiles_too(epilogue: str) -> None:
    formats = GroupedFormat(4, 32, "minimum"), DenseFormat(torch.float16), GroupedFormat(2, 32)
    check([Case(33, 64, formats, G32, epilogue)], (7, 15, 16, 40))


@needs("amx")
def test_kernels_are_right_on_tiles() -> None:
    errors = worst_error(linear_rule, cases(), AMX, ROWS)
    assert max(errors.values()) < 1e-5, max(errors, key=lambda case: errors[case])


TILE_WORDS = (
    "ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbsud", "tdpbssd",
)  # fmt: skip

COMPILED = {
    "g32": case(48, 64, GroupedFormat(4, 32, "minimum"), G32),
    "symmetric": case(48, 128, GroupedFormat(8, 64, "symmetric"), G64, "gated"),
}


@cache
def assembly(name: str) -> str:
    """Return what LLVM makes of a kernel for Sapphire Rapids."""
    kernels = compile_cases(linear_rule, [COMPILED[name]], AMX)
    return str(build(kernels, AMX).mod.inspect_source("asm"))


@pytest.mark.fast_rules
@pytest.mark.parametrize(
    ("name", "instruction"),
    [("g32", "tdpbsud"), ("symmetric", "tdpbssd"), ("g32", "vpdpbusd"), ("symmetric", "vpdpbusd")],
)
def test_tall_tiles_use_amx_and_low_ones_vnni(name: str, instruction: str) -> None:
    assert instruction in assembly(name)


@pytest.mark.fast_rules
@pytest.mark.parametrize("name", COMPILED)
def test_a_tile_is_stored_once_a_product_and_never_spilled(name: str) -> None:
    """A spilled tile would be stored and loaded again; here loads are operands, stores are sums."""
    lines = [line.split() for line in assembly(name).splitlines()]
    count = {word: sum(line[:1] == [word] for line in lines) for word in TILE_WORDS}
    products = count["tdpbsud"] + count["tdpbssd"]
    assert products
    assert count["tileloadd"] == 2 * products
    assert count["tilestored"] == count["tilezero"] == products
    assert count["ldtilecfg"] > 0
    assert count["tilerelease"] > 0


@pytest.mark.fast_rules
def test_the_kernel_says_what_it_is() -> None:
    (kernel,) = compile_cases(linear_rule, [COMPILED["g32"]], AMX)
    assert kernel.rule == "linear_int8_amx"
