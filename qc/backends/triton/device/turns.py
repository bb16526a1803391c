"""Programs of one launch that wait for each other: zeros in memory, in which they count.

What must be waited for has the lower program numbers: GPUs begin programs in that order, so it is
running, or has run, when somebody waits. Whoever comes last leaves zeros for the next launch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def last(turns, cell, COUNT: tl.constexpr):
    """Say whether this program is the last of COUNT for a tile: what the others have stored for it
    can be read then."""
    tl.debug_barrier()  # all threads have stored
    found = tl.atomic_add(turns + cell, 1) == COUNT - 1
    if found:
        tl.store(turns + cell, 0)
    return found


@triton.jit
def done(turns, AT: tl.constexpr):
    """Say that this program has stored what others wait for."""
    tl.debug_barrier()
    tl.atomic_add(turns + AT, 1)


@triton.jit
def wait(turns, AT: tl.constexpr, COUNT: tl.constexpr, WAITING: tl.constexpr):
    """Wait for COUNT programs to be done; WAITING tiles do so."""
    while tl.atomic_add(turns + AT, 0) < COUNT:
        pass
    if tl.atomic_add(turns + AT + 1, 1) == WAITING - 1:
        tl.store(turns + AT, 0)
        tl.store(turns + AT + 1, 0)
    tl.debug_barrier()
