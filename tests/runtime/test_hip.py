"""The launcher on a stub of AMD's HIP runtime, whose prototypes are those of AMD's header."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qc.cli import main
from qc.errors import ArtifactError
from qc.runtime import load
from qc.runtime.cuda.hip import HipProgram
from qc.runtime.manifest import ROCM
from tests.runtime import cuda, toy

ARCHITECTURE = "gfx942"


def stub_runtime() -> Path:
    """Compile the stub against the header that Triton brings."""
    triton = find_spec("triton")
    assert triton is not None
    assert triton.origin is not None
    headers = Path(triton.origin).parent / "backends/amd/include"
    if not (headers / "hip/hip_runtime_api.h").exists():
        pytest.skip("the installed Triton brings no header of HIP")
    return cuda.stub_driver("stub_hip.c", "libamdhip64.so", "-I", str(headers))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put the stub in the place of the runtime."""
    path = stub_runtime()
    monkeypatch.setattr(HipProgram, "library_name", ("libmissing.so.7", str(path)))
    found = cuda.stub(path)
    found.stub_set_architecture(b"gfx942:sramecc+:xnack-")
    found.stub_reset()
    return found


def manifest_for_amd() -> Any:
    """Describe the toy language model for a GPU of AMD's."""
    code = cuda.code((ARCHITECTURE,), overlaps=False)
    return cuda.choosing_manifest(executor=ROCM, code=code)


def test_an_artifact_runs_on_hip(tmp_path: Path, stub: Any) -> None:
    artifact = load(cuda.write_artifact(tmp_path / "toy.qc", manifest_for_amd()))
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]  # two chunks of a prompt
    np.testing.assert_allclose(artifact(ids), toy.expected_logits(ids), rtol=1e-5, atol=1e-5)
    stub.stub_reset()
    assert artifact.generate([1, 2, 3], 150) == toy.expected_tokens([1, 2, 3], 150)
    assert stub.stub_graph_launches() > 100  # a step that comes again is one graph
    assert stub.stub_launches_beside() == 0


def test_memory_is_given_back(tmp_path: Path, stub: Any) -> None:
    import gc

    gc.collect()
    before = stub.stub_live_blocks()
    artifact = load(cuda.write_artifact(tmp_path / "toy.qc", manifest_for_amd()))
    artifact([1, 2, 3])
    assert stub.stub_live_blocks() > before
    del artifact
    gc.collect()
    assert stub.stub_live_blocks() == before


def test_another_gpu_of_amd_is_refused(tmp_path: Path, stub: Any) -> None:
    stub.stub_set_architecture(b"gfx1100")
    artifact = load(cuda.write_artifact(tmp_path / "toy.qc", manifest_for_amd()))
    with pytest.raises(ArtifactError, match="is gfx1100: compile the model for rocm:gfx1100"):
        artifact([1, 2])


def test_a_call_that_fails_is_named_as_hip_does(tmp_path: Path, stub: Any) -> None:
    path = cuda.write_artifact(tmp_path / "toy.qc", manifest_for_amd())
    (path / f"code/{ARCHITECTURE}/mix.cubin").write_bytes(b"BAD  mix")
    with pytest.raises(ArtifactError, match="the GPU refused hipModuleLoadData: stub error"):
        load(path)([1, 2])


def test_golden_outputs_are_compared(tmp_path: Path, stub: Any, capsys: Any) -> None:
    path = cuda.write_artifact(tmp_path / "toy.qc", cuda.language_manifest(
        executor=ROCM, code=cuda.code((ARCHITECTURE,), overlaps=False)))  # fmt: skip
    assert main(["verify", str(path)]) == 0
    assert "all 1 checks are right" in capsys.readouterr().out


def test_without_a_gpu_one_sentence_says_so(
    tmp_path: Path, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cuda.write_artifact(tmp_path / "toy.qc", manifest_for_amd())
    monkeypatch.setenv("STUB_NO_GPU", "1")
    with pytest.raises(ArtifactError, match=r"an AMD GPU, .* \(its AMD driver sees no GPU\)"):
        load(path)([1, 2])
    monkeypatch.setattr(HipProgram, "library_name", ("libmissing.so.7", "libmissing.so"))
    with pytest.raises(ArtifactError, match=r"\(no AMD driver is installed\): load it where"):
        load(path)([1, 2])
