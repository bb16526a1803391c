"""Install peers in environments of their own under build/peers, and convert the model for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PEERS = Path("build/peers")
OPENVINO = ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0", "torch==2.13.0")


def openvino_python() -> Path:
    """Return the Python of OpenVINO's environment, made on the first call."""
    folder = PEERS / "openvino"
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    if not stamp.exists():
        run([sys.executable, "-m", "venv", str(folder)])
        run([str(python), "-m", "pip", "install", "--quiet", *OPENVINO])
        # optimum-intel brings torchvision, built for CUDA, which breaks beside a CPU torch
        run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"])
        stamp.touch()
    return python


def openvino_model(model: Path) -> Path:
    """Convert a Hugging Face folder as OpenVINO's users do: int4, groups of 32, int8 head."""
    folder = PEERS / f"{model.name}-openvino-int4"
    if not (folder / "openvino_model.xml").exists():
        command = [str(openvino_python().parent / "optimum-cli"), "export", "openvino"]
        options = ["--weight-format", "int4", "--group-size", "32", "--sym", "--ratio", "1.0"]
        task = ["--task", "text-generation-with-past"]
        run([*command, "-m", str(model), *task, *options, str(folder)])
    return folder


def run(command: list[str]) -> None:
    """Run a command; what it prints goes to standard error."""
    print("+", *command, file=sys.stderr)
    subprocess.run(command, check=True, stdout=sys.stderr)
