"""Sums of a low rank that the programs of one launch compute for each other.

Program n multiplies a piece of the channels for one rank, and leaves the sum in slot n, in one word
with the number of the launch: who reads a slot sees at once whether it is of this launch, without
fences, and nothing has to be cleared for the next one. Every program keeps that number for itself.
Who has looked a few times in vain computes all slots itself, to the same bits: no program depends
on another one that may not have begun, and the interpreter, which runs them one after the other,
needs no other kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOOKS = tl.constexpr(64)
"""How often a program looks, half a microsecond each."""


@triton.jit
def rank(job, RANK: tl.constexpr, JOBS: tl.constexpr):
    """Return the rank that a job is for; beyond JOBS the last one again."""
    return tl.minimum(job, JOBS - 1) % RANK


@triton.jit
def channels(job, RANK: tl.constexpr, JOBS: tl.constexpr, SIZE: tl.constexpr):
    """Return the channels that a job multiplies, i32[SIZE]."""
    return tl.minimum(job, JOBS - 1) // RANK * SIZE + tl.arange(0, SIZE)


@triton.jit
def number(numbers, program):
    """Return the number of this launch: one more than that of the last one."""
    return tl.load(numbers + program) + 1


@triton.jit
def leave(slots, job, launch, down, x, channel, JOBS: tl.constexpr):
    """Multiply down[channel] by x, and leave the sum in the slot of a job."""
    total = tl.sum(down * tl.load(x + channel).to(tl.float32), 0)
    bits = total.to(tl.uint32, bitcast=True).to(tl.int64)
    word = launch.to(tl.int64) << 32 | bits
    if job < JOBS:
        tl.store(slots.to(tl.pointer_type(tl.int64), bitcast=True) + job, word)


@triton.jit
def words(slots, RANK: tl.constexpr, JOBS: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr):
    """Read the slots, i64[PARTS, RANKS], sizes rounded up to powers of two; 0 beyond JOBS."""
    first = tl.arange(0, PARTS)[:, None] * RANK
    each = tl.arange(0, RANKS)[None, :]
    at = slots.to(tl.pointer_type(tl.int64), bitcast=True) + (first + each)
    return tl.load(at, mask=(each < RANK) & (first < JOBS), other=0, volatile=True)


@triton.jit
def missing(word, launch, JOBS: tl.constexpr):
    """Say whether any slot is not of this launch yet."""
    return tl.sum(tl.ravel((word >> 32) == launch).to(tl.int32), 0) < JOBS


@triton.jit
def look(slots, launch, RANK: tl.constexpr, JOBS: tl.constexpr, RANKS: tl.constexpr,
         PARTS: tl.constexpr):  # fmt: skip
    """Read the slots until all are of this launch, or until it seems in vain."""
    word = words(slots, RANK, JOBS, RANKS, PARTS)
    looks = 0
    while missing(word, launch, JOBS) & (looks < LOOKS):
        word = words(slots, RANK, JOBS, RANKS, PARTS)
        looks += 1
    return word


@triton.jit
def numbers(RANKS: tl.constexpr, RANK: tl.constexpr):
    """Return all ranks, i32[1, RANKS]; beyond RANK the last one again."""
    return tl.minimum(tl.arange(0, RANKS), RANK - 1)[None, :]


@triton.jit
def multiplied(up, word):
    """Return the products of up[out, rank] with the sums of all slots of a rank, f32[out]."""
    pieces = (word & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
    return tl.sum(up * tl.sum(pieces, 0)[None, :], 1)


@triton.jit
def meet():
    """Let all threads of a program read what it has stored."""
    tl.debug_barrier()


@triton.jit
def end(numbers, program, launch):
    """Keep the number of this launch."""
    tl.store(numbers + program, launch)
