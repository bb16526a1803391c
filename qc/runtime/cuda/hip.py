"""AMD's GPUs, through the HIP runtime: the calls of CUDA's driver under other names.

Types, structures and numbers are those of `hip_runtime_api.h`, ROCm 6 and 7, against which the stub
of the tests is compiled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from qc.errors import ArtifactError
from qc.runtime.cuda.driver import Driver, Handle
from qc.runtime.cuda.executor import CudaProgram
from qc.runtime.manifest import WEIGHTS, Manifest
from qc.runtime.safetensors_file import SafetensorsFile

__all__ = ["HipDriver", "HipProgram", "open_hip_program"]

_LIBRARIES = ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so")
_SHARED = 74  # hipDeviceAttributeMaxSharedMemoryPerBlock
_PROPERTIES_BYTES, _ARCHITECTURE_AT, _ARCHITECTURE_BYTES = 4096, 1160, 256
"""hipDeviceProp_tR0600 has 1472 bytes; gcnArchName is at 1160: "gfx942:sramecc+:xnack-"."""


class HipDriver(Driver):
    """The first GPU of AMD's, and one stream on which everything runs in order."""

    vendor: ClassVar = "AMD"
    wave: ClassVar = 64
    symbols: ClassVar = {
        "cuInit": "hipInit",
        "cuDeviceGetCount": "hipGetDeviceCount",
        "cuDeviceGetName": "hipDeviceGetName",
        "cuDeviceGetAttribute": "hipDeviceGetAttribute",
        "cuCtxSetCurrent": "hipSetDevice",
        "cuMemAlloc_v2": "hipMalloc",
        "cuMemFree_v2": "hipFree",
        "cuMemHostAlloc": "hipHostMalloc",
        "cuMemFreeHost": "hipHostFree",
        "cuMemcpyHtoD_v2": "hipMemcpyHtoD",
        "cuMemcpyDtoH_v2": "hipMemcpyDtoH",
        "cuMemcpyHtoDAsync_v2": "hipMemcpyHtoDAsync",
        "cuMemcpyDtoHAsync_v2": "hipMemcpyDtoHAsync",
        "cuMemcpyDtoDAsync_v2": "hipMemcpyDtoDAsync",
        "cuMemsetD8Async": "hipMemsetD8Async",
        "cuModuleLoadData": "hipModuleLoadData",
        "cuModuleGetFunction": "hipModuleGetFunction",
        "cuLaunchKernel": "hipModuleLaunchKernel",
        "cuStreamCreate": "hipStreamCreateWithFlags",
        "cuStreamSynchronize": "hipStreamSynchronize",
        "cuStreamBeginCapture_v2": "hipStreamBeginCapture",
        "cuStreamEndCapture": "hipStreamEndCapture",
        "cuStreamGetCaptureInfo_v2": "hipStreamGetCaptureInfo_v2",
        "cuStreamUpdateCaptureDependencies": "hipStreamUpdateCaptureDependencies",
        "cuGraphInstantiateWithFlags": "hipGraphInstantiateWithFlags",
        "cuGraphLaunch": "hipGraphLaunch",
        "cuGraphDestroy": "hipGraphDestroy",
        "cuGraphExecDestroy": "hipGraphExecDestroy",
        "cuEventCreate": "hipEventCreateWithFlags",
        "cuEventRecord": "hipEventRecord",
        "cuEventElapsedTime": "hipEventElapsedTime",
        "cuEventDestroy_v2": "hipEventDestroy",
    }  # fmt: skip
    others: ClassVar = {"cuCtxSetCurrent": (ctypes.c_int,)}

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._say = self.symbol(library, "hipGetErrorString", (ctypes.c_int,))
        self._say.restype = ctypes.c_char_p
        self._describe = self.symbol(
            library, "hipGetDevicePropertiesR0600", (ctypes.c_char_p, ctypes.c_int)
        )

    def reason(self, error: int) -> str:
        said: bytes = self._say(error) or b"unknown error"
        return f"{said.decode(errors='replace')} (error {error})"

    @property
    def _context(self) -> Any:
        return 0  # there are no contexts: a thread chooses the device by its number

    @cached_property
    def architecture(self) -> str:
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        error = self._describe(properties, 0)
        if error:
            raise ArtifactError(f"the GPU says nothing of itself: {self.reason(error)}")
        text = properties.raw[_ARCHITECTURE_AT : _ARCHITECTURE_AT + _ARCHITECTURE_BYTES]
        return text.partition(b"\0")[0].partition(b":")[0].decode(errors="replace")

    @cached_property
    def most_shared(self) -> int:
        return self.attribute(_SHARED)

    def rank(self, architecture: str) -> tuple[bool, int] | None:
        return (True, 0) if architecture == self.architecture else None

    def _allow_shared(self, function: Handle, shared: int) -> None:
        """A launch may ask for all of it."""


class HipProgram(CudaProgram):
    """Hold what was loaded and never changes, for a GPU of AMD's."""

    library_name: str | Sequence[str] = _LIBRARIES
    driver = HipDriver


def open_hip_program(folder: Path, manifest: Manifest) -> HipProgram:
    """Read what needs no GPU; the first call looks for one."""
    weights = SafetensorsFile(folder / WEIGHTS) if WEIGHTS in manifest.files else {}
    return HipProgram(folder, manifest, weights)
