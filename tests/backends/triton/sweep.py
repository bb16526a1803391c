"""All linear cases: every example format in small and odd shapes, the named sums, all buckets."""

from __future__ import annotations

from qc.ir.weights.catalog import example_formats
from tests.backends.triton.cases import Case

SHAPES = ((48, 96, 1), (50, 128, 3), (33, 70, 5), (64, 256, 2), (96, 160, 17), (130, 512, 1))
"""out, in, rows, in turns."""

SUMS = (
    Case("int4·g32 + rank16", 64, 128, 3, None, "all"),
    Case("int4·g32·min + sparse1%", 64, 128, 3, None, "residual"),
    Case("int3·g64·zero + rank4 + sparse5%", 70, 192, 2, None, "gated"),
    Case("int4·g128 + rank32 + sparse1%", 128, 512, 1, None, "all"),
    Case("int4·g128 + rank32 + sparse1%", 128, 512, 16, None, "all"),
    Case("int2·g32·min + columns20%(int4·row·zero) + rank1", 48, 96, 4, 0, "bias"),
    Case("int5·g32 + train2·bond4 + signs1·row·offset", 64, 128, 20, None, "all"),
    Case("kept50%·g16(int4·row) + rank8", 64, 256, 1, None, "residual"),
    Case("planes3·g64 + sparse1%", 50, 192, 5, 32, "gated"),
    Case("int4·g128 + rank8 + sparse1%", 64, 512, 1, 0, "all"),
    Case("int4·g64·zero", 50, 1024, 9, 256, "gated"),
    Case("int8·g32 + int4·row·min", 48, 256, 20, 0, "bias"),
    Case("int4·g128 + sparse1%", 72, 1024, 3, None, "gated"),
    Case("int4·g128", 40, 4096, 12, None, "gated"),  # by parts, which the last program adds up
    Case("int4·g32·zero + rank8·factors(int8·row)", 50, 160, 3, None, "all", fast=False),
)
"""Sums of terms, with what the planner fuses behind them."""

AT_GATES = (
    Case("int4·g128 + rank20 + sparse5%", 200, 1024, 11, None, "all"),
    Case("int4·g128 + rank32", 72, 2048, 16, None, "residual"),
    Case("int4·row + rank8 + sparse1%", 50, 192, 7, None, "bias"),
    Case("int4·g128 + rank32 + sparse1%", 4096, 256, 5),
)
"""Sums for up to 16 rows: one launch, with ranks by parts and not, several threads for the entries
of an output and one, rows of a tile that there are not."""

STREAMED = (
    Case("int4·g128", 80, 1024, 1, None, "all", multiprocessors=1),
    Case("int4·g128·zero", 64, 1024, 1, None, "residual", multiprocessors=1),
    Case("int4·g128", 80, 2048, 1, dtype="bf16", multiprocessors=1),
    Case("int4·g128", 80, 4096, 1, multiprocessors=1),
    Case("int4·g128", 80, 1024, 1, None, "gated", multiprocessors=1),
    Case("int4·g128·scale(uint8·row)", 64, 2048, 1, None, "gated", multiprocessors=1),
    Case("int4·g128 + rank8 + sparse1%", 320, 1024, 1, None, "all", multiprocessors=4),
    Case("int4·g128 + rank12·factors(int8·row)", 256, 2048, 1, multiprocessors=8),
    Case("int4·g128 + sparse8%", 80, 1024, 1, None, "residual", multiprocessors=1),
)
"""More tiles of outputs than programs run at once: those take one after another."""

LOOKED = (
    Case("lookup4·row", 128, 512, 1),
    Case("lookup4·row + sparse0.45%", 50, 320, 5, None, "bias"),
    Case("lookup3·row", 72, 512, 3, None, "gated"),
    Case("lookup2·t32xall", 80, 256, 17, 32, "all"),
    Case("lookup1·row", 33, 300, 2),
    Case("nf4·g64", 128, 4096, 1),
    Case("nf4·g32·scale(uint8·row)", 64, 160, 9, None, "residual"),
    Case("lookup3·tensor·by(g64)", 50, 384, 70),
)
"""Codes that are looked up in registers."""

AFFINE = (
    Case("int4·g32·min·scale(uint8·row)·minimum(uint8·row)", 128, 4096, 1),
    Case("int4·g32·min·scale(uint8·row)·minimum(uint8·row)", 50, 160, 9, 32, "gated"),
    Case("int3·g32·min·scale(uint6·row)·minimum(uint6·row)", 72, 512, 3, 32, "all"),
    Case("int2·g32·min", 33, 320, 17),
    Case("int4·g64·zero + rank8", 50, 1024, 70, None, "residual"),
    Case("int4·g32", 48, 96, 5, None, "bias"),
    Case("nf4·g32", 48, 512, 2),
    Case("int3·g16·min·scale(int3·o16·min)·minimum(int3·o16·min)", 80, 192, 3, None, "all"),
    Case("int4·g16", 50, 144, 17, None, "residual"),
    Case("int2·g16·min + sparse2%", 64, 2048, 1),
    Case("nf4·g16", 33, 320, 2),
    Case("mxfp4", 72, 512, 9, None, "gated"),
    Case("e2m1·g32 + rank8", 48, 1024, 20, None, "bias"),
    Case("int4·g32·min·scale(e4m3·tensor)", 40, 256, 70),
    Case("int4·g32·min·scale(uint8·row)·minimum(uint8·row)", 64, 576, 5, None, "gated"),
    Case("int8·g32", 8192, 192, 1),
    Case("int8·g32", 50, 128, 3),
    Case("int6·g32·min", 48, 96, 12, None, "bias"),
)
"""Weights that are made in registers, for their groups are small."""

FP8 = tuple(
    Case(format, outer, inner, rows, 0, epilogue, kind="e4m3", dtype=dtype, architecture=machine)
    for format, outer, inner, rows, epilogue, dtype, machine in (
        ("e4m3·row", 128, 512, 1, "", "f16", "sm_90"),
        ("e4m3·row", 50, 200, 17, "gated", "f16", "sm_90"),
        ("e4m3·tensor", 64, 256, 70, "all", "f16", "sm_90"),
        ("e4m3·g64", 48, 256, 4, "bias", "f16", "sm_90"),
        ("e4m3·row + rank8 + sparse1%", 64, 256, 3, "residual", "f16", "sm_90"),
        ("e4m3·row", 64, 256, 5, "", "bf16", "sm_90"),
        ("int4·g32", 64, 256, 3, "", "f16", "sm_90"),
        ("e4m3·row", 64, 256, 5, "all", "f16", "sm_80"),
    )
)  # fmt: skip
"""Activations of e4m3: by weights of the same, by others, and where no tensor cores take them."""

FP4 = tuple(
    Case(format, outer, inner, rows, 16, epilogue, kind="e2m1", dtype=dtype, architecture=machine)
    for format, outer, inner, rows, epilogue, dtype, machine in (
        ("nvfp4", 128, 512, 1, "", "f16", "sm_120"),
        ("nvfp4", 144, 192, 17, "gated", "f16", "sm_100"),
        ("nvfp4", 256, 128, 70, "all", "f16", "sm_100"),
        ("nvfp4", 40, 4096, 3, "bias", "f16", "sm_120"),
        ("nvfp4 + rank8 + sparse1%", 64, 256, 3, "residual", "f16", "sm_120"),
        ("nvfp4 + nvfp4", 64, 256, 5, "", "bf16", "sm_100"),
        ("mxfp4", 64, 256, 3, "", "f16", "sm_120"),
        ("nvfp4", 64, 96, 2, "", "f16", "sm_120"),
        ("nvfp4", 64, 256, 5, "all", "f16", "sm_90"),
    )
)  # fmt: skip
"""The same of e2m1; by parts, and by channels that are no whole instructions, too."""

WIDENED = (
    Case("nvfp4", 96, 512, 1),
    Case("nvfp4", 50, 144, 5, None, "gated"),
    Case("nvfp4 + rank8 + sparse1%", 64, 256, 20, None, "all"),
    Case("nvfp4", 96, 4096, 3, None, "gated"),
    Case("nvfp4", 64, 256, 33, 32, "gated"),
)
"""Floats of 4 bits with scales of e4m3 times float16, made in registers, or bfloat16, widened."""

KEPT = (
    Case("kept50%·g16(int4·row·zero)", 200, 512, 1, None, "all", multiprocessors=2),
    Case("kept10%·g16(int4·row·zero)", 300, 256, 2, None, "gated", multiprocessors=3),
    Case("kept70%·g32(int4·row)", 70, 256, 3, None, "residual", multiprocessors=1),
    Case("kept50%·g16(int4·row) + rank8", 64, 256, 1, 32, "residual", multiprocessors=1),
    Case("kept40%·g64(int4·row)", 100, 320, 70, None, "gated", multiprocessors=2),
    Case("kept50%·g32(uint4·row)", 64, 4096, 16, None, multiprocessors=9),
    Case("kept50%·g16(int4·row·zero)", 200, 400, 33, None, "all", multiprocessors=3),
    Case("kept50%·g16(int4·row·zero)", 64, 256, 9, None, "bias", fast=False),
)
"""Groups of whole words of 4 bits, in slices and in parts of them."""

BUCKETS = tuple(
    Case("int4·g128", 128, 2048, rows, None, epilogue)
    for rows, epilogue in (
        (1, ""), (2, "gated"), (4, ""), (5, "all"), (8, ""), (9, "bias"), (16, ""), (17, "gated"),
        (32, ""), (33, "residual"), (64, ""), (70, "all"),
    )
)  # fmt: skip
"""Every number of rows that another kernel is made for, and one more."""


def examples() -> list[Case]:
    """Return a case for every example of every format, a third of them on int8 activations."""
    found = []
    for number, format in enumerate(f for each in example_formats().values() for f in each):
        outer, inner, rows = SHAPES[number % len(SHAPES)]
        activation = (None, None, 32)[number % 3]
        case = Case(str(format), outer, inner, rows, activation)
        if case.refused:
            case = Case(str(format), 64, 256, rows, activation)
        if not case.refused:
            found.append(case)
    return found


def all_cases() -> list[Case]:
    """Return everything that is tried."""
    return [
        *examples(), *SUMS, *AT_GATES, *STREAMED, *LOOKED, *AFFINE, *FP8, *FP4, *WIDENED, *KEPT,
        *BUCKETS,
    ]  # fmt: skip
