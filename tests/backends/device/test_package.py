"""A package for this machine does what the artifact does, without Python."""

from __future__ import annotations

import ctypes
import hashlib
import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import qc
from qc.backends.tvm.build import c_compiler
from qc.compiler import build
from qc.errors import InputError, TargetError, UnsupportedError
from qc.runtime import Artifact
from tests.backends.device.packages import Library, Sampling, package
from tests.tiny_llama import CONTEXT, llama_folder

ROOT = Path(__file__).parents[3]
PROMPT = "The cat sat"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def place(base: Path) -> Path:
    return package(base)


@pytest.fixture(scope="module")
def artifact(base: Path) -> Artifact:
    return qc.compile(llama_folder(base), "cpu-w4")


@pytest.fixture(scope="module")
def library(place: Path) -> Library:
    return Library(place / "libmodel.so")


def continuation(artifact: Artifact, ids: list[int], count: int) -> list[int]:
    """Return what the artifact generates, past the end of text too."""
    session = artifact.session()
    logits, found = session.prefill(ids), []
    for _ in range(count):
        found.append(int(logits[0].argmax()))
        logits = session.step(found[-1])
    return found


def test_greedy_tokens_and_logits_are_the_artifacts(
    place: Path, artifact: Artifact, library: Library
) -> None:
    model = library.open(place / "weights.qcw")
    vocabulary = json.loads((place / "manifest.json").read_bytes())["vocabulary"]
    for ids in (artifact.text.encode(PROMPT), [5], list(range(3, 90))):
        session = library.start(model)
        expected = artifact.session().prefill(ids)[0]
        assert library.prefill(session, ids) == 0
        assert np.array_equal(library.logits(session, vocabulary), expected)
        library.call("qcm_rewind", session, ctypes.c_int64(0))
        assert library.greedy(session, ids, 30) == continuation(artifact, ids, 30)
        library.library.qcm_end(session)
    library.library.qcm_close(model)


def test_a_chunk_at_a_time_computes_the_same(place: Path, library: Library) -> None:
    model = library.open(place / "weights.qcw")
    one, other = library.start(model), library.start(model)
    ids = [3 + n % 50 for n in range(100)]
    assert library.greedy(one, ids, 8) == library.greedy(other, ids[:60], 0) + library.greedy(
        other, ids[60:], 8
    )
    for session in (one, other):
        library.library.qcm_end(session)
    library.library.qcm_close(model)


def test_the_runner_streams_the_artifacts_text(place: Path, artifact: Artifact) -> None:
    command = [str(place / "runner"), str(place / "weights.qcw"), PROMPT, "-n", "20"]
    done = subprocess.run(command, capture_output=True, check=True)
    expected = "".join(artifact.stream_text(PROMPT, 20, temperature=0.0))
    assert done.stdout.decode() == expected + "\n"


@pytest.mark.parametrize("how", ["archive", "ctypes"])
def test_examples_run(how: str, place: Path, artifact: Artifact, tmp_path: Path) -> None:
    if how == "ctypes":
        command = [sys.executable, str(ROOT / "examples" / "device.py"), str(place), PROMPT]
    else:
        program = tmp_path / "program"
        source = ROOT / "examples" / "device.c"
        subprocess.run(
            [*c_compiler(), "-Wall", "-Werror", f"-I{place}", str(source),
             str(place / "libmodel.a"), "-lpthread", "-lm", "-o", str(program)],
            check=True,
        )  # fmt: skip
        command = [str(program), str(place / "weights.qcw"), PROMPT]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout.decode() == "".join(artifact.stream_text(PROMPT, 32, temperature=0.0))


def test_several_models_and_threads_in_one_process(
    place: Path, artifact: Artifact, library: Library
) -> None:
    models = [library.open(place / "weights.qcw") for _ in range(2)]
    prompts = [[3 + n, 4 + n, 5 + n] for n in range(8)]

    def run(number: int) -> list[int]:
        session = library.start(models[number % 2])
        found = library.greedy(session, prompts[number], 20)
        library.library.qcm_end(session)
        return found

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(run, range(8)))
    assert found == [continuation(artifact, prompt, 20) for prompt in prompts]
    for model in models:
        library.library.qcm_close(model)


ALLOCATIONS = r"""
#include <stdio.h>
#include <stdlib.h>
#include "qc_model.h"
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
static int counted;
void *malloc(size_t n) { counted++; return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { counted++; return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { counted++; return __libc_realloc(p, n); }
void *aligned_alloc(size_t a, size_t n) { counted++; return __libc_memalign(a, n); }
int main(int count, char **words) {
  (void)count;
  qcm_model *model;
  qcm_session *session;
  int32_t tokens[100], token;
  for (int i = 0; i < 100; i++) tokens[i] = 3 + i % 50;
  if (qcm_open(words[1], QCM_ABI_VERSION, 0, &model) || qcm_start(model, 0, &session)) return 1;
  int opened = counted;
  if (qcm_prefill(session, tokens, 100)) return 1;
  for (int i = 0; i < 20; i++)
    if (qcm_choose(session, NULL, &token) || qcm_step(session, token)) return 1;
  fprintf(stderr, "%d %d\n", opened, counted - opened);
  return 0;
}
"""


def test_nothing_is_allocated_once_a_session_has_started(place: Path, tmp_path: Path) -> None:
    source, program = tmp_path / "counting.c", tmp_path / "counting"
    source.write_text(ALLOCATIONS)
    subprocess.run(
        [*c_compiler(), "-O1", f"-I{place}", str(source), str(place / "libmodel.a"), "-lpthread",
         "-lm", "-o", str(program)],
        check=True,
    )  # fmt: skip
    done = subprocess.run(
        [str(program), str(place / "weights.qcw")], capture_output=True, check=True
    )
    opened, later = map(int, done.stderr.split())
    assert opened > 0, "the counter counts nothing"
    assert later == 0


def test_the_library_needs_libc_libm_and_threads_alone(place: Path) -> None:
    content = (place / "libmodel.so").read_bytes()
    shown = subprocess.run(
        ["readelf", "-dW", str(place / "libmodel.so")], capture_output=True, text=True, check=True
    ).stdout
    needed = {line.split("[")[1].rstrip("]\n") for line in shown.splitlines() if "NEEDED" in line}
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2"}
    assert b"/home/" not in content
    assert str(ROOT).encode() not in content
    names = subprocess.run(
        ["nm", "-D", "--defined-only", str(place / "libmodel.so")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert all(line.split()[-1].startswith("qcm_") for line in names.splitlines())


def test_the_manifest_describes_every_file(place: Path) -> None:
    manifest = json.loads((place / "manifest.json").read_bytes())
    present = {path.name for path in place.iterdir()} - {"manifest.json"}
    assert present == set(manifest["files"])
    for name, entry in manifest["files"].items():
        content = (place / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == tuple(entry.values())
    assert manifest["context_length"] == CONTEXT


@pytest.mark.slow
def test_builds_are_reproducible(base: Path, place: Path, tmp_path: Path) -> None:
    """In another process, whose sets and dictionaries of objects have another order."""
    command = [
        sys.executable, "-c", "import sys; from qc.cli import main; sys.exit(main())", "build",
        str(llama_folder(base)), "--target", "cpu-w4", "-o", str(tmp_path / "again"), "--quiet",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)
    for path in place.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_a_torch_artifact_builds_as_its_model(base: Path, place: Path, tmp_path: Path) -> None:
    qc.compile(llama_folder(base), "torch-w4", output=tmp_path / "stored")
    build(tmp_path / "stored", "cpu-w4", tmp_path / "built")
    for name in ("libmodel.so", "weights.qcw"):
        assert (place / name).read_bytes() == (tmp_path / "built" / name).read_bytes()
    with pytest.raises(InputError, match="as they are stored"):
        build(tmp_path / "stored", "cpu-w4", tmp_path / "other", bits=3)


def test_a_native_artifact_is_refused(base: Path, tmp_path: Path, artifact: Artifact) -> None:
    with pytest.raises(UnsupportedError, match="no graph to build from"):
        build(artifact.path, "cpu-w4", tmp_path / "built")
    with pytest.raises(TargetError, match="packages are built for CPUs"):
        build(llama_folder(base), "torch-w4", tmp_path / "built")
    with pytest.raises(TargetError, match="qc build"):
        qc.compile(llama_folder(base), "arm64-w4")


def test_tokens_are_drawn_by_their_probabilities(place: Path, library: Library) -> None:
    """The share of every token that top_k and top_p leave, within five standard deviations."""
    model = library.open(place / "weights.qcw")
    session = library.start(model)
    vocabulary = json.loads((place / "manifest.json").read_bytes())["vocabulary"]
    assert library.prefill(session, [3, 4, 5]) == 0
    logits = library.logits(session, vocabulary).astype(np.float64)
    for top_k, top_p in ((0, 0.0), (5, 0.0), (0, 0.6), (10, 0.7)):
        weights = np.exp((logits - logits.max()) / 0.7)
        order = np.argsort(-weights, kind="stable")[: top_k or None]
        share = weights[order] / weights[order].sum()
        kept = order[: int((np.cumsum(share) < (top_p or 1.0) - 1e-9).sum()) + 1]
        sampling = Sampling(0.7, top_p, top_k, 0, 1)
        draws = 4000
        seen = Counter(library.choose(session, ctypes.byref(sampling)) for _ in range(draws))
        assert set(seen) <= set(kept.tolist())
        for token in kept:
            p = weights[token] / weights[kept].sum()
            assert abs(seen[token] - draws * p) <= 5 * (draws * p * (1 - p)) ** 0.5 + 1
    library.library.qcm_end(session)
    library.library.qcm_close(model)
