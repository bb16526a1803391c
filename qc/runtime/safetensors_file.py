"""Read and write safetensors files: memory-mapped, bounds-checked, 64-byte aligned.

A file is an 8-byte little-endian header length, a JSON header `{name: {dtype, shape,
data_offsets}}` and the data, without holes. Written files put every tensor on a multiple of 64
bytes, so that mapped tensors can be given to kernels as they are; the format forbids holes, so
explicit tensors named "__pad_N" fill them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qc.errors import ArtifactError, nearest
from qc.runtime.dtypes import DTYPES, SAFETENSORS, DType
from qc.runtime.strict_json import parse_object

__all__ = ["ALIGNMENT", "SafetensorsFile", "TensorEntry", "TensorSource", "write_safetensors"]

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector load."""

_MOST_HEADER_BYTES = 100_000_000  # the bound of the safetensors library
_MOST_DIMENSIONS = 32  # of numpy before 2.0
_PADDING = "__pad_"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Locate one tensor: `start` and `end` are byte offsets in the file."""

    dtype: DType
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile(Mapping[str, NDArray[Any]]):
    """Map a safetensors file and give its tensors as numpy views, without copying.

    The views are private copies-on-write: writing to one changes neither the file nor other maps.
    bfloat16 comes as uint16. Padding tensors are hidden. Raises ArtifactError for any malformed
    file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.entries, self.metadata = _read_header(file, size, self.path.name)
                self._bytes = np.memmap(file, dtype=np.uint8, mode="c")
        except OSError as error:
            raise ArtifactError(f"cannot read {self.path}: {error.strerror or error}") from None

    def __getitem__(self, name: str) -> NDArray[Any]:
        entry = self.entries.get(name)
        if entry is None:
            hint = nearest(name, self.entries)
            raise ArtifactError(f"{self.path.name} has no tensor {name!r}{hint}")
        raw = self._bytes[entry.start : entry.end].view(np.ndarray)
        return raw.view(entry.dtype.numpy).reshape(entry.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _read_header(
    file: BinaryIO, size: int, name: str
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read and check the header of a file of `size` bytes."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ArtifactError(f"{name} is cut off: {size} bytes hold no safetensors header")
    length = int.from_bytes(prefix, "little")
    if length > _MOST_HEADER_BYTES:
        raise ArtifactError(f"{name} announces a header of {length} bytes, more than 100 MB")
    if length > size - 8:
        raise ArtifactError(f"{name} is cut off: a header of {length} bytes in {size} bytes")
    header = parse_object(file.read(length), f"the header of {name}")

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ArtifactError(f"{name}: the metadata is not a table of texts")
    base = 8 + length
    entries = {
        tensor: _read_entry(tensor, record, base, size, name) for tensor, record in header.items()
    }
    end = base
    for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            fault = "overlaps the one before it" if entry.start < end else "leaves a hole before it"
            raise ArtifactError(f"{name}: tensor {tensor[:100]!r} {fault}")
        end = entry.end
    if end != size:
        raise ArtifactError(f"{name}: the tensors end at byte {end}, the file at {size}")
    return {k: v for k, v in entries.items() if not k.startswith(_PADDING)}, metadata


def _read_entry(tensor: str, record: object, base: int, size: int, file: str) -> TensorEntry:
    """Check one record of a header whose data starts at `base` in a file of `size` bytes."""
    where = f"{file}: tensor {tensor[:100]!r}"
    if not isinstance(record, dict) or record.keys() != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{where} needs exactly dtype, shape and data_offsets")
    tag, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    dtype = SAFETENSORS.get(tag) if isinstance(tag, str) else None
    if dtype is None:
        raise ArtifactError(f"{where} has the unknown dtype {str(tag)[:40]!r}")
    if not _are_counts(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ArtifactError(f"{where} has no proper shape")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ArtifactError(f"{where} has no proper data_offsets")
    start, end = offsets[0] + base, offsets[1] + base
    if not base <= start <= end <= size:
        raise ArtifactError(f"{where} lies outside the file ({start}..{end} of {size} bytes)")
    needed = prod(shape) * dtype.bytes
    if needed != end - start:
        raise ArtifactError(f"{where} needs {needed} bytes for its shape and has {end - start}")
    return TensorEntry(dtype, tuple(shape), start, end)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(
        type(each) is int and 0 <= each < 2**63 for each in value
    )


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Promise a tensor that `load` gives when its turn to be written has come.

    `dtype` is a manifest name ("f16"); `load` returns an array of that many bytes (bf16 as uint16).
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], NDArray[Any]]

    @classmethod
    def of(cls, array: NDArray[Any]) -> TensorSource:
        """Wrap an array that is already in memory."""
        for name, dtype in DTYPES.items():
            if dtype.numpy == array.dtype and name != "bf16":
                return cls(name, array.shape, lambda: array)
        raise ArtifactError(f"safetensors cannot hold arrays of {array.dtype}")

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].bytes


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorSource | NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write `tensors` in order, one in memory at a time; return the bytes of the file.

    Raises ArtifactError if a source gives another dtype or shape than it promised.
    """
    sources = {
        name: each if isinstance(each, TensorSource) else TensorSource.of(each)
        for name, each in tensors.items()
    }
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, source in sources.items():
        if name.startswith("__"):
            raise ArtifactError(f"a tensor may not be called {name!r}: names with __ are reserved")
        header[name] = _record(source.dtype, source.shape, offset, source.bytes)
        offset += source.bytes
        gap = -offset % ALIGNMENT
        if gap:
            header[f"{_PADDING}{len(header)}"] = _record("u8", (gap,), offset, gap)
            offset += gap

    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > _MOST_HEADER_BYTES:
        raise ArtifactError(f"{len(sources)} tensors need a header of more than 100 MB")
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, source in sources.items():
            array = np.ascontiguousarray(source.load())
            expected = DTYPES[source.dtype].numpy
            if array.dtype != expected or array.size * expected.itemsize != source.bytes:
                raise ArtifactError(
                    f"tensor {name!r} was promised as {source.dtype}{list(source.shape)} "
                    f"and came as {array.dtype}{list(array.shape)}"
                )
            file.write(array.reshape(-1).view(np.uint8).data)
            file.write(bytes(-source.bytes % ALIGNMENT))
        return file.tell()


def _record(dtype: str, shape: tuple[int, ...], offset: int, size: int) -> dict[str, object]:
    return {
        "dtype": DTYPES[dtype].safetensors,
        "shape": list(shape),
        "data_offsets": [offset, offset + size],
    }
