"""Bad weights, wrong versions and lacking CPUs get a status and a sentence, never a crash."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qc.backends.device.toolchain import DEVICE, ON_CPU, RUNTIME
from qc.backends.device.weights_file import ENTRY, HEADER, checksum, header_checksum
from qc.backends.tvm.build import c_compiler
from tests.backends.device.packages import Library, package

BAD_CALL, BAD_VERSION, NO_FILE, BAD_FILE, FOREIGN_FILE, BAD_CPU = range(1, 7)
CONTEXT_FULL = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def library(place: Path) -> Library:
    return Library(place / "libmodel.so")


def opened(library: Library, path: Path, abi: int = 1, flags: int = 0) -> tuple[int, str]:
    """Try to open weights; return the status and the sentence."""
    import ctypes

    model = ctypes.c_void_p()
    status = library.status("qcm_open", bytes(path), abi, flags, ctypes.byref(model))
    if status == 0:
        library.library.qcm_close(model)
    return status, library.error


def with_sums(content: bytearray) -> bytes:
    """Return a file whose header says the right checksum for what it has become."""
    count = int(np.frombuffer(content, HEADER, 1)["entries"][0])
    table = bytes(content[HEADER.itemsize : HEADER.itemsize + count * ENTRY.itemsize])
    content[56:64] = bytes(8)
    sum = header_checksum(bytes(content[:64]), table)
    content[56:64] = sum.to_bytes(8, "little")
    return bytes(content)


def test_the_checksum_is_the_devices(place: Path) -> None:
    """Any single change is seen: the sum and the sum of sums of the changed lane differ."""
    raw = np.frombuffer((place / "weights.qcw").read_bytes(), np.uint8)
    head = np.frombuffer(raw[: HEADER.itemsize].tobytes(), HEADER)[0]
    table = np.frombuffer(raw[64 : 64 + int(head["entries"]) * 32].tobytes(), ENTRY)
    for entry in table:
        start, size = int(entry["offset"]), int(entry["bytes"])
        assert checksum(raw[start : start + size]) == int(entry["checksum"])
    changed = raw[int(table[0]["offset"]) :][: int(table[0]["bytes"])].copy()
    changed[7] ^= 4
    assert checksum(changed) != int(table[0]["checksum"])


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("nothing", NO_FILE, "cannot open"),
        ("folder", BAD_FILE, "no file"),
        ("empty", BAD_FILE, "is empty"),
        ("text", BAD_FILE, "does not start with QCWEIGHT"),
        ("half", BAD_FILE, "truncated"),
        ("longer", BAD_FILE, "damaged"),
        ("header", BAD_FILE, "header of the weights is damaged"),
        ("first tensor", BAD_FILE, "tensor 0 of the weights is damaged"),
        ("tokenizer", BAD_FILE, "tokenizer in the weights is damaged"),
        ("newer format", FOREIGN_FILE, "format 9"),
        ("other model", FOREIGN_FILE, "another model or target"),
        ("fewer tensors", FOREIGN_FILE, "the weights hold 2 tensors"),
        ("outside", BAD_FILE, "tensor 1 lies outside"),
        ("other size", FOREIGN_FILE, "tensor 1 has"),
    ],
)
def test_bad_files_are_refused(
    what: str, status: int, said: str, place: Path, library: Library, tmp_path: Path
) -> None:
    good = (place / "weights.qcw").read_bytes()
    content, path = bytearray(good), tmp_path / "weights.qcw"
    table = np.frombuffer(good, ENTRY, int(good[12]), HEADER.itemsize)
    match what:
        case "nothing":
            content = bytearray()
        case "folder":
            path.mkdir()
        case "text":
            content[:8] = b"GGUF\x03\0\0\0"
        case "half":
            content = content[: len(content) // 2]
        case "longer":
            content += b"\0"
        case "header":
            content[70] ^= 1
        case "first tensor":
            content[int(table[0]["offset"]) + 3] ^= 0x40
        case "tokenizer":
            content[int(table[-1]["offset"]) + 200] ^= 1
        case "newer format":
            content[8] = 9
        case "other model":
            content[30] ^= 1
            content = bytearray(with_sums(content))
        case "fewer tensors":
            content[12:16] = (2).to_bytes(4, "little")
        case "outside":
            content[64 + 32 : 64 + 40] = (len(good) // 64 * 64 + 64).to_bytes(8, "little")
            content = bytearray(with_sums(content))
        case "other size":
            content[64 + 40] ^= 8
            content = bytearray(with_sums(content))
    if what == "empty":
        content = bytearray()
    if what not in ("nothing", "folder"):
        path.write_bytes(content)
    found, sentence = opened(library, path)
    assert (found, said in sentence) == (status, True), sentence
    assert "\n" not in sentence


def test_versions_and_calls_that_cannot_be(place: Path, library: Library) -> None:
    import ctypes

    weights = place / "weights.qcw"
    found, sentence = opened(library, weights, abi=2)
    assert (found, "version 2" in sentence) == (BAD_VERSION, True)
    assert opened(library, weights, flags=4)[0] == BAD_CALL
    assert opened(library, weights, flags=1)[0] == 0
    model = library.open(weights)
    session = library.start(model, 64)
    assert library.status("qcm_start", model, ctypes.c_int64(-1), ctypes.byref(session)) == BAD_CALL
    session = library.start(model, 64)
    assert library.prefill(session, [-1]) == BAD_CALL
    assert library.prefill(session, [10**6]) == BAD_CALL
    assert "vocabulary" in library.error
    assert library.prefill(session, [3] * 65) == CONTEXT_FULL
    assert library.prefill(session, [3] * 64) == 0
    assert library.status("qcm_step", session, 3) == CONTEXT_FULL
    assert "64 tokens and 1 more" in library.error
    assert library.status("qcm_rewind", session, ctypes.c_int64(65)) == BAD_CALL
    library.call("qcm_rewind", session, ctypes.c_int64(10))
    assert library.library.qcm_logits(session) is None or not library.library.qcm_logits(session)
    library.library.qcm_end(session)
    library.library.qcm_close(model)
    library.library.qcm_end(None)
    library.library.qcm_close(None)


@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="no qemu-x86_64 on the path")
def test_a_cpu_that_lacks_an_instruction_set_is_told_so(place: Path) -> None:
    command = [
        "qemu-x86_64",
        "-cpu",
        "Nehalem",
        str(place / "runner"),
        str(place / "weights.qcw"),
        "a",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "this CPU has no" in done.stderr


FUZZ = r"""
#include <stdio.h>
#include <stdlib.h>
#include "qc_model.h"
/* Reads sizes and files from standard input; writes each to a path and opens it. */
int main(int count, char **words) {
  (void)count;
  uint32_t size, seen[16] = {0}, total = 0;
  while (fread(&size, 4, 1, stdin) == 1) {
    char *content = malloc(size + 1);
    if (fread(content, 1, size, stdin) != size) return 2;
    FILE *file = fopen(words[1], "wb");
    fwrite(content, 1, size, file);
    fclose(file);
    qcm_model *model;
    qcm_status status = qcm_open(words[1], QCM_ABI_VERSION, 0, &model);
    seen[status]++, total++;
    if (status == QCM_OK) {
      size_t tokens, bytes;
      int32_t ids[64];
      qcm_decoder decoder = {0};
      if (!qcm_encode(model, content, 64, 1, ids, 64, &tokens)) {
        char *text = malloc(qcm_longest_piece(model) + 1);
        for (size_t i = 0; i < tokens && i < 64; i++)
          qcm_decode(model, &decoder, ids[i], text, qcm_longest_piece(model), &bytes);
        free(text);
      }
      qcm_close(model);
    } else if (!*qcm_error()) return 3;
    free(content);
  }
  printf("%u %u\n", total, seen[0]);
  return 0;
}
"""


def fuzz(place: Path, folder: Path, count: int) -> tuple[int, int]:
    """Open mutated files under AddressSanitizer and UBSan; return how many, and how many opened.

    The library is compiled from its sources with a program that has the tables of a package but
    kernels that only fail: files are never far enough for a kernel.
    """
    source = folder / "fuzz.c"
    source.write_text(FUZZ)
    content = program_of(folder)
    kernels = sorted({w for w in content.replace("(", " ").split() if w.startswith("__tvm_ffi_")})
    stub = folder / "program.c"
    names = sorted({name.rstrip(",};") for name in kernels})
    bodies = [
        f"int {name}(void *s, const qc_any *a, int32_t n, qc_any *r)"
        " { (void)s, (void)a, (void)n, (void)r; return -1; }"
        for name in names
    ]
    stub.write_text(content + "\n" + "\n".join(bodies))
    command = [
        *c_compiler(), "-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all", f"-I{DEVICE}", f"-I{RUNTIME / 'native'}", str(source),
        str(stub), *map(str, ON_CPU), "-lpthread", "-lm", "-o", str(folder / "fuzz"),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    good = (place / "weights.qcw").read_bytes()
    generator = random.Random(0)
    process = subprocess.Popen(
        [str(folder / "fuzz"), str(folder / "mutated.qcw")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={"QC_NUM_THREADS": "1", "ASAN_OPTIONS": "detect_leaks=1"},
    )  # fmt: skip
    assert process.stdin is not None
    for _ in range(count):
        mutated = mutate(good, generator)
        process.stdin.write(len(mutated).to_bytes(4, "little") + mutated)
    out, messages = process.communicate()
    assert process.returncode == 0, messages.decode()[-2000:]
    total, accepted = map(int, out.split())
    return total, accepted


def mutate(good: bytes, generator: random.Random) -> bytes:
    """Truncate, flip, overwrite, swap; half of the time with a header that agrees again, and with a
    text section whose checksum does."""
    content = bytearray(good)
    for _ in range(generator.choice((1, 1, 2, 8))):
        at = generator.choice((generator.randrange(len(content)), generator.randrange(2048)))
        match generator.randrange(5):
            case 0:
                content = content[:at] or bytearray(b"Q")
            case 1:
                content[at % len(content)] ^= 1 << generator.randrange(8)
            case 2:
                size = generator.randrange(1, 9)
                content[at : at + size] = generator.randbytes(size)
            case 3:
                content[at : at + 4] = generator.choice((b"\xff" * 4, bytes(4), b"\0\0\0\x80"))
            case 4:
                text = text_start(good)
                content[text + generator.randrange(400) :][:4] = generator.randbytes(4)
                spot = text + generator.randrange(4000)
                content[spot : spot + 4] = generator.randbytes(4)
    if generator.random() < 0.6:
        content = repaired(content)
    return bytes(content)


def text_start(good: bytes) -> int:
    """Return where the text tables are."""
    count = int.from_bytes(good[12:16], "little")
    return int(np.frombuffer(good, ENTRY, count, 64)[-1]["offset"])


def repaired(content: bytearray) -> bytearray:
    """Make every checksum agree where the table can be read: what is behind them is tried then."""
    count = int.from_bytes(content[12:16], "little")
    if len(content) < 64 or count > 10_000 or len(content) < 64 + 32 * count:
        return content
    content[16:24] = len(content).to_bytes(8, "little")
    raw = np.frombuffer(bytes(content), np.uint8)
    for number in range(count):
        entry = np.frombuffer(bytes(content), ENTRY, 1, 64 + 32 * number)[0]
        start, size = int(entry["offset"]), int(entry["bytes"])
        if start + size <= len(content):
            at = 64 + 32 * number + 16
            content[at : at + 8] = checksum(raw[start : start + size]).to_bytes(8, "little")
    return bytearray(with_sums(content))


def program_of(folder: Path) -> str:
    """Return program.c of the tiny llama's package."""
    from qc.backends.device.program import DeviceProgram
    from qc.backends.tvm.artifact import manifest_of
    from qc.backends.tvm.lower import lower
    from qc.backends.tvm.rules import CPU_RULES
    from qc.compiler import trace
    from tests.tiny_llama import llama_folder

    base = folder
    while not (base / "tiny-llama").is_dir():
        base = base.parent
    planned = trace(llama_folder(base)).quantize("w4").lower("cpu")
    facts = planned.facts("cpu-w4")
    manifest = manifest_of(lower(planned.graph, planned.target, CPU_RULES), facts, False)
    return DeviceProgram(manifest).source(0)


def test_a_few_hundred_mutated_files(place: Path, tmp_path: Path) -> None:
    total, accepted = fuzz(place, tmp_path, 300)
    assert total == 300
    assert accepted < 250  # some mutations, made to agree again, are files like any other


@pytest.mark.slow
def test_ten_thousand_mutated_files(place: Path, tmp_path: Path) -> None:
    assert fuzz(place, tmp_path, 10_000)[0] == 10_000


def test_the_manifest_names_its_version(place: Path) -> None:
    assert json.loads((place / "manifest.json").read_bytes())["abi"] == 1
