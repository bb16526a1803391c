"""The CUDA driver, through ctypes: devices, memory, modules, streams, graphs of launches.

Names are those of the CUDA Driver API, whose reference says what each call does; the suffixes are
the ABI versions that cuda.h has mapped the names to since CUDA 4.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from qc.errors import ArtifactError

__all__ = ["Driver", "Function", "find_driver"]

LIBRARY = "libcuda.so.1"

_MAJOR, _MINOR, _SHARED, _NAME_BYTES = 75, 76, 97, 256
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR, _MAX_SHARED_MEMORY_PER_BLOCK_OPTIN."""
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_LIMIT = 48 * 1024
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_SET_DEPENDENCIES = 1  # CU_STREAM_SET_CAPTURE_DEPENDENCIES
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_OUT_OF_MEMORY = 2

_BESIDE = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

Handle = ctypes.c_void_p


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: a kind, and a value of up to 64 bytes."""

    _fields_ = [
        ("kind", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint64 * 8),
    ]  # fmt: skip


class _Configuration(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", Handle), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGetCount": (ctypes.POINTER(ctypes.c_int),),
    "cuDeviceGetName": (ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    "cuDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(Handle), ctypes.c_int),
    "cuCtxSetCurrent": (Handle,),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuMemAlloc_v2": (ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t),
    "cuMemFree_v2": (ctypes.c_uint64,),
    "cuMemHostAlloc": (ctypes.POINTER(Handle), ctypes.c_size_t, ctypes.c_uint),
    "cuMemFreeHost": (Handle,),
    "cuMemcpyHtoD_v2": (ctypes.c_uint64, Handle, ctypes.c_size_t),
    "cuMemcpyDtoH_v2": (Handle, ctypes.c_uint64, ctypes.c_size_t),
    "cuMemcpyHtoDAsync_v2": (ctypes.c_uint64, Handle, ctypes.c_size_t, Handle),
    "cuMemcpyDtoHAsync_v2": (Handle, ctypes.c_uint64, ctypes.c_size_t, Handle),
    "cuMemcpyDtoDAsync_v2": (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, Handle),
    "cuMemsetD8Async": (ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, Handle),
    "cuModuleLoadData": (ctypes.POINTER(Handle), ctypes.c_char_p),
    "cuModuleGetFunction": (ctypes.POINTER(Handle), Handle, ctypes.c_char_p),
    "cuFuncSetAttribute": (Handle, ctypes.c_int, ctypes.c_int),
    "cuLaunchKernel": (
        Handle, *([ctypes.c_uint] * 7), Handle, ctypes.POINTER(Handle), ctypes.POINTER(Handle),
    ),
    "cuLaunchKernelEx": (
        ctypes.POINTER(_Configuration), Handle, ctypes.POINTER(Handle), ctypes.POINTER(Handle),
    ),
    "cuStreamCreate": (ctypes.POINTER(Handle), ctypes.c_uint),
    "cuStreamSynchronize": (Handle,),
    "cuStreamBeginCapture_v2": (Handle, ctypes.c_int),
    "cuStreamEndCapture": (Handle, ctypes.POINTER(Handle)),
    "cuStreamGetCaptureInfo_v2": (
        Handle, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(Handle), ctypes.POINTER(ctypes.POINTER(Handle)),
        ctypes.POINTER(ctypes.c_size_t),
    ),
    "cuStreamUpdateCaptureDependencies": (
        Handle, ctypes.POINTER(Handle), ctypes.c_size_t, ctypes.c_uint,
    ),
    "cuGraphInstantiateWithFlags": (ctypes.POINTER(Handle), Handle, ctypes.c_ulonglong),
    "cuGraphLaunch": (Handle, Handle),
    "cuGraphDestroy": (Handle,),
    "cuGraphExecDestroy": (Handle,),
    "cuEventCreate": (ctypes.POINTER(Handle), ctypes.c_uint),
    "cuEventRecord": (Handle, Handle),
    "cuEventElapsedTime": (ctypes.POINTER(ctypes.c_float), Handle, Handle),
    "cuEventDestroy_v2": (Handle,),
}  # fmt: skip
_SINCE_CUDA_12 = frozenset({"cuLaunchKernelEx"})
"""What older drivers lack, and only GPUs that they do not know are asked to do."""


def find_driver(library: str | Sequence[str] = LIBRARY, kind: type[Driver] | None = None) -> Driver:
    """Return the driver of this machine with its first GPU; of several names of its library, the
    first that there is.

    ArtifactError, in one sentence, where there is none.
    """
    kind = kind or Driver
    driver = kind(_open(library, kind.vendor))
    count = ctypes.c_int()
    if driver.refused("cuInit", 0) or driver.refused("cuDeviceGetCount", ctypes.byref(count)):
        raise _no_gpu(kind.vendor, f"its {kind.vendor} driver does not start")
    if count.value < 1:
        raise _no_gpu(kind.vendor, f"its {kind.vendor} driver sees no GPU")
    driver.activate()
    return driver


def _open(library: str | Sequence[str], vendor: str) -> ctypes.CDLL:
    for name in (library,) if isinstance(library, str) else library:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise _no_gpu(vendor, f"no {vendor} driver is installed")


def _no_gpu(vendor: str, reason: str) -> ArtifactError:
    return ArtifactError(
        f"this artifact runs on an {vendor} GPU, and this machine has none ({reason}): load it "
        "where there is one, or compile the model for cpu"
    )


@dataclass(frozen=True)
class Function:
    """A kernel that is loaded: what to launch, the threads of a block, its shared memory."""

    handle: Handle
    threads: int
    shared: int


class Driver:
    """The first GPU, and one stream on which everything runs in order."""

    vendor: ClassVar[str] = "NVIDIA"
    wave: ClassVar[int] = 32
    """Threads of a warp."""
    symbols: ClassVar[Mapping[str, str]] = {name: name for name in _SIGNATURES}
    """What the library calls a function; what is not there is never asked for."""
    others: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Functions that take other arguments than CUDA's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._calls: dict[str, Any] = {}
        for name, symbol in self.symbols.items():
            if name not in _SINCE_CUDA_12 or hasattr(library, symbol):
                types = self.others.get(name, _SIGNATURES[name])
                self._calls[name] = self.symbol(library, symbol, types)

    def symbol(self, library: ctypes.CDLL, name: str, types: tuple[Any, ...]) -> Any:
        """Return a function of the library. Raises ArtifactError where it lacks it."""
        try:
            call = getattr(library, name)
        except AttributeError:
            raise _no_gpu(self.vendor, f"its driver lacks {name}") from None
        call.argtypes, call.restype = types, ctypes.c_int
        return call

    # ---- calls

    def refused(self, name: str, *arguments: Any) -> int:
        """Call a function; return its error, 0 for none."""
        return int(self._calls[name](*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises ArtifactError where it fails."""
        error = self.refused(name, *arguments)
        if error:
            raise ArtifactError(f"the GPU refused {self.symbols[name]}: {self.reason(error)}")

    def reason(self, error: int) -> str:
        """Return what the driver says of an error."""
        text = ctypes.c_char_p()
        self._calls["cuGetErrorString"](error, ctypes.byref(text))
        said = (text.value or b"unknown error").decode(errors="replace")
        return f"{said} (error {error})"

    # ---- the device

    @cached_property
    def _context(self) -> Handle:
        context = Handle()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        return context

    def activate(self) -> None:
        """Make the device current in this thread, which every thread must that uses it."""
        self.call("cuCtxSetCurrent", self._context)

    @cached_property
    def stream(self) -> Handle:
        stream = Handle()
        self.call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return stream

    def attribute(self, number: int) -> int:
        """Ask for a fact about the device."""
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, 0)
        return value.value

    @cached_property
    def capability(self) -> int:
        """The compute capability: 90 for 9.0."""
        return 10 * self.attribute(_MAJOR) + self.attribute(_MINOR)

    @property
    def architecture(self) -> str:
        """What the card's instruction set is called: "sm_90"."""
        return f"sm_{self.capability}"

    def rank(self, architecture: str) -> tuple[bool, int] | None:
        """Say how well code for an architecture suits this GPU, the highest being the best: its
        own, an older one's of the same generation, or what the driver translates. None: not."""
        kind, _, number = architecture.rpartition("_")
        built, here = int(number) if kind in ("sm", "ptx") else 0, self.capability
        # From 9.0 on, machine code uses what only its own architecture has.
        same = built == here or (built < 90 and built // 10 == here // 10 and built <= here)
        fits = (kind == "sm" and same) or (kind == "ptx" and built <= here)
        return (kind == "sm", built) if fits else None

    @cached_property
    def most_shared(self) -> int:
        """The most shared memory of a block, in bytes."""
        return self.attribute(_SHARED)

    @cached_property
    def name(self) -> str:
        """What the card is called."""
        text = ctypes.create_string_buffer(_NAME_BYTES)
        self.call("cuDeviceGetName", text, _NAME_BYTES, 0)
        return text.value.decode(errors="replace")

    # ---- memory

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes on the device, a multiple of 256."""
        address = ctypes.c_uint64()
        error = self.refused("cuMemAlloc_v2", ctypes.byref(address), max(size, 1))
        if error == _OUT_OF_MEMORY:
            raise ArtifactError(f"the GPU {self.name} has no {size / 2**30:.2f} GiB of memory left")
        if error:
            raise ArtifactError(f"the GPU gave no memory: {self.reason(error)}")
        return address.value

    def allocate_host(self, size: int) -> int:
        """Return the address of `size` bytes of this machine that the device copies from fast."""
        address = Handle()
        self.call("cuMemHostAlloc", ctypes.byref(address), max(size, 1), 0)
        return address.value or 0

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        self.call("cuStreamSynchronize", self.stream)

    # ---- code

    def load_function(self, image: bytes, name: str, threads: int, shared: int) -> Function:
        """Load a module and return one of its kernels."""
        module, function = Handle(), Handle()
        self.call("cuModuleLoadData", ctypes.byref(module), image)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        self._allow_shared(function, shared)
        return Function(function, threads, shared)

    def _allow_shared(self, function: Handle, shared: int) -> None:
        """Let the launches of a kernel have so much shared memory."""
        if shared > _STATIC_LIMIT:
            self.call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared)

    def launch(self, function: Function, grid: Sequence[int], arguments: Any) -> None:
        """Put a launch on the stream; `arguments` is an array of addresses of the arguments."""
        self.call(
            "cuLaunchKernel", function.handle, *grid, function.threads, 1, 1, function.shared,
            self.stream, arguments, None,
        )  # fmt: skip

    def launch_beside(self, function: Function, grid: Sequence[int], arguments: Any) -> None:
        """Put a launch on the stream that may begin before the one in front has ended: its kernel
        waits by itself."""
        value = _Attribute(kind=_BESIDE)
        value.value[0] = 1
        wanted = _Configuration(
            tuple(grid), (function.threads, 1, 1), function.shared, self.stream,
            ctypes.pointer(value), 1,
        )  # fmt: skip
        self.call("cuLaunchKernelEx", ctypes.byref(wanted), function.handle, arguments, None)

    def begin_capture(self) -> None:
        """Record what follows on the stream instead of running it."""
        self.call("cuStreamBeginCapture_v2", self.stream, _THREAD_LOCAL)

    def wait_for(self, nodes: Sequence[int]) -> None:
        """Let what is recorded next wait for these nodes, and for no others."""
        array = (Handle * max(1, len(nodes)))(*nodes)
        self.call(
            "cuStreamUpdateCaptureDependencies", self.stream, array, len(nodes), _SET_DEPENDENCIES
        )

    def recorded(self) -> list[int]:
        """Return the nodes that what is recorded next would wait for: what was recorded last."""
        status, number, graph = ctypes.c_int(), ctypes.c_uint64(), Handle()
        nodes, count = ctypes.POINTER(Handle)(), ctypes.c_size_t()
        self.call(
            "cuStreamGetCaptureInfo_v2", self.stream, ctypes.byref(status), ctypes.byref(number),
            ctypes.byref(graph), ctypes.byref(nodes), ctypes.byref(count),
        )  # fmt: skip
        return [nodes[i] or 0 for i in range(count.value)]

    def end_capture(self) -> Handle:
        """Return what was recorded, ready to be launched as one."""
        graph, ready = Handle(), Handle()
        self.call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        self.call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, 0)
        self.call("cuGraphDestroy", graph)
        return ready

    def launch_graph(self, graph: Handle) -> None:
        """Run what was recorded."""
        self.call("cuGraphLaunch", graph, self.stream)

    # ---- time

    def event(self) -> Handle:
        """Return a moment that the stream can note."""
        event = Handle()
        self.call("cuEventCreate", ctypes.byref(event), 0)
        return event

    def record(self, event: Handle) -> None:
        """Note the moment at which the stream comes here."""
        self.call("cuEventRecord", event, self.stream)

    def seconds_between(self, start: Handle, stop: Handle) -> float:
        """Return the time between two noted moments."""
        milliseconds = ctypes.c_float()
        self.call("cuEventElapsedTime", ctypes.byref(milliseconds), start, stop)
        return milliseconds.value / 1e3
