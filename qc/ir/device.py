"""Where torch computes: the device that operations make their tensors on, and moving values there.

What an operation makes itself (positions, masks, identities) lies on torch's default device; that
is set around a computation, for one thread, so that no meaning of an operation has to name it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from qc.errors import InputError
from qc.ir.weights.weight import Term

CPU = torch.device("cpu")
KINDS = ("cpu", "cuda")

Value = TypeVar("Value")


def parse_device(name: str | torch.device) -> torch.device:
    """Read "cpu", "cuda", "cuda:1", or "auto": a GPU where torch has one. InputError for a device
    that torch does not have here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in KINDS:
        raise InputError(f"unknown device {str(name)!r}: expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise InputError(
            f"there is no device {device}: torch {torch.__version__} sees {count} CUDA devices; "
            "expected cpu, or a torch that was built for this GPU"
        )
    return device


def computing_on(device: torch.device) -> AbstractContextManager[object]:
    """Let this thread make its tensors on a device."""
    return nullcontext() if device == here() else device


def here() -> torch.device:
    """Return the device that this thread computes on."""
    found: torch.device = torch.get_default_device()
    return found


def moved(value: Value, device: torch.device) -> Value:
    """Return a tensor, or a list of such, on a device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)  # type: ignore[return-value]
    if isinstance(value, list):
        return [moved(each, device) for each in value]  # type: ignore[return-value]
    if isinstance(value, Term):
        stored = {name: array.to(device) for name, array in value.stored.items()}
        return replace(value, stored=stored)
    return value
