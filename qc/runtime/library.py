"""Load the compiled kernels of an artifact: model.so, through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from pathlib import Path

from qc.errors import ArtifactError, InputError

__all__ = ["Library"]

_ABI = 1  # QC_ABI_VERSION of native/qcrt.h
_PREFIX = "__tvm_ffi_"


class Library:
    """Hold an opened model.so. It stays loaded until the process ends: its threads live in it."""

    def __init__(self, handle: ctypes.CDLL, path: Path) -> None:
        self.path = path
        self._handle = handle
        try:
            self.run = handle.qc_run
            self.profile = handle.qc_profile
            self._last_error = handle.qc_last_error
            self._set_threads = handle.qc_set_threads
            version = handle.qc_abi_version()
        except AttributeError as error:
            raise ArtifactError(f"{path.name} is no library of a qc artifact: {error}") from None
        if version != _ABI:
            raise ArtifactError(
                f"{path.name} has the native interface {version}; this qc has {_ABI}: "
                "compile the model again"
            )
        self.run.restype = self.profile.restype = ctypes.c_int64
        self.run.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self.profile.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        self._last_error.restype = ctypes.c_char_p
        default = os.environ.get("QC_NUM_THREADS", "")  # changes the speed, never a result
        self._set_threads(int(default) if default.isdecimal() else 0)

    @classmethod
    def open(cls, path: Path, sha256: str) -> Library:
        """Load the library at `path` if its content is what `sha256` says. Raises ArtifactError."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
        try:
            return _open_descriptor(descriptor, path, sha256)
        except BaseException:
            os.close(descriptor)
            raise

    def kernel_address(self, name: str) -> int:
        """Return the address of a kernel. Raises ArtifactError."""
        try:
            function = self._handle[_PREFIX + name]
        except AttributeError:
            raise ArtifactError(f"{self.path.name} has no kernel {name!r}") from None
        return ctypes.cast(function, ctypes.c_void_p).value or 0

    def last_error(self) -> str:
        """Return what the kernel that failed on this thread said."""
        raw: bytes = self._last_error()
        return raw.decode(errors="replace") or "the kernel gave no reason"

    def request_tiles(self) -> None:
        """Ask the system for AMX tiles: to be done once, before kernels run that use them.

        ArtifactError where it refuses.
        """
        try:
            refused = int(self._handle.qc_request_tiles())
        except AttributeError:
            raise ArtifactError(f"{self.path.name} cannot ask the system for AMX tiles") from None
        if refused:
            raise ArtifactError(
                f"the system refuses AMX tiles to this process ({os.strerror(refused)}; Linux has "
                "them from 5.16 on): compile the model for cpu:avx512-vnni"
            )

    def set_threads(self, count: int | None) -> int:
        """Use `count` threads, or one for each CPU of this process; return how many that is."""
        if count is not None and count < 1:
            raise InputError(f"a model needs at least 1 thread, not {count}")
        return int(self._set_threads(count or 0))


# dlopen returns the library it has if a path or an inode is the same, so an artifact that replaced
# another at the same path would run the old code. Opening by descriptor, and keeping that
# descriptor, makes both unique; it also makes sure that what was hashed is what is loaded.
_opened: dict[tuple[int, int], tuple[str, Library]] = {}
_opening = threading.Lock()


def _open_descriptor(descriptor: int, path: Path, sha256: str) -> Library:
    with open(descriptor, "rb", closefd=False) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ArtifactError(f"{path} is corrupt: its SHA-256 is not that of the manifest")
    status = os.fstat(descriptor)
    with _opening:
        known = _opened.get((status.st_dev, status.st_ino))
        if known is not None:
            if known[0] != found:
                raise ArtifactError(f"{path} was changed in place while it is loaded")
            os.close(descriptor)
            return known[1]
        try:
            handle = ctypes.CDLL(f"/proc/self/fd/{descriptor}", mode=os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError as error:
            reason = str(error).replace(f"/proc/self/fd/{descriptor}", path.name)
            raise ArtifactError(f"cannot load {path}: {reason}") from None
        library = Library(handle, path)
        _opened[status.st_dev, status.st_ino] = (found, library)
        return library
