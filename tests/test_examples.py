"""The examples run as the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_pipeline_example_runs_and_its_numbers_agree() -> None:
    command = [sys.executable, "examples/pipeline.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "int4·g32" in done.stdout
    assert "int8·g32" in done.stdout  # the wide matrices, as its own pass decides
    error = re.search(r"relative error (\S+)", done.stdout)
    assert error
    assert float(error[1]) < 5e-3  # a rounding that flips moves a token of this width by 1e-2
