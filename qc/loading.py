"""Load any artifact: the manifest names the executor, which is imported when it is needed."""

from __future__ import annotations

import os
from pathlib import Path

from qc.runtime.artifact import Artifact, compiled_program, open_artifact, read_manifest
from qc.runtime.manifest import TORCH


def load(
    path: str | os.PathLike[str], *, verify: bool = False, temporary: bool = False
) -> Artifact:
    """Load an artifact, whichever backend wrote it. Weights are mapped into memory, not read.

    `verify` also compares the SHA-256 of every file. `temporary` deletes the folder when the
    artifact is no longer used. Raises ArtifactError for a folder that is missing, corrupt, of
    another format, or for another machine.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    open_program = compiled_program
    if manifest.executor == TORCH:
        from qc.backends.torch.artifact import open_program  # loads torch
    return open_artifact(folder, manifest, open_program, verify=verify, temporary=temporary)
