"""Fixtures of the runtime's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from qc.runtime import Artifact, load
from tests.runtime import toy


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """Load the toy language model from a folder of its own."""
    return load(toy.write_artifact(tmp_path / "toy.qc"))
