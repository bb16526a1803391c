"""Artifact folders: written whole or not at all, checked before they are used."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from qc.errors import ArtifactError, InputError
from qc.runtime import Artifact, load
from qc.runtime.machine import cpu_features
from qc.runtime.package import ArtifactWriter
from tests.runtime import toy

PROMPT = [3, 1, 4]
EXPECTED = toy.expected_tokens(PROMPT, 4)


def test_saving_and_loading_keeps_everything(artifact: Artifact, tmp_path: Path) -> None:
    path = artifact.save(tmp_path / "deep" / "copy.qc")
    copy = load(path, verify=True)
    assert copy.generate(PROMPT, 4) == EXPECTED
    assert {f.name for f in path.iterdir()} == {f.name for f in artifact.path.iterdir()}
    assert artifact.save(artifact.path) == artifact.path.absolute()
    assert "cpu-toy" in repr(copy)


def test_an_artifact_is_replaced_at_once_and_the_old_one_still_runs(tmp_path: Path) -> None:
    first = load(toy.write_artifact(tmp_path / "m"))
    second = load(toy.write_artifact(tmp_path / "n", seed=1))
    second.save(tmp_path / "m")
    assert first.generate(PROMPT, 4) == EXPECTED
    assert load(tmp_path / "m").generate(PROMPT, 4) == toy.expected_tokens(PROMPT, 4, seed=1)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m", "n"]


def test_what_is_no_artifact_is_not_overwritten(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is not an artifact; it is not overwritten"):
        artifact.save(tmp_path / "photos")
    with pytest.raises(ArtifactError, match="exists and is not a folder"):
        artifact.save(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    artifact.save(tmp_path / "empty")
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_compile_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def compile_and_fail() -> None:
        with ArtifactWriter(tmp_path / "m") as writer:
            writer.add("ir/captured.txt", b"graph")
            raise error

    with pytest.raises(error):
        compile_and_fail()
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(ArtifactError, match="cannot be a file"),
        ArtifactWriter(tmp_path / "m") as writer,
    ):
        writer.add("../escape", b"")


def test_a_temporary_artifact_goes_with_its_last_user(tmp_path: Path) -> None:
    path = toy.write_artifact(tmp_path / "m")
    artifact = load(path, temporary=True)
    saved = artifact.save(tmp_path / "n")
    del artifact
    assert not path.exists()
    assert load(saved).generate(PROMPT, 4) == EXPECTED


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="absent does not exist"):
        load(tmp_path / "absent")
    with pytest.raises(ArtifactError, match=r"is not an artifact \(no manifest.json\)"):
        load(tmp_path)
    path = toy.write_artifact(tmp_path / "m")
    weights = path / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    weights.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"weights.safetensors is corrupt: it has \d+ bytes"):
        load(path)
    content[-1] ^= 1
    weights.write_bytes(content)
    load(path)  # the sums of large files are compared on demand
    with pytest.raises(ArtifactError, match=r"weights.safetensors is corrupt: its SHA-256"):
        load(path, verify=True)
    with pytest.raises(ArtifactError, match="is corrupt"):
        load(path).save(tmp_path / "n")
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"has no file weights\.safetensors"):
        load(path)
    weights.symlink_to("/etc/passwd")
    with pytest.raises(ArtifactError, match=r"has no file weights\.safetensors"):
        load(path)


def test_a_changed_library_is_not_loaded(tmp_path: Path) -> None:
    path = toy.write_artifact(tmp_path / "m")
    content = bytearray((path / "model.so").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "model.so").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model.so is corrupt: its SHA-256"):
        load(path)


def test_files_that_the_model_needs_must_be_listed(tmp_path: Path) -> None:
    path = toy.write_artifact(tmp_path / "m")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["model.so"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"lists no model\.so, which the model needs"):
        load(path)


def test_weights_must_be_what_the_manifest_says(tmp_path: Path) -> None:
    manifest = toy.language_manifest()
    values = [*manifest.values]
    values[1] = replace(values[1], shape=(40, 12))
    path = toy.write_artifact(tmp_path / "a", replace(manifest, values=tuple(values)))
    with pytest.raises(
        ArtifactError, match=r"'table' is f32\[40, 12\] in the manifest and float32"
    ):
        load(path)
    values[1] = replace(manifest.values[1], tensor="model.tabel")
    path = toy.write_artifact(tmp_path / "b", replace(manifest, values=tuple(values)))
    with pytest.raises(ArtifactError, match=r"no tensor 'model.tabel' .did you mean .model.table"):
        load(path)


def test_artifacts_for_other_machines_are_refused(tmp_path: Path) -> None:
    manifest = toy.language_manifest()
    target = replace(manifest.target, features=(*sorted(cpu_features())[:3], "avx9000"))
    path = toy.write_artifact(tmp_path / "m", replace(manifest, target=target))
    with pytest.raises(ArtifactError, match=r"built for a CPU with avx9000; this machine has not"):
        load(path)
    path = toy.write_artifact(
        tmp_path / "n", replace(manifest, target=replace(manifest.target, arch="riscv64"))
    )
    with pytest.raises(ArtifactError, match=r"built for riscv64; this machine is"):
        load(path)


def test_an_artifact_can_be_inspected(tmp_path: Path) -> None:
    path = toy.write_artifact(
        tmp_path / "m", source__embed_dot_c=b"int embed;", ir__captured_dot_txt=b"%x = ..."
    )
    artifact = load(path)
    assert artifact.plan.splitlines()[2] == "   2  %y = mix(%state, %y, past)   # toy.mix"
    assert artifact.source("embed") == "int embed;"
    assert artifact.sources == ["embed"]
    assert artifact.ir("captured") == "%x = ..."
    assert artifact.stages == ["captured"]
    with pytest.raises(InputError, match=r"no kernel source 'embd' .did you mean \"embed\""):
        artifact.source("embd")
    with pytest.raises(InputError, match="no stage"):
        artifact.ir("quantized")
    assert artifact.report().to_dict()["rows"][0]["layer"] == "table"
    assert str(artifact.report()).splitlines() == [
        "layer  format  bits  bytes",
        "-----  ------  ----  -----",
        "table  f32       32  1,968",
        "",
        "bits per weight  32",
    ]


def test_written_folders_are_readable_by_others(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        path = toy.write_artifact(tmp_path / "m")
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o755
