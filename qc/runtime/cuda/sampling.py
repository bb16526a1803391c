"""Choose the next tokens where the logits are: a step then returns 4 bytes a row.

`manifest.generate.sampler` names two kernels. Both take pointers in this order, then whether they
may begin early:

    logits f32[rows, vocabulary], values f32[rows, blocks], ids i32[rows, blocks]
    logits, values, ids, settings i32[rows, 4], chosen i32[rows]

The first has a program for each block of BLOCK logits of each row, the second one for each row.
`Sampling.settings` says what the settings are; a token of -1 says that logits were no numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np

from qc.runtime.cuda.driver import Driver, Function
from qc.runtime.cuda.launch import Launch
from qc.runtime.cuda.memory import DeviceMemory, Staging, round_up
from qc.runtime.cuda.order import Access, Span
from qc.runtime.manifest import KernelStep

__all__ = ["BLOCK", "SETTINGS", "Sampler"]

BLOCK = 2048
"""Logits that a program looks at together."""
SETTINGS = 4
"""Numbers that say how a row's token is chosen."""


class Sampler:
    """Both launches for some rows of logits that lie at an address. Fill `settings`, run, read
    `chosen`."""

    def __init__(
        self, driver: Driver, functions: Mapping[str, Function], names: tuple[str, ...],
        logits: int, rows: int, vocabulary: int,
    ) -> None:  # fmt: skip
        blocks = -(-vocabulary // BLOCK)
        size = round_up(4 * rows * blocks)
        self._best = DeviceMemory(driver, 2 * size)
        integers = np.dtype(np.int32)
        self.taken = Staging(driver, [(integers, (rows, SETTINGS))])
        self.given = Staging(driver, [(integers, (rows,))])
        self.settings, self.chosen = self.taken.arrays[0], self.given.arrays[0]
        values = self._best.address, self._best.address + size
        settings, chosen = self.taken.addresses[0], self.given.addresses[0]
        row: Span = logits, logits + 4 * rows * vocabulary
        best: Span = values[0], values[0] + 2 * size
        asked: Span = settings, settings + 4 * SETTINGS * rows
        written: Span = chosen, chosen + 4 * rows
        first, second = names
        self.launches = [
            launch(functions[first], first, (blocks, rows, 1), (logits, *values),
                   Access((row,), (best,))),
            launch(functions[second], second, (rows, 1, 1), (logits, *values, settings, chosen),
                   Access((row, best, asked), (written,))),
        ]  # fmt: skip


def launch(
    function: Function, name: str, grid: tuple[int, int, int], addresses: tuple[int, ...],
    access: Access,
) -> Launch:  # fmt: skip
    """Lay out the arguments of a kernel that takes pointers, and whether it may begin early."""
    step = KernelStep(name, (), (), (), "sampling", {}, grid)
    slots = [*map(ctypes.c_uint64, addresses), ctypes.c_int32(0)]
    return Launch(step, function, grid, slots, access)
