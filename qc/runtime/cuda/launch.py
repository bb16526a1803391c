"""One launch with its arguments in place, ready to be put on the stream again and again."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from qc.errors import ArtifactError
from qc.runtime.cuda.driver import Driver, Function
from qc.runtime.cuda.order import Access
from qc.runtime.manifest import KernelStep

__all__ = ["HIDDEN_POINTERS", "Launch"]

HIDDEN_POINTERS = 2
"""Triton's kernels take two more pointers, to scratch memory that these have no use for."""
Handle = ctypes.c_void_p


class Launch:
    """A step with its arguments in place: `slots` hold all but the hidden ones, the last of them
    whether it may wait late."""

    def __init__(
        self,
        step: KernelStep,
        function: Function,
        grid: Sequence[int],
        slots: Sequence[Any],
        access: Access,
    ) -> None:
        self.step, self.function, self.grid, self.access = step, function, grid, access
        self.slots = [*slots, *(ctypes.c_uint64(0) for _ in range(HIDDEN_POINTERS))]
        count = len(self.slots)  # the driver reads them through `arguments`
        self.arguments = (Handle * count)(*[ctypes.addressof(slot) for slot in self.slots])

    def enqueue(self, driver: Driver, beside: bool = False, late: bool = False) -> None:
        """Put the launch on the stream; `beside`: it may begin before the one in front has ended,
        and wait for it `late`. Raises ArtifactError."""
        put = driver.launch_beside if beside else driver.launch
        if late:
            self.slots[-HIDDEN_POINTERS - 1].value = 1
        try:
            put(self.function, self.grid, self.arguments)
        except ArtifactError as error:
            raise ArtifactError(
                f"kernel {self.step.kernel!r} failed: {error.message}",
                origin=self.step.origin or None,
            ) from None
        finally:
            if late:
                self.slots[-HIDDEN_POINTERS - 1].value = 0
