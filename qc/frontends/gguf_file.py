"""A strict reader of GGUF files: every count, length and offset is checked against the file.

Layout (version 2 and 3, little endian): "GGUF", version u32, tensor count u64, key count u64; the
keys as name, type, value; the tensors as name, axes u32, sizes u64, type u32, offset u64; padding
up to the alignment; the data. Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qc.errors import ModelError

VERSIONS = (2, 3)
NAME_BYTES, AXES, ALIGNMENT = 65535, 4, 32
"""Limits of the format, and its default alignment."""

NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
           10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
U32, STRING, ARRAY = 4, 8, 9
"""Types of values."""

PLAIN = {"F16": np.float16, "F32": np.float32, "F64": np.float64,
         "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}  # fmt: skip
"""Types of tensors whose elements numpy knows; the others are blocks of bytes."""

Array = npt.NDArray[Any]


class Field(NamedTuple):
    """The value of a key as gguf's own reader shows it: parts[i] for i in data are its elements."""

    types: list[int]
    parts: list[Array]
    data: range


class StoredTensor(NamedTuple):
    """A tensor as gguf's own reader shows it; `data` is a view of the mapped file."""

    name: str
    tensor_type: GGMLQuantizationType
    data: Array


@dataclass(frozen=True)
class GgufFile:
    """What a file holds."""

    fields: dict[str, Field]
    tensors: list[StoredTensor]


@dataclass
class Cursor:
    """A position in the mapped file that never leaves it."""

    content: Array
    position: int = 0
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.end = len(self.content)

    def take(self, size: int) -> Array:
        """Return the next `size` bytes."""
        if size > self.end - self.position:
            raise ValueError(f"it ends at byte {self.end}, within its header")
        start, self.position = self.position, self.position + size
        return self.content[start : self.position]

    def number(self, code: str) -> Any:
        """Return the next number, by its struct code."""
        return struct.unpack("<" + code, self.take(struct.calcsize(code)).tobytes())[0]

    def count(self, of: str, smallest: int) -> int:
        """Return how many things of at least `smallest` bytes each follow."""
        count: int = self.number("Q")
        if count > (self.end - self.position) // smallest:
            raise ValueError(f"it announces {count} {of}, more than fit into the file")
        return count

    def string(self) -> Array:
        """Return the bytes of the next string, which are valid UTF-8."""
        text = self.take(self.count("characters", 1))
        text.tobytes().decode("utf-8")
        return text

    def name(self) -> str:
        """Return the next name."""
        text = self.string().tobytes()
        if not 0 < len(text) <= NAME_BYTES:
            raise ValueError(f"it has a name of {len(text)} bytes")
        return text.decode("utf-8")


def read_gguf(path: Path) -> GgufFile:
    """Read and check a file; ModelError says in one sentence what is wrong with it."""
    try:
        if not path.is_file():
            raise ModelError(f"there is no file {path}")
        if not path.stat().st_size:
            raise ValueError("it is empty")
        return parse(Cursor(np.memmap(path, dtype=np.uint8, mode="r")))
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path} is no valid GGUF file: it holds text that is not UTF-8"
        ) from error
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} is no valid GGUF file: {error}") from error


def parse(cursor: Cursor) -> GgufFile:
    """Parse a whole file; ValueError where it breaks a rule."""
    if cursor.take(4).tobytes() != b"GGUF":
        raise ValueError("it does not start with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"it has version {version}; versions 2 and 3 are known")
    tensor_count, key_count = cursor.count("tensors", 24), cursor.count("keys", 13)
    fields = unique("key", key_count, lambda: (cursor.name(), read_value(cursor)))
    infos = unique("tensor", tensor_count, lambda: read_info(cursor))
    alignment = alignment_of(fields)
    data = cursor.content[-(-cursor.position // alignment) * alignment :]
    check_overlaps(infos)
    tensors = [map_tensor(data, alignment, name, *info) for name, info in infos.items()]
    return GgufFile(fields, tensors)


def unique(kind: str, count: int, read: Callable[[], tuple[str, Any]]) -> dict[str, Any]:
    """Read `count` named things; ValueError where a name comes twice."""
    found: dict[str, Any] = {}
    for _ in range(count):
        name, value = read()
        if name in found:
            raise ValueError(f"it has the {kind} {name!r} twice")
        found[name] = value
    return found


def read_value(cursor: Cursor) -> Field:
    """Read the value of a key."""
    kind = cursor.number("I")
    if kind != ARRAY:
        return Field([kind], [read_element(cursor, kind)], range(1))
    kind = cursor.number("I")
    if kind not in NUMBERS:
        if kind != STRING:
            raise ValueError(f"it has an array of the unknown type {kind}")
        strings = [cursor.string() for _ in range(cursor.count("strings", 8))]
        return Field([ARRAY, kind], strings, range(len(strings)))
    size = np.dtype(NUMBERS[kind]).itemsize
    values = cursor.take(cursor.count("numbers", size) * size).view(NUMBERS[kind])
    return Field([ARRAY, kind], list(values.reshape(-1, 1)), range(len(values)))


def read_element(cursor: Cursor, kind: int) -> Array:
    """Read a string, or a number as an array of one."""
    if kind == STRING:
        return cursor.string()
    if kind not in NUMBERS:
        raise ValueError(f"it has a value of the unknown type {kind}")
    return cursor.take(np.dtype(NUMBERS[kind]).itemsize).view(NUMBERS[kind])


Info = tuple[tuple[int, ...], GGMLQuantizationType, int, int]
"""Sizes (the innermost first), type, offset, bytes."""


def read_info(cursor: Cursor) -> tuple[str, Info]:
    """Read where a tensor lies."""
    name, axes = cursor.name(), cursor.number("I")
    if not 1 <= axes <= AXES:
        raise ValueError(f"the tensor {name} has {axes} axes")
    sizes = tuple(cursor.number("Q") for _ in range(axes))
    code, offset = cursor.number("I"), cursor.number("Q")
    if code not in GGMLQuantizationType.__members__.values():
        raise ValueError(f"the tensor {name} has the unknown type {code}")
    kind = GGMLQuantizationType(code)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not all(sizes) or sizes[0] % block:
        raise ValueError(f"the tensor {name} has sizes {list(sizes)}, impossible for {kind.name}")
    return name, (sizes, kind, offset, math.prod(sizes) // block * block_bytes)


def alignment_of(fields: dict[str, Field]) -> int:
    """Return the alignment of the data."""
    if "general.alignment" not in fields:
        return ALIGNMENT
    stated = fields["general.alignment"]
    if stated.types != [U32]:
        raise ValueError("its general.alignment is no u32")
    value = int(stated.parts[0][0])
    if not 8 <= value <= 1 << 16 or value & (value - 1):
        raise ValueError(f"its alignment is {value}, which is no power of two from 8 to 65536")
    return value


def check_overlaps(infos: dict[str, Info]) -> None:
    """Refuse tensors that share bytes."""
    end = 0
    for name, (_, _, offset, size) in sorted(infos.items(), key=lambda item: item[1][2]):
        if offset < end:
            raise ValueError(f"the tensor {name} overlaps another")
        end = offset + size


def map_tensor(
    data: Array, alignment: int, name: str, sizes: tuple[int, ...], kind: GGMLQuantizationType,
    offset: int, size: int,
) -> StoredTensor:  # fmt: skip
    """View a tensor in the mapped file: numpy's element type, or rows of bytes."""
    if offset % alignment or offset + size > len(data):
        raise ValueError(f"the tensor {name} does not lie within the file")
    content = data[offset : offset + size]
    rows = tuple(reversed(sizes[1:]))
    if kind.name in PLAIN:
        return StoredTensor(name, kind, content.view(PLAIN[kind.name]).reshape(*rows, sizes[0]))
    return StoredTensor(name, kind, content.reshape(*rows, -1))
