"""Build small real artifacts: a toy language model whose kernels are plain C.

Its logits are `table @ mean(table[ids so far])`, which numpy computes in one line.
"""

from __future__ import annotations

import platform
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from numpy.typing import NDArray

import qc.runtime
from qc.runtime.manifest import (
    LIBRARY,
    Generate,
    KernelStep,
    Manifest,
    Scalar,
    TargetFacts,
    Value,
    ValueArg,
)
from qc.runtime.package import ArtifactWriter

VOCABULARY, WIDTH, CONTEXT = 41, 12, 300
NATIVE = Path(qc.runtime.__file__).parent / "native"
HOST = TargetFacts("cpu-toy", platform.machine())


@cache
def library() -> Path:
    """Compile the toy kernels with the native runtime, once."""
    return compile_library(Path(__file__).with_name("toy.c"))


def compile_library(*sources: Path) -> Path:
    """Link C or object files with qcrt.c as a backend does."""
    path = Path(mkdtemp(prefix="qc-toy-")) / LIBRARY
    subprocess.run(
        [
            *("cc", "-std=c11", "-Wall", "-Werror", "-O2", "-shared", "-fPIC", f"-I{NATIVE}"),
            *(*map(str, sources), str(NATIVE / "qcrt.c"), "-o", str(path), "-lpthread", "-lm"),
        ],
        check=True,
    )
    return path


def table(seed: int = 0) -> NDArray[np.float32]:
    """Return the only weight of the toy model."""
    return np.random.default_rng(seed).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)


def expected_logits(ids: Any, seed: int = 0) -> NDArray[np.float32]:
    """Compute what the toy model computes: [tokens, vocabulary] for one row."""
    weight = table(seed)
    rows = weight[np.asarray(ids)]
    means = np.cumsum(rows, axis=0) / np.arange(1, len(rows) + 1)[:, None]
    return (means @ weight.T).astype(np.float32)


def expected_tokens(ids: list[int], count: int, seed: int = 0) -> list[int]:
    """Generate greedily with numpy; return the prompt and `count` tokens."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(expected_logits(ids, seed)[-1].argmax()))
    return ids


def language_manifest(**changes: Any) -> Manifest:
    """Describe the toy language model."""
    activation = ("batch", "seq", WIDTH)
    values = (
        Value("input_ids", "i64", ("batch", "seq"), "input", below=VOCABULARY),
        Value("table", "f32", (VOCABULARY, WIDTH), "weight", tensor="model.table"),
        Value("x", "f32", activation, "scratch"),
        Value("state", "f32", ("batch", "context", WIDTH), "state"),
        Value("y", "f32", activation, "scratch"),
        Value("logits", "f32", ("batch", "keep", VOCABULARY), "output"),
    )

    def call(kernel: str, *args: ValueArg | Scalar, reads: Any, writes: Any) -> KernelStep:
        return KernelStep(kernel, args, reads, writes, origin=f"toy.{kernel}")

    ids, weight, x, state, y, logits = (ValueArg(index) for index in range(6))
    past = Scalar("past")
    return replace(
        Manifest(
            target=HOST,
            symbols=("batch", "seq", "past", "keep", "context"),
            values=values,
            steps=(
                call("embed", ids, weight, x, reads=(0, 1), writes=(2,)),
                call("append", x, state, past, reads=(2, 3), writes=(3,)),
                call("mix", state, y, past, reads=(3,), writes=(4,)),
                call("head", y, weight, logits, reads=(4, 1), writes=(5,)),
            ),
            inputs=("input_ids",),
            outputs=("logits",),
            context_length=CONTEXT,
            generate=Generate("input_ids", "logits", chunk=16),
            report={
                "rows": [{"layer": "table", "format": "f32", "bits": 32.0, "bytes": 4 * 41 * 12}],
                "summary": {"bits per weight": 32.0},
            },
        ),
        **changes,
    )


def write_artifact(
    path: Path, manifest: Manifest | None = None, *, seed: int = 0, **files: bytes
) -> Path:
    """Write an artifact of toy kernels; further files by name, with "__" for "/" and "_dot_"."""
    with ArtifactWriter(path) as writer:
        writer.add_weights({"model.table": table(seed)})
        writer.add(LIBRARY, library())
        for name, content in files.items():
            writer.add(name.replace("__", "/").replace("_dot_", "."), content)
        return writer.finish(manifest or language_manifest())
