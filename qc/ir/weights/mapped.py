"""Arrays that lie in files and are in memory only while somebody holds them.

`MappedTensor` is a place in a file; `open()` maps that place and nothing else, and the pages leave
the memory of the process with the last reference to the tensor. Checkpoints are read so, and what
a pass makes beyond its share of memory is put aside so.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from threading import Lock
from typing import BinaryIO

import torch
from torch import Tensor

from qc.ir.weights.weight import Term, TermFormat, Weight

ALIGNMENT = 64
"""Bytes: a cache line."""


@dataclass(frozen=True)
class MappedTensor:
    """A tensor at byte `start` of a file that stays open; two are equal at the same place."""

    file: BinaryIO
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def open(self) -> Tensor:
        """Map the tensor, copy-on-write: the file never changes."""
        if not self.bytes:
            return torch.empty(self.shape, dtype=self.dtype)
        offset = self.start % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(
            self.file.fileno(),
            self.bytes + offset,
            access=mmap.ACCESS_COPY,
            offset=self.start - offset,
        )
        flat = torch.frombuffer(pages, dtype=self.dtype, count=prod(self.shape), offset=offset)
        return flat.view(self.shape)

    def rows(self, first: int, count: int) -> MappedTensor:
        """Return the place of some rows."""
        row_bytes = self.bytes // max(1, self.shape[0])
        start = self.start + first * row_bytes
        return MappedTensor(self.file, start, (count, *self.shape[1:]), self.dtype)


class MappedArrays(Mapping[str, Tensor]):
    """The stored arrays of a term, each mapped anew when it is asked for."""

    def __init__(self, places: Mapping[str, MappedTensor]) -> None:
        self.places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name].open()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def place_of(arrays: Mapping[str, Tensor], name: str) -> Tensor | MappedTensor:
    """Return an array, or where it lies: what to ask for facts, without mapping it."""
    return arrays.places[name] if isinstance(arrays, MappedArrays) else arrays[name]


def memory_of(tensor: Tensor | MappedTensor) -> tuple[object, ...]:
    """Return what is equal for tensors that are the same memory, or the same place in a file.

    The addresses of maps say nothing: one follows another at the same address.
    """
    if isinstance(tensor, MappedTensor):
        return (tensor,)
    storage = (tensor.untyped_storage()._cdata, tensor.storage_offset())
    return (*storage, tuple(tensor.shape), tensor.stride(), tensor.dtype)


def mapped_term(format: TermFormat, shape: tuple[int, ...], arrays: MappedArrays) -> Term:
    """Return a term whose arrays stay in a file; ValueError where they do not fit its format."""
    format.check(shape, arrays)
    return Term(format, shape, arrays)


@dataclass(eq=False)
class Aside:
    """Put weights into a temporary file once those kept in memory fill `budget` bytes.

    The file has no name: it is gone when nothing refers to it.
    """

    budget: int
    kept: int = 0
    end: int = 0
    file: BinaryIO | None = None
    lock: Lock = field(default_factory=Lock)

    def place(self, weight: Weight) -> Weight:
        """Return the weight, or one with equal arrays that lie in the file."""
        size = weight.bits // 8
        with self.lock:
            if self.kept + size <= self.budget:
                self.kept += size
                return weight
        terms = tuple(
            mapped_term(term.format, term.shape, self.write(term.stored)) for term in weight.terms
        )
        return Weight(weight.name, weight.shape, terms, weight.dtype)

    def write(self, arrays: Mapping[str, Tensor]) -> MappedArrays:
        """Append arrays to the file and return their places."""
        places = {}
        for name, array in arrays.items():
            array = array.contiguous()
            size = array.numel() * array.element_size()
            with self.lock:
                if self.file is None:
                    self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - see class
                file, start = self.file, self.end
                self.end += size + -size % ALIGNMENT
            if size:
                write_at(file, start, bytes_of(array))
            places[name] = MappedTensor(file, start, tuple(array.shape), array.dtype)
        return MappedArrays(places)


def write_at(file: BinaryIO, start: int, content: memoryview) -> None:
    """Write all bytes, however many calls the system needs (one takes 2 GiB at most)."""
    while content:
        written = os.pwrite(file.fileno(), content, start)
        start, content = start + written, content[written:]


def bytes_of(array: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return array.reshape(-1).view(torch.uint8).numpy().data
