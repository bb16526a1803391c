"""How launches follow each other: on GPUs that can, the next one starts before this one has ended.

A program waits before it touches what launches in front of it write, and all programs of all
launches have waited when they end; so a launch that has waited finds everything finished. One that
is told it may be `late` shares no memory with what still runs, and waits at its join alone. CUDA
C++ Programming Guide 13, "programmatic dependent launch".
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(late, OVERLAP: tl.constexpr):
    """Wait for the launches in front, unless `late`; then let the next one start."""
    if OVERLAP:
        if late == 0:
            gdc_wait()
        gdc_launch_dependents()


@triton.jit
def join(OVERLAP: tl.constexpr):
    """Wait for the launches in front, where that has not happened yet."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def number(axis: tl.constexpr):
    """Return which program of a grid this is."""
    return tl.program_id(axis)


@triton.jit
def count(axis: tl.constexpr):
    """Return how many programs a grid has: not a number that is known when compiling, for which
    addresses would be added up in registers of their own."""
    return tl.num_programs(axis)


@triton.jit
def within(number, FIRST: tl.constexpr, CELLS: tl.constexpr):
    """Return the tile of outputs of a program of a role, and its part of the channels."""
    local = number - FIRST
    return local % CELLS, local // CELLS


@triton.jit
def ask(array, first, stop, LINES: tl.constexpr):
    """Ask for elements `first` to `stop` of an array, LINES of 128 bytes at most: loads will find
    them in the cache of the GPU. Where there are none, for any other."""
    EACH: tl.constexpr = 1024 // array.dtype.element_ty.primitive_bitwidth
    at = tl.maximum(tl.minimum(first + tl.arange(0, LINES) * EACH, stop - 1), 0)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [array + at], tl.int32, False, 1
    )
