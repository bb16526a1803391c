"""Name the element types of an artifact, once for the manifest, safetensors, numpy and DLPack."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["DTYPES", "SAFETENSORS", "DType"]


@dataclass(frozen=True, slots=True)
class DType:
    """Describe one element type.

    numpy has no bfloat16: such values are held as uint16.
    """

    name: str
    safetensors: str
    numpy: np.dtype[np.generic]
    dlpack_code: int
    """0 int, 1 uint, 2 float, 4 bfloat, 6 bool."""

    @property
    def bytes(self) -> int:
        return self.numpy.itemsize

    @property
    def is_integer(self) -> bool:
        return self.dlpack_code in (0, 1)

    @property
    def is_float(self) -> bool:
        return self.dlpack_code in (2, 4)


_ROWS = (
    ("f64", "F64", "<f8", 2),
    ("f32", "F32", "<f4", 2),
    ("f16", "F16", "<f2", 2),
    ("bf16", "BF16", "<u2", 4),
    ("i64", "I64", "<i8", 0),
    ("i32", "I32", "<i4", 0),
    ("i16", "I16", "<i2", 0),
    ("i8", "I8", "|i1", 0),
    ("u64", "U64", "<u8", 1),
    ("u32", "U32", "<u4", 1),
    ("u16", "U16", "<u2", 1),
    ("u8", "U8", "|u1", 1),
    ("bool", "BOOL", "|b1", 6),
)

DTYPES: dict[str, DType] = {
    name: DType(name, tag, np.dtype(form), code) for name, tag, form, code in _ROWS
}
"""By the name that a manifest uses."""

SAFETENSORS: dict[str, DType] = {dtype.safetensors: dtype for dtype in DTYPES.values()}
"""By the tag that a safetensors header uses."""
