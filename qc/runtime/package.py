"""Write artifact folders, whole or not at all."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from qc.errors import ArtifactError
from qc.runtime.manifest import MANIFEST, WEIGHTS, FileEntry, Manifest, is_file_name
from qc.runtime.safetensors_file import TensorSource, write_safetensors

__all__ = ["ArtifactWriter", "check_place", "copy_artifact", "file_entry"]


class ArtifactWriter:
    """Build an artifact beside its place, and put it there in one step.

        with ArtifactWriter("model.qc") as writer:
            writer.add_weights(tensors)
            writer.add("model.so", path_of_library)
            writer.add("ir/captured.txt", text.encode())
            writer.finish(manifest)

    Leaving the block without `finish` (an error, an interrupt) leaves nothing behind. An artifact
    that was at the place is replaced; anything else there is refused, when the block is entered.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._files: dict[str, FileEntry] = {}

    def __enter__(self) -> ArtifactWriter:
        _refuse_foreign(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._folder = self.path.with_name(f".{self.path.name}.{token_hex(6)}.partial")
            self._folder.mkdir()
        except OSError as error:
            raise ArtifactError(f"cannot write to {self.path.parent}: {error.strerror}") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def file(self, name: str) -> Path:
        """Return where to write a file by this name; `keep` must be called when it is complete."""
        if not is_file_name(name) or name == MANIFEST:
            raise ArtifactError(f"{name!r} cannot be a file of an artifact")
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def keep(self, name: str) -> None:
        """Take a file that was written to `file(name)` into the artifact."""
        self._files[name] = file_entry(self._folder / name)

    def add(self, name: str, content: bytes | Path) -> None:
        """Add a file: its bytes, or a path to copy it from."""
        path = self.file(name)
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_bytes(content)
        self.keep(name)

    def add_weights(self, tensors: Mapping[str, TensorSource | NDArray[Any]]) -> None:
        """Write the weights file, one tensor in memory at a time."""
        write_safetensors(self.file(WEIGHTS), tensors)
        self.keep(WEIGHTS)

    def finish(self, manifest: Manifest) -> Path:
        """Write the manifest with its table of files, and move everything to its place."""
        self._place(replace(manifest, files=self._files).to_json())
        return self.path

    def finish_described(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Finish a folder that is no artifact but has a manifest of its own kind: `content`, to
        which the table of files is added. Return it."""
        files = {name: asdict(entry) for name, entry in sorted(self._files.items())}
        complete = {**content, "files": files}
        raw = json.dumps(complete, indent=1, ensure_ascii=False, allow_nan=False)
        self._place(raw.encode())
        return complete

    def _place(self, manifest: bytes) -> None:
        """Write the manifest and move everything to its place."""
        (self._folder / MANIFEST).write_bytes(manifest)
        _put_in_place(self._folder, self.path)


def copy_artifact(source: Path, manifest: Manifest, path: str | os.PathLike[str]) -> Path:
    """Copy the artifact at `source` to `path`, atomically. Raises ArtifactError."""
    target = Path(path).absolute()
    if target.exists() and target.samefile(source):
        return target
    with ArtifactWriter(target) as writer:
        for name, entry in manifest.files.items():
            writer.add(name, source / name)
            if writer._files[name] != entry:
                raise ArtifactError(f"{source / name} is corrupt: it is not what the manifest says")
        return writer.finish(manifest)


def file_entry(path: Path) -> FileEntry:
    """Measure a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(file.tell(), digest)


def check_place(path: str | os.PathLike[str]) -> None:
    """Raise ArtifactError unless an artifact can be written to `path`; change nothing."""
    place = Path(path).absolute()
    _refuse_foreign(place)
    parent = next(folder for folder in place.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "permission denied" if parent.is_dir() else f"{parent} is not a folder"
        raise ArtifactError(f"cannot write to {place.parent}: {reason}")


def _refuse_foreign(path: Path) -> None:
    """Raise ArtifactError if something that is no artifact is at `path`."""
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise ArtifactError(f"{path} exists and is not a folder")
    if any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path} exists and is not an artifact; it is not overwritten")


def _put_in_place(folder: Path, path: Path) -> None:
    """Rename `folder` to `path`; what is there comes to `folder`."""
    _refuse_foreign(path)
    path = path.resolve()  # a link to a folder stays, and its target is replaced
    try:
        os.rename(folder, path)  # works if there is nothing, or an empty folder
    except OSError:
        if not _exchange(folder, path):  # no such call here: a short moment without either
            old = folder.with_suffix(".old")
            os.rename(path, old)
            os.rename(folder, path)
            shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step (Linux renameat2); False where the system cannot."""
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(renameat2(here, os.fsencode(first), here, os.fsencode(second), swap) == 0)
