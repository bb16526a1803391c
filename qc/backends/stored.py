"""The arrays of a lowered program, on their way into an artifact."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from qc.backends.artifact import Progress
from qc.backends.lowering import Lowered
from qc.ir.threads import side_by_side
from qc.ir.types import DTYPE_NAMES
from qc.runtime.safetensors_file import TensorSource


def tensor_sources(lowered: Lowered[Any], progress: Progress) -> Iterator[tuple[str, TensorSource]]:
    """Promise every stored array, computed shortly before its turn to be written comes."""
    promised = {v.tensor: v for v in lowered.values if v.tensor is not None}
    computed = side_by_side(lambda name: as_numpy(lowered.arrays[name]()), lowered.arrays)

    def load(name: str, number: int) -> np.ndarray[Any, Any]:
        progress("write weights", number / len(promised))
        written, array = next(computed)
        assert written == name, "arrays are written in the order in which they are computed"
        return array

    for number, name in enumerate(lowered.arrays):
        shape = tuple(int(d) for d in promised[name].shape)
        yield name, TensorSource(promised[name].dtype, shape, partial(load, name, number))


def as_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the bytes of a tensor as numpy, which lacks bfloat16."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    assert tensor.dtype in DTYPE_NAMES or tensor.dtype == torch.uint16
    return tensor.numpy()
