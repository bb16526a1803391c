"""Compile the real model, compare it with OpenVINO, write JSON and a table.

python -m benchmarks MODEL_FOLDER TEXT_FILE [OUTPUT.json]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import qc
from benchmarks.generation import OpenVino, compare_generation
from benchmarks.peers import openvino_model, openvino_python
from qc.evaluation import evaluate_windows, windows_of

ARTIFACT = Path("build/bench.qc")
FIRST_TOKEN = """
import time; start = time.perf_counter()
import sys, qc
artifact = qc.load(sys.argv[1])
next(artifact.stream_text("The history of", 1))
print(time.perf_counter() - start)
"""


def main(folder: str, text_file: str, output: str = "build/bench.json") -> None:
    """Measure everything; what is known is written after every part."""
    results: dict[str, Any] = {"threads": len(os.sched_getaffinity(0))}

    def add(**found: Any) -> None:
        results.update(found)
        Path(output).write_text(json.dumps(results, indent=1))
        print(json.dumps(found, indent=1), flush=True)

    python, converted = openvino_python(), openvino_model(Path(folder))
    start = time.perf_counter()
    artifact = qc.compile(folder, "cpu-w4", output=ARTIFACT)
    add(compile_seconds=time.perf_counter() - start)
    add(load_to_first_token_seconds=load_to_first_token())
    add(
        summary=artifact.report().to_dict()["summary"],
        qc_bytes=sum(entry.bytes for entry in artifact.manifest.files.values()),
        openvino_bytes=sum(f.stat().st_size for f in converted.glob("openvino_model.*")),
    )
    peer = OpenVino(python, converted, results["threads"])
    add(generation=compare_generation(artifact, peer).to_dict())
    peer.close()
    add(accuracy=accuracy(folder, artifact, text_file))


def load_to_first_token() -> float:
    """Time a fresh process from its first line to the first piece of text; best of three."""
    command = [sys.executable, "-c", FIRST_TOKEN, str(ARTIFACT)]
    runs = (subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(3))
    return min(float(run.stdout) for run in runs)


def accuracy(folder: str, artifact: qc.Artifact, text_file: str) -> dict[str, Any]:
    """Perplexity and divergence over 64 windows of 512 tokens, for w4, w4a16 and float."""
    import numpy as np
    import torch

    text = Path(text_file).read_text(encoding="utf-8")
    windows = windows_of(artifact.text.encode(text, special_tokens=False), 512, 64)
    original = qc.trace(folder).quantize("f32")

    def reference(ids: np.ndarray) -> np.ndarray:
        return original(input_ids=torch.from_numpy(ids))["logits"].numpy()

    w4 = evaluate_windows(artifact, windows, reference)
    w4a16 = evaluate_windows(qc.compile(folder, "cpu-w4a16"), windows)
    return {
        "tokens": w4.tokens,
        "perplexity": {
            "float": w4.reference_perplexity,
            "w4": w4.perplexity,
            "w4a16": w4a16.perplexity,
        },
        "w4_divergence": w4.divergence,
        "w4_agreement": w4.agreement,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
