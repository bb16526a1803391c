"""Write weights.qcw: what qc/runtime/device/weights.c maps and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qc.runtime.safetensors_file import TensorSource

FORMAT = 1
MAGIC = b"QCWEIGHT"
LINE = 64
HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("format", "<u4"),
        ("entries", "<u4"),
        ("bytes", "<u8"),
        ("identity", "V32"),
        ("checksum", "<u8"),
    ]
)
ENTRY = np.dtype(
    [("offset", "<u8"), ("bytes", "<u8"), ("checksum", "<u8"), ("kind", "<u4"), ("zero", "<u4")]
)
TENSOR, TEXT, CODE = 0, 1, 2
_LANES = 16
_ROWS = 1 << 16  # of lanes at once: bounds what a checksum needs
_OFFSET, _PRIME, _WORD = 0xCBF29CE484222325, 0x100000001B3, 0xFFFFFFFFFFFFFFFF


def write_weights(
    path: Path,
    identity: bytes,
    order: Sequence[str],
    tensors: Mapping[str, TensorSource],
    text: bytes | None,
    codes: Sequence[bytes] = (),
) -> None:
    """Write the tensors named by `order`, one in memory at a time, machine code for a GPU, and the
    text tables.

    `tensors` are written in their own order, in which they are computed.
    """
    count = len(order) + len(codes) + (text is not None)
    table = np.zeros(count, ENTRY)
    with open(path, "wb") as file:
        file.write(bytes(HEADER.itemsize + table.nbytes))
        written = {name: append(file, source.load()) for name, source in tensors.items()}
        for number, name in enumerate(order):
            table[number] = written[name]
        for number, code in enumerate(codes, len(order)):
            table[number] = append(file, np.frombuffer(code, np.uint8), CODE)
        if text is not None:
            table[-1] = append(file, np.frombuffer(text, np.uint8), TEXT)
        head = np.zeros(1, HEADER)
        head["magic"], head["format"], head["entries"] = MAGIC, FORMAT, count
        head["bytes"] = file.tell()
        head["identity"] = np.void(identity)
        head["checksum"] = header_checksum(head.tobytes(), table.tobytes())
        file.seek(0)
        file.write(head.tobytes() + table.tobytes())


def append(file: BinaryIO, array: NDArray[Any], kind: int = TENSOR) -> tuple[int, ...]:
    """Write an array at the next line; return its entry."""
    file.write(bytes(-file.tell() % LINE))
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    offset = file.tell()
    file.write(raw.data)
    return offset, raw.size, checksum(raw), kind, 0


def header_checksum(header: bytes, table: bytes) -> int:
    """Return the checksum of a header with zero for its checksum, and of its table."""
    first, second = (checksum(np.frombuffer(part, np.uint8)) for part in (header, table))
    return first ^ (3 * second & _WORD)


def checksum(raw: NDArray[np.uint8]) -> int:
    """Return the checksum of weights.c: sums of words in 16 lanes, and the sums of these sums."""
    rows = -(-raw.size // LINE)
    plain, nested = np.zeros(_LANES, np.uint32), np.zeros(_LANES, np.uint32)
    for start in range(0, rows, _ROWS):
        words = lanes_of(raw[start * LINE : (start + _ROWS) * LINE])
        left = (rows - start - np.arange(len(words))).astype(np.uint32)
        plain += words.sum(0, dtype=np.uint32)
        nested += (words * left[:, None]).sum(0, dtype=np.uint32)
    mixed = _OFFSET ^ raw.size
    for low, high in zip(plain.tolist(), nested.tolist(), strict=True):
        mixed = ((mixed ^ (high << 32 | low)) * _PRIME) & _WORD
    return mixed


def lanes_of(raw: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """View bytes as rows of 16 words, padded with zeros."""
    missing = -raw.size % LINE
    padded = np.concatenate([raw, np.zeros(missing, np.uint8)]) if missing else raw
    return padded.view("<u4").reshape(-1, _LANES)
