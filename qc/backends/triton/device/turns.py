"""Programs of one launch that work for each other: zeros in memory, in which they count.

Those that finish a tile together do not wait: whoever comes last sees what the others have stored.
Those that need what others make first wait at gates, one a program. Zeros are left for the next
launch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def last(turns, cell, COUNT):
    """Say whether this program is the last of COUNT for a tile: what the others have stored for it
    can be read then."""
    tl.debug_barrier()  # all threads have stored
    found = tl.atomic_add(turns + cell, 1) == COUNT - 1
    if found:
        tl.store(turns + cell, 0)
    return found


@triton.jit
def open(gates, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Open COUNT gates, at most SIZE: whoever enters can read what this program has stored, and
    what it could read."""
    tl.debug_barrier()  # all threads have stored
    gate = tl.arange(0, SIZE)
    tl.atomic_xchg(gates + gate, 1, mask=gate < COUNT, sem="release")


@triton.jit
def enter(gates, gate):
    """Wait for a gate, and close it: no other program of this launch enters it."""
    found = tl.atomic_cas(gates + gate, 1, 0, sem="acquire")
    while found == 0:
        found = tl.atomic_cas(gates + gate, 1, 0, sem="acquire")
