"""Packages of the tiny llama, built once a process, and their library through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qc.compiler import build
from tests.tiny_llama import llama_folder


@cache
def package(base: Path, target: str = "cpu-w4") -> Path:
    """Build the tiny llama for a target."""
    place = base / f"package-{target.replace(':', '_')}"
    build(llama_folder(base), target, place)
    return place


class Library:
    """The functions of a libmodel.so. `call` raises AssertionError with the library's sentence."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.qcm_error.restype = ctypes.c_char_p
        self.library.qcm_logits.restype = ctypes.POINTER(ctypes.c_float)
        for name in ("qcm_longest_piece", "qcm_memory"):
            getattr(self.library, name).restype = ctypes.c_size_t
        self.library.qcm_length.restype = ctypes.c_int64

    @property
    def error(self) -> str:
        """The sentence of the last call that failed on this thread."""
        return str(self.library.qcm_error().decode())

    def status(self, name: str, *arguments: Any) -> int:
        """Call a function."""
        return int(getattr(self.library, name)(*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that must work."""
        assert self.status(name, *arguments) == 0, self.error

    def open(self, weights: Path, flags: int = 0, abi: int = 1) -> ctypes.c_void_p:
        """Open weights."""
        model = ctypes.c_void_p()
        self.call("qcm_open", bytes(weights), abi, flags, ctypes.byref(model))
        return model

    def start(self, model: ctypes.c_void_p, context: int = 0) -> ctypes.c_void_p:
        """Start a session."""
        session = ctypes.c_void_p()
        self.call("qcm_start", model, ctypes.c_int64(context), ctypes.byref(session))
        return session

    def prefill(self, session: ctypes.c_void_p, ids: Sequence[int]) -> int:
        """Append tokens; return the status."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        return self.status("qcm_prefill", session, tokens, ctypes.c_int64(len(ids)))

    def logits(self, session: ctypes.c_void_p, vocabulary: int) -> np.ndarray[Any, Any]:
        """Copy the logits."""
        return np.ctypeslib.as_array(self.library.qcm_logits(session), (vocabulary,)).copy()

    def choose(self, session: ctypes.c_void_p, sampling: Any = None) -> int:
        """Choose a token."""
        token = ctypes.c_int32()
        self.call("qcm_choose", session, sampling, ctypes.byref(token))
        return token.value

    def greedy(self, session: ctypes.c_void_p, ids: Sequence[int], count: int) -> list[int]:
        """Continue a prompt."""
        assert self.prefill(session, ids) == 0, self.error
        found = []
        for _ in range(count):
            found.append(self.choose(session))
            self.call("qcm_step", session, ctypes.c_int32(found[-1]))
        return found


class Sampling(ctypes.Structure):
    """qcm_sampling."""

    _fields_ = (
        ("temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("zero", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
    )
