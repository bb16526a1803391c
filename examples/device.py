"""Continue a prompt with the library of a device package, through ctypes:

python examples/device.py out/ "Once upon a time"
"""

import ctypes
import sys
from pathlib import Path

OK, ABI = 0, 1


def main(package: Path, prompt: str, most: int = 32) -> None:
    """Print a greedy continuation, piece by piece."""
    library = ctypes.CDLL(str(package / "libmodel.so"))
    library.qcm_error.restype = ctypes.c_char_p
    library.qcm_longest_piece.restype = ctypes.c_size_t

    def call(name: str, *arguments: object) -> None:
        if getattr(library, name)(*arguments) != OK:
            raise SystemExit(library.qcm_error().decode())

    model, session = ctypes.c_void_p(), ctypes.c_void_p()
    call("qcm_open", bytes(package / "weights.qcw"), ABI, 0, ctypes.byref(model))
    call("qcm_start", model, ctypes.c_int64(1024), ctypes.byref(session))

    raw = prompt.encode()
    tokens, count = (ctypes.c_int32 * (len(raw) + 16))(), ctypes.c_size_t()
    call(
        "qcm_encode", model, raw, ctypes.c_size_t(len(raw)), 1,
        tokens, ctypes.c_size_t(len(tokens)), ctypes.byref(count),
    )  # fmt: skip
    call("qcm_prefill", session, tokens, ctypes.c_int64(count.value))

    room = library.qcm_longest_piece(model)
    text, size, token = ctypes.create_string_buffer(room), ctypes.c_size_t(), ctypes.c_int32()
    decoder = (ctypes.c_uint8 * 8)(*[0] * 5, 1)  # started: the text may go on with a space
    for _ in range(most):
        call("qcm_choose", session, None, ctypes.byref(token))
        if library.qcm_is_end(model, token):
            break
        call("qcm_decode", model, decoder, token, text, ctypes.c_size_t(room), ctypes.byref(size))
        sys.stdout.write(text.raw[: size.value].decode())
        call("qcm_step", session, token)
    call("qcm_decode", model, decoder, -1, text, ctypes.c_size_t(room), ctypes.byref(size))
    sys.stdout.write(text.raw[: size.value].decode())
    library.qcm_end(session)
    library.qcm_close(model)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
