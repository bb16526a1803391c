"""Run linear cases in Triton's interpreter: one JSON case a line comes in, its error goes out.

A process of its own, because Triton decides whether it interprets when it is imported, for all of
its life; other tests of the same run compile. `python -m tests.backends.triton.linear_worker`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict
from typing import Any

from tests.backends.triton.cases import Case, interpreted


class Interpreter:
    """The process; started once, when the first case comes."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.backends.triton.linear_worker"]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        return self.process

    def error(self, case: Case) -> float:
        """Return the relative error of a case; RuntimeError with the traceback where it fails."""
        process = self.process or self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asdict(case)) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return float(answer["error"])

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def main() -> None:
    """Answer cases until the input ends."""
    import traceback

    import torch

    from qc.backends.triton.interpret import install

    install()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # numpy's, of overflows that the kernels allow
    for line in sys.stdin:
        try:
            print(json.dumps({"error": Case(**json.loads(line)).error(interpreted)}), flush=True)
        except Exception:  # noqa: BLE001  whatever fails is the answer
            print(json.dumps({"failed": traceback.format_exc()}), flush=True)


if __name__ == "__main__":
    main()
