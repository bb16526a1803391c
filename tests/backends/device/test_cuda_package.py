"""A package for GPUs on a stub driver: a toy model runs, real code is launched as artifacts do."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import qc
from qc.backends.device.cuda_package import write_launcher
from qc.backends.device.cuda_program import CudaProgram, steps_of_one_row
from qc.backends.device.toolchain import RUNNER, Toolchain, toolchain_for
from qc.compiler import build
from qc.errors import TargetError, UnsupportedError
from qc.runtime.cuda.executor import CudaProgram as Loaded
from qc.runtime.manifest import Code, KernelStep, Manifest, Scalar
from qc.runtime.safetensors_file import TensorSource
from tests.backends.device.packages import Library
from tests.runtime import cuda, toy
from tests.tiny_llama import llama_folder

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]  # two chunks


def tools() -> Toolchain:
    return toolchain_for("x86_64" if os.uname().machine == "x86_64" else "aarch64")


def write_toy(place: Path, manifest: Manifest) -> Path:
    """Write the package of the toy model."""
    place.mkdir()
    files = {
        binary.file: f"STUB {code.function}".encode()
        for code in manifest.code.values()
        for binary in code.binaries
    }
    table = toy.table()
    sources = {"model.table": TensorSource("f32", table.shape, lambda: table)}
    write_launcher(manifest, files, sources, None, tools(), place)
    return place


def run(
    place: Path, *words: str, driver: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the runner of a package on the stub."""
    folder = (driver or cuda.stub_driver()).parent
    known = {**os.environ, "LD_LIBRARY_PATH": str(folder), **environment}
    command = [str(place / RUNNER), str(place / "weights.qcw"), *words]
    return subprocess.run(command, env=known, capture_output=True, text=True, check=False)


def as_text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def toy_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "out", cuda.language_manifest())


@pytest.mark.parametrize(("prompt", "count"), [(PROMPT, 40), ([7], 150), ([1, 2], 1)])
def test_tokens_are_those_of_the_model(toy_place: Path, prompt: list[int], count: int) -> None:
    done = run(toy_place, as_text(prompt), "--ids", "-n", str(count))
    assert done.returncode == 0, done.stderr
    assert list(map(int, done.stdout.split())) == toy.expected_tokens(prompt, count)[len(prompt) :]


@pytest.mark.parametrize("architecture", ["sm_80", "ptx_80"])
def test_older_code_runs_on_newer_gpus(tmp_path: Path, architecture: str) -> None:
    """The GPU is an sm_90, where text is translated and code for 8.0 is none."""
    manifest = cuda.language_manifest(code=cuda.code((architecture,)))
    done = run(write_toy(tmp_path / "out", manifest), as_text(PROMPT), "--ids", "-n", "9")
    if architecture == "sm_80":
        assert done.returncode == 1
        assert "was built for cpu-toy; the GPU here (Stub 0) is sm_90" in done.stderr
    else:
        assert list(map(int, done.stdout.split())) == toy.expected_tokens(PROMPT, 9)[len(PROMPT) :]


def test_without_a_gpu_one_sentence_says_so(toy_place: Path, tmp_path: Path) -> None:
    done = run(toy_place, "1", "--ids", STUB_NO_GPU="1")
    assert done.returncode == 1
    assert "this machine has none (its NVIDIA driver sees no GPU)" in done.stderr
    done = run(toy_place, "1", "--ids", driver=tmp_path / "libcuda.so.1")
    assert done.returncode == 1
    assert "this machine has none (no NVIDIA driver is installed)" in done.stderr
    old = tmp_path / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "/dev/null", "-o", str(old)]
    subprocess.run(command, check=True)
    done = run(toy_place, "1", "--ids", driver=old)
    assert "(its driver is too old: it lacks cuInit)" in done.stderr


def test_code_that_is_damaged_is_refused(toy_place: Path, tmp_path: Path) -> None:
    raw = bytearray((toy_place / "weights.qcw").read_bytes())
    raw[raw.index(b"STUB mix") + 5] ^= 1
    (tmp_path / "weights.qcw").write_bytes(raw)
    (tmp_path / RUNNER).symlink_to(toy_place / RUNNER)
    for flags in ((), ("--trust",)):  # code is always checked
        done = run(tmp_path, "1", "--ids", *flags)
        assert done.returncode == 1
        assert "code" in done.stderr
        assert "of the weights is damaged" in done.stderr


def test_steps_that_no_package_takes_are_left_out() -> None:
    whole = cuda.language_manifest()
    embed, *rest = (step for step in whole.steps if isinstance(step, KernelStep))
    variants = [
        replace(embed, when={"batch*seq": (1, 1)}),
        replace(embed, when={"batch*seq": (2, 8)}),
        replace(embed, when={"batch*seq": (9, None)}),
        replace(embed, when={"batch*keep": (2, None)}),
    ]
    manifest = replace(whole, steps=(*variants, *rest))
    assert steps_of_one_row(manifest) == [*variants[:3], *rest]
    program = CudaProgram(manifest, images(manifest.code))
    assert [list(lengths) for lengths in program.lengths] == [[1], [2, 8, 9, 16]]
    bad = replace(manifest, steps=(replace(embed, when={"past": (1, None)}), *rest))
    with pytest.raises(UnsupportedError, match="by the number of tokens alone"):
        steps_of_one_row(bad)
    wide = replace(rest[0], args=(*rest[0].args[:3], Scalar(1 << 31), *rest[0].args[4:]))
    with pytest.raises(UnsupportedError, match="takes 32-bit sizes"):
        CudaProgram(replace(whole, steps=(embed, wide, *rest[1:])), images(whole.code))


def images(code: dict[str, Code]) -> dict[str, bytes]:
    return {binary.file: b"STUB" for each in code.values() for binary in each.binaries}


def test_variants_are_chosen_by_the_number_of_tokens(tmp_path: Path) -> None:
    """The second variant would fault: its grid is no token's."""
    whole = cuda.language_manifest()
    embed, *rest = (step for step in whole.steps if isinstance(step, KernelStep))
    steps = (
        replace(embed, when={"batch*seq": (1, 1)}),
        replace(embed, when={"batch*seq": (2, 2)}, grid=(7, 1, 1)),
        replace(embed, when={"batch*seq": (3, None)}),
        *rest,
    )
    place = write_toy(tmp_path / "out", replace(whole, steps=steps))
    done = run(place, as_text([1, 2, 3]), "--ids", "-n", "5")
    assert list(map(int, done.stdout.split())) == toy.expected_tokens([1, 2, 3], 5)[3:]
    done = run(place, as_text([1, 2]), "--ids", "-n", "5")
    assert done.returncode == 1
    assert "kernel embed failed at toy.embed: stub error (error 700)" in done.stderr


def test_packages_are_for_gpus_that_something_runs_on(tmp_path: Path) -> None:
    for target in ("torch-f32", "rocm:gfx942-w4a16"):
        with pytest.raises(TargetError, match="packages are built for CPUs and for cuda"):
            build(llama_folder(tmp_path), target, tmp_path / "out")


def traced(path: Path) -> Iterator[list[list[str]]]:
    """Yield the launches of each call; a call ends with the launch that writes the logits."""
    lines = [line.split() for line in path.read_text().splitlines()]
    last, call = lines[-1][0], list[list[str]]()
    for line in lines:
        call.append(line)
        if line[0] == last:
            yield call
            call = []


UNKNOWN = {"*a5a5a5a5", "*00000000"}
"""What memory holds that no kernel has written: none is run."""


def known_words(line: list[str]) -> int:
    return sum(word not in UNKNOWN for word in line)


def agrees(found: list[str], wanted: list[str]) -> bool:
    return len(found) == len(wanted) and all(
        b in UNKNOWN or a == b for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.slow
def test_real_code_is_launched_as_the_artifact_launches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels, grids, sizes, tokens and weights are equal; code says how arguments are read."""
    model, target = llama_folder(tmp_path), "cuda:sm_90-w4"
    made = build(model, target, tmp_path / "out")
    assert made["gpus"] == ["sm_90"]
    assert made["tokenizer"]
    artifact = qc.compile(model, target, output=tmp_path / "tiny.qc")
    prompt = list(range(3, 40))
    stub = cuda.stub()
    stub.stub_set_device(90, 232448)
    stub.stub_reset()
    monkeypatch.setenv("STUB_TRACE", str(tmp_path / "c"))
    library = Library(tmp_path / "out" / "libmodel.so")
    opened = library.open(tmp_path / "out" / "weights.qcw")
    started = library.start(opened)
    assert library.prefill(started, prompt) == 0, library.error
    for _ in range(2):
        library.call("qcm_step", started, ctypes.c_int32(7))
    assert stub.stub_graph_launches() == 2
    library.library.qcm_end(started)
    library.library.qcm_close(opened)
    monkeypatch.setattr(Loaded, "library_name", str(cuda.stub_driver()))
    monkeypatch.setenv("STUB_TRACE", str(tmp_path / "python"))
    session = artifact.session()
    session.reserve(artifact.manifest.context_length or 0)
    session.prefill(prompt)
    for _ in range(2):  # the first call of a kind is no graph there
        session.step(7)
    expected = list(traced(tmp_path / "python"))
    found = list(traced(tmp_path / "c"))[1:]  # the first was to load the code
    assert [len(call) for call in found] == [len(call) for call in expected]
    assert len(expected) == 3
    compared = 0
    for call, other in ((found[0], expected[0]), (found[2], expected[2])):
        left = list(call)  # a graph may run launches in another order
        for wanted in sorted(other, key=known_words, reverse=True):
            match = next((one for one in left if agrees(one, wanted)), None)
            assert match is not None, wanted
            left.remove(match)
            compared += sum(w.startswith("*") and w not in UNKNOWN for w in wanted)
    assert compared > 45  # addresses of weights, tokens, and sizes that move
    assert np.all([len(call) > 20 for call in expected])
