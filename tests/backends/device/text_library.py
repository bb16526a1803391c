"""The device's tokenizer alone: compiled for this machine, called through ctypes."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

from qc.backends.device.toolchain import DEVICE
from qc.backends.tvm.build import c_compiler

SHIM = """
#include <stdarg.h>
#include <stdio.h>
#include "failing.h"
#include "text.h"
char message[1024];
qcm_status fail(qcm_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return status;
}
size_t size_of_tables(void) { return sizeof(text_tables); }
size_t longest_of(const text_tables *tables) { return tables->longest; }
"""


def compile_text_library(folder: Path, *flags: str) -> ctypes.CDLL:
    """Compile the tokenizer's sources to a library in `folder`."""
    shim = folder / "shim.c"
    shim.write_text(SHIM)
    sources = [
        shim,
        *(DEVICE / f"{name}.c" for name in ("text", "patterns", "composing", "merging")),
    ]
    path = folder / "text.so"
    command = [
        *c_compiler(), "-std=gnu11", "-O2", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror",
        *flags, f"-I{DEVICE}", *map(str, sources), "-o", str(path),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path))
    library.size_of_tables.restype = ctypes.c_size_t
    library.longest_of.restype = ctypes.c_size_t
    library.text_decode.restype = ctypes.c_size_t
    library.compose.restype = ctypes.c_size_t
    return library


class DeviceText:
    """A tokenizer on the device's code."""

    def __init__(self, library: ctypes.CDLL, tables: bytes, vocabulary: int = 2**31 - 1) -> None:
        self.library = library
        self.content = ctypes.create_string_buffer(tables, len(tables))
        self.tables = ctypes.create_string_buffer(library.size_of_tables())
        self.status = library.text_open(
            self.content, ctypes.c_size_t(len(tables)), vocabulary, self.tables
        )

    @property
    def message(self) -> str:
        """What went wrong."""
        return (ctypes.c_char * 1024).in_dll(self.library, "message").value.decode()

    def encode(self, text: str | bytes, special: bool = False) -> list[int]:
        """Return the tokens of a text."""
        raw = text.encode() if isinstance(text, str) else text
        room = 2 * len(raw) + 64
        tokens, count = (ctypes.c_int32 * room)(), ctypes.c_size_t()
        status = self.library.text_encode(
            self.tables, raw, ctypes.c_size_t(len(raw)), int(special), tokens,
            ctypes.c_size_t(room), ctypes.byref(count),
        )  # fmt: skip
        assert status == 0
        return list(tokens[: count.value])

    def compose_bytes(self, raw: bytes) -> bytes:
        """Return text in the form NFC."""
        memory = ctypes.create_string_buffer(12 * len(raw))
        into = ctypes.create_string_buffer(3 * len(raw))
        size = self.library.compose(self.tables, raw, ctypes.c_size_t(len(raw)), memory, into)
        return into.raw[:size]

    def compose(self, text: str) -> str:
        """Return a text in the form NFC."""
        return self.compose_bytes(text.encode()).decode()

    def stream(self, ids: Sequence[int]) -> list[bytes]:
        """Return what each token lets out, and the rest."""
        decoder = ctypes.create_string_buffer(8)
        text = ctypes.create_string_buffer(self.library.longest_of(self.tables))
        pieces = []
        for token in [*ids, -1]:
            size = self.library.text_decode(self.tables, decoder, token, text)
            pieces.append(text.raw[:size])
        return pieces

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return b"".join(self.stream(ids)).decode()
