"""Take arrays of any kind from a user, and give the same kind back, without importing torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qc.errors import InputError
from qc.runtime.manifest import Value

__all__ = ["as_array", "give_back"]


def _is_torch(thing: object) -> bool:
    return type(thing).__module__.partition(".")[0] == "torch"


def as_array(given: Any, value: Value) -> NDArray[Any]:
    """Return `given` (list, numpy array, torch tensor, ...) with the dtype of an input value.

    Raises InputError if the numbers would not survive: floats for an integer input, integers that
    are out of range.
    """
    try:
        if _is_torch(given):
            tensor = given.detach().cpu()
            array: NDArray[Any] = (
                tensor.float() if "bfloat16" in str(tensor.dtype) else tensor
            ).numpy()
        elif hasattr(given, "__dlpack__") and not isinstance(given, np.ndarray | np.generic):
            array = np.from_dlpack(given)
        else:
            array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise InputError(f"input {value.name!r} cannot be read as an array: {error}") from None
    wanted = value.element
    kinds = "iu" if wanted.is_integer else "iuf" if wanted.is_float else "b"
    if array.dtype.kind not in kinds:
        expected = {"iu": "integers", "iuf": "numbers", "b": "booleans"}[kinds]
        raise InputError(f"input {value.name!r} takes {expected}, not {array.dtype}")
    if wanted.is_integer and array.size:
        limits = np.iinfo(wanted.numpy.name)
        least, greatest = int(array.min()), int(array.max())
        low, high = (limits.min, limits.max) if value.below is None else (0, value.below - 1)
        if least < low or greatest > high:
            wrong = least if least < low else greatest
            raise InputError(f"input {value.name!r} holds {wrong}; it takes {low} to {high}")
    if value.dtype == "bf16":  # round to nearest even, on the bits
        bits = array.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return array.astype(wanted.numpy, copy=False)


def give_back(result: NDArray[Any], like: Sequence[Any]) -> Any:
    """Return `result` as a torch tensor if any of `like` is one, else as it is."""
    if any(_is_torch(each) for each in like):
        return sys.modules["torch"].from_numpy(np.asarray(result, order="C"))
    return result
