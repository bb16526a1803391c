"""Memory on the device, and memory of this machine that copies to it fast. Freed when dropped."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qc.errors import ArtifactError
from qc.runtime.cuda.driver import Driver
from qc.runtime.dtypes import DType

__all__ = ["DeviceMemory", "DeviceState", "Staging", "round_up"]

ALIGNMENT = 256
"""Every address that kernels see is a multiple of it; 16 is what they count on."""


def round_up(size: int) -> int:
    """Return the next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class DeviceMemory:
    """Some bytes on the device."""

    def __init__(self, driver: Driver, size: int) -> None:
        self.driver, self.size = driver, size
        self.address = driver.allocate(size)
        weakref.finalize(self, _free, driver, "cuMemFree_v2", self.address)

    def clear(self) -> None:
        """Make every byte zero."""
        if self.size:
            self.driver.call("cuMemsetD8Async", self.address, 0, self.size, self.driver.stream)

    def write(self, array: NDArray[Any], offset: int = 0) -> None:
        """Copy an array here, and wait."""
        flat = np.ascontiguousarray(array)
        if flat.nbytes:
            self.driver.call(
                "cuMemcpyHtoD_v2", self.address + offset, flat.ctypes.data, flat.nbytes
            )

    def read(self, into: NDArray[Any], offset: int = 0) -> None:
        """Copy from here into a contiguous array, and wait."""
        if into.nbytes:
            self.driver.call(
                "cuMemcpyDtoH_v2", into.ctypes.data, self.address + offset, into.nbytes
            )


def _free(driver: Driver, call: str, address: int) -> None:
    """Give memory back; a driver that is shutting down has done so already."""
    driver.refused("cuCtxSetCurrent", driver._context)
    driver.refused(call, address)


class DeviceState:
    """The state of one session: zeros on the device, which grow with the positions."""

    def __init__(self, driver: Driver, layout: Sequence[tuple[DType, tuple[int, ...]]]) -> None:
        self.shapes = [shape for _, shape in layout]
        self.items = [dtype.bytes for dtype, _ in layout]
        sizes = [prod(shape) * item for shape, item in zip(self.shapes, self.items, strict=True)]
        self._memory = DeviceMemory(driver, sum(round_up(size) for size in sizes))
        self._driver = driver
        self.addresses: list[int] = []
        at = self._memory.address
        for size in sizes:
            self.addresses.append(at)
            at += round_up(size)
        self.bytes = self._memory.size
        self._memory.clear()

    def clear(self) -> None:
        """Make every element zero again; addresses stay."""
        self._memory.clear()

    def copy_from(self, smaller: DeviceState) -> None:
        """Take over the content of a state with room for fewer positions.

        A position must have the same index in both; leading axes of equal size are copied one by
        one where a later axis has grown.
        """
        pairs = zip(
            smaller.addresses, smaller.shapes, self.addresses, self.shapes, self.items, strict=True
        )
        for source, old, target, new, item in pairs:
            axis = next((i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b), 0)
            if old[axis + 1 :] != new[axis + 1 :] or old[:axis] != new[:axis]:
                raise ArtifactError(f"a state of shape {list(old)} cannot grow to {list(new)}")
            rows = prod(old[:axis])
            size, stride = (prod(shape[axis:]) * item for shape in (old, new))
            for row in range(rows):
                self._driver.call(
                    "cuMemcpyDtoDAsync_v2", target + row * stride, source + row * size, size,
                    self._driver.stream,
                )  # fmt: skip
        self._driver.synchronize()  # the smaller one may be freed now


class Staging:
    """Arrays of this machine with a twin on the device; all are copied at once."""

    def __init__(self, driver: Driver, layout: Sequence[tuple[np.dtype[Any], tuple[int, ...]]]):
        sizes = [prod(shape) * dtype.itemsize for dtype, shape in layout]
        self._size = sum(round_up(size) for size in sizes)
        self._driver = driver
        self._device = DeviceMemory(driver, self._size)
        self._host = driver.allocate_host(self._size)
        weakref.finalize(self, _free, driver, "cuMemFreeHost", self._host)
        bytes_here = (ctypes.c_ubyte * max(self._size, 1)).from_address(self._host)
        raw = np.frombuffer(memoryview(bytes_here), np.uint8)
        self.arrays: list[NDArray[Any]] = []
        self.addresses: list[int] = []
        at = 0
        for (dtype, shape), size in zip(layout, sizes, strict=True):
            array = raw[at : at + size].view(dtype).reshape(shape)
            array[...] = 0
            self.arrays.append(array)
            self.addresses.append(self._device.address + at)
            at += round_up(size)

    def upload(self) -> None:
        """Copy to the device, in the order of the stream."""
        if self._size:
            self._driver.call(
                "cuMemcpyHtoDAsync_v2", self._device.address, self._host, self._size,
                self._driver.stream,
            )  # fmt: skip

    def download(self) -> None:
        """Copy from the device, in the order of the stream."""
        if self._size:
            self._driver.call(
                "cuMemcpyDtoHAsync_v2", self._host, self._device.address, self._size,
                self._driver.stream,
            )  # fmt: skip
