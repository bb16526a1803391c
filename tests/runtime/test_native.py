"""The native runtime: threads, barriers, workspaces, errors, forks, and kernels made by TVM."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qc.errors import ArtifactError, InputError
from qc.runtime import Artifact, load
from qc.runtime.library import Library
from qc.runtime.manifest import KernelStep, Manifest, Scalar, Value, ValueArg
from qc.runtime.package import ArtifactWriter, file_entry
from tests.runtime import toy

ROWS = ValueArg(0), ValueArg(1)


def kernel_artifact(path: Path, values: tuple[Value, ...], *steps: KernelStep) -> Artifact:
    """Load an artifact of kernels that has neither weights nor state."""
    manifest = Manifest(
        target=toy.HOST,
        symbols=("n",),
        values=values,
        steps=steps,
        inputs=tuple(v.name for v in values if v.kind == "input"),
        outputs=tuple(v.name for v in values if v.kind == "output"),
    )
    with ArtifactWriter(path) as writer:
        writer.add("model.so", toy.library())
        writer.finish(manifest)
    return load(path)


VECTORS = (Value("x", "f32", ("n",), "input"), Value("y", "f32", ("n",), "output"))
INCREMENT = KernelStep("increment", ROWS, reads=(0,), writes=(1,))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads_gives_the_same(artifact: Artifact, threads: int) -> None:
    assert artifact.set_threads(threads) == threads
    prompt = [3, 1, 4, 1, 5]
    assert artifact.generate(prompt, 40) == toy.expected_tokens(prompt, 40)


def test_threads_default_to_the_cpus_of_the_process(artifact: Artifact) -> None:
    assert artifact.set_threads() == len(os.sched_getaffinity(0))
    with pytest.raises(InputError, match="at least 1 thread"):
        artifact.set_threads(0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_barriers_hold(tmp_path: Path, threads: int) -> None:
    """Every round reads what other tasks wrote in the round before; 5 threads oversubscribe."""
    values = (
        Value("x", "f32", ("n",), "input"),
        Value("cells", "f32", (2, "n"), "scratch"),
        Value("y", "f32", (2, "n"), "output"),
    )
    artifact = kernel_artifact(
        tmp_path / "m",
        values,
        KernelStep("increment", (ValueArg(0), ValueArg(2, ("n",))), reads=(0,), writes=(2,)),
        KernelStep("rounds", (ValueArg(2), Scalar(200)), reads=(2,), writes=(2,)),
    )
    artifact.set_threads(threads)
    for _ in range(10):
        cells = artifact(np.arange(31, dtype=np.float32))[0]
        np.testing.assert_array_equal(cells, (np.arange(31) + 200) % 31 + 201)
    artifact.set_threads()


def test_tasks_that_need_not_run_together_cannot_wait_for_each_other(tmp_path: Path) -> None:
    alone = KernelStep("wait_alone", (), reads=(), writes=())
    artifact = kernel_artifact(tmp_path / "m", VECTORS, INCREMENT, alone)
    artifact.set_threads(2)
    with pytest.raises(ArtifactError, match="tasks that need not run at the same time"):
        artifact([1.0])
    artifact.set_threads()


@pytest.mark.parametrize("order", ["stack", "queue", "random"])
def test_workspaces_do_not_overlap_in_any_order(tmp_path: Path, order: str) -> None:
    artifact = kernel_artifact(
        tmp_path / "m",
        (Value("x", "i64", ("n",), "input"), Value("y", "f32", ("n",), "output")),
        KernelStep("workspaces", (ValueArg(0),), reads=(0,), writes=(1,)),
    )
    for count in (1, 5, 40):
        pattern = {
            "stack": np.arange(count)[::-1],
            "queue": np.arange(count),
            "random": np.random.default_rng(count).permutation(count),
        }[order]
        for _ in range(3):
            artifact(pattern)


def test_a_failing_task_names_kernel_and_reason_and_does_not_hang(tmp_path: Path) -> None:
    artifact = kernel_artifact(
        tmp_path / "m",
        VECTORS,
        INCREMENT,
        KernelStep("refuse", (), reads=(), writes=(), origin="model.layers.3"),
    )
    for threads in (1, 2, 4):
        artifact.set_threads(threads)
        with pytest.raises(ArtifactError) as caught:
            artifact([1.0])
        assert str(caught.value) == (
            "kernel 'refuse' failed: ValueError: toy: the last task refuses (at model.layers.3)"
        )
    artifact.set_threads()


def test_two_threads_share_an_artifact_and_two_artifacts_a_process(tmp_path: Path) -> None:
    artifacts = [load(toy.write_artifact(tmp_path / f"m{seed}", seed=seed)) for seed in range(2)]
    failures: list[object] = []

    def work(seed: int, prompt: list[int]) -> None:
        expected = toy.expected_tokens(prompt, 60, seed)
        for _ in range(5):
            found = artifacts[seed].generate(prompt, 60)
            if found != expected:
                failures.append((seed, prompt, found))

    threads = [
        threading.Thread(target=work, args=(seed, [first, 5, 6]))
        for seed in range(2)
        for first in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


def test_idle_threads_sleep(artifact: Artifact) -> None:
    artifact.set_threads(4)
    artifact.generate([1, 2, 3], 20)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.01
    artifact.generate([1, 2, 3], 20)  # and wake again
    artifact.set_threads()


def test_a_forked_child_starts_its_own_threads(artifact: Artifact) -> None:
    artifact.set_threads(3)
    expected = toy.expected_tokens([1, 2], 30)
    assert artifact.generate([1, 2], 30) == expected
    for _ in range(3):
        child = os.fork()
        if child == 0:
            os._exit(0 if artifact.generate([1, 2], 30) == expected else 1)
        deadline = time.monotonic() + 20
        done, status = os.waitpid(child, os.WNOHANG)
        while not done and time.monotonic() < deadline:
            time.sleep(0.01)
            done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert done
        assert os.waitstatus_to_exitcode(status) == 0
        assert artifact.generate([1, 2], 30) == expected
    artifact.set_threads()


def test_a_replaced_library_is_not_mistaken_for_the_old_one(tmp_path: Path) -> None:
    """dlopen would return the library that it already has for this path."""
    first = kernel_artifact(tmp_path / "m", VECTORS, INCREMENT)
    assert first([1.0]) == [2]
    source = tmp_path / "other.c"
    source.write_text(
        '#include "qcrt.h"\n'
        "int __tvm_ffi_increment(void *s, const qc_any *a, int32_t n, qc_any *r) {\n"
        "  const qc_tensor *x = a[0].value.pointer, *y = a[1].value.pointer;\n"
        "  ((float *)y->data)[0] = ((float *)x->data)[0] + 100; return 0; }\n"
    )
    with ArtifactWriter(tmp_path / "m") as writer:
        writer.add("model.so", toy.compile_library(source))
        writer.finish(first.manifest)
    assert load(tmp_path / "m")([1.0]) == [101]
    assert first([1.0]) == [2]


def test_only_the_documented_functions_are_exported(tmp_path: Path) -> None:
    """So that kernels never bind to the runtime of TVM or of another artifact."""
    path = toy.library()
    library = Library.open(path, file_entry(path).sha256)
    for name in ("TVMBackendParallelLaunch", "TVMBackendAllocWorkspace"):
        with pytest.raises(AttributeError):
            getattr(library._handle, name)
    with pytest.raises(ArtifactError, match="no kernel 'absent'"):
        library.kernel_address("absent")


def test_no_library_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"not a library")
    with pytest.raises(ArtifactError, match=r"cannot load .*model\.so"):
        Library.open(path, file_entry(path).sha256)
    with pytest.raises(ArtifactError, match="its SHA-256 is not"):
        Library.open(path, "0" * 64)
    with pytest.raises(ArtifactError, match="cannot read"):
        Library.open(tmp_path / "absent", "0" * 64)


def test_the_profile_names_every_kernel(artifact: Artifact) -> None:
    profile = artifact.profile(new_tokens=3)
    kernels = {"embed", "append", "mix", "head"}
    assert {(row.phase, row.kernel) for row in profile.rows} == {
        (phase, kernel) for phase in ("prefill", "decode") for kernel in kernels
    }
    assert profile.total("prefill") > 0
    assert profile.total("decode") > 0
    assert "share %" in str(profile)


def test_kernels_made_by_tvm_run(tmp_path: Path) -> None:
    """One kernel with a parallel loop and a workspace, called with tensors and an integer."""
    tvm = pytest.importorskip("tvm")
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def blend(x_handle: T.handle, y_handle: T.handle, past: T.int64):  # type: ignore[no-untyped-def]
        T.func_attr({"global_symbol": "blend", "tirx.noalias": True})
        rows = T.int64()
        x = T.match_buffer(x_handle, (rows, 512), "float32")
        y = T.match_buffer(y_handle, (rows, 512), "float32")
        for i in T.parallel(rows):
            kept = T.alloc_buffer((512,), "float32", scope="local")
            for j in T.serial(512):
                kept[j] = x[i, j] * T.float32(2)
            for j in T.serial(512):
                y[i, j] = kept[511 - j] + T.Cast("float32", past)

    module = tvm.IRModule({"blend": blend}).with_attr("system_lib_prefix", "qc_")
    compiled = tvm.compile(module, target=tvm.target.Target({"kind": "llvm"}))
    compiled.mod.write_to_file(str(tmp_path / "blend.o"), "o")
    imported = subprocess.run(["nm", "-u", tmp_path / "blend.o"], capture_output=True, text=True)
    assert "TVMBackendParallelLaunch" in imported.stdout
    assert "TVMBackendAllocWorkspace" in imported.stdout
    manifest = Manifest(
        target=toy.HOST,
        symbols=("n", "past"),
        values=(Value("x", "f32", ("n", 512), "input"), Value("y", "f32", ("n", 512), "output")),
        steps=(KernelStep("blend", (*ROWS, Scalar("past + 7")), reads=(0,), writes=(1,)),),
        inputs=("x",),
        outputs=("y",),
    )
    with ArtifactWriter(tmp_path / "m") as writer:
        writer.add("model.so", toy.compile_library(tmp_path / "blend.o"))
        writer.finish(manifest)
    artifact = load(tmp_path / "m")
    x = np.random.default_rng(0).normal(size=(37, 512)).astype(np.float32)
    for threads in (1, 2, 4):
        artifact.set_threads(threads)
        np.testing.assert_array_equal(artifact(x), 2 * x[:, ::-1] + 7)
    artifact.set_threads()


def test_a_system_that_refuses_tiles_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.so"
    shutil.copy(toy.library(), path)
    library = Library.open(path, file_entry(path).sha256)
    assert library._handle.qc_request_tiles() in (0, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
    answers = iter((0, errno.EPERM))
    answering = SimpleNamespace(qc_request_tiles=lambda: next(answers))
    monkeypatch.setattr(library, "_handle", answering)
    library.request_tiles()
    with pytest.raises(ArtifactError, match=r"refuses AMX tiles .*not permitted.*avx512-vnni"):
        library.request_tiles()
