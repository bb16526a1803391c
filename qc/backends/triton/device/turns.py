"""Programs of one launch that finish a tile together: zeros in memory, in which they count.

Nobody waits. Whoever comes last sees what the others have stored, and leaves zeros for the next
launch.
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
def arrive(turns):
    """Say that this program has stored what others of its launch wait for."""
    tl.debug_barrier()  # all threads have stored
    tl.atomic_add(turns, 1)


@triton.jit
def wait(turns, COUNT: tl.constexpr):
    """Wait until COUNT programs have arrived: what they stored can be read then."""
    arrived = tl.atomic_add(turns, 0)
    while arrived < COUNT:
        arrived = tl.atomic_add(turns, 0)


@triton.jit
def leave(turns, COUNT: tl.constexpr):
    """Say that this program, of COUNT that wait, is done; the last one leaves zeros."""
    if tl.atomic_add(turns + 1, 1) == COUNT - 1:
        tl.store(turns, 0)
        tl.store(turns + 1, 0)
        tl.store(turns + 2, 0)
