"""The main job on a real model: compile SmolLM2-135M-Instruct to int4, generate, compare.

python examples/demo.py MODEL_FOLDER TEXT_FILE [OUTPUT]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

import qc
from qc.evaluation import evaluate_windows, windows_of

PROMPT = "Explain in two sentences why the sky is blue."
WINDOWS = 16  # of 512 tokens: enough for a stable comparison, a minute of work


def main(folder: str, text_file: str, output: str = "build/smollm2.qc") -> None:
    """Compile, generate, and print what it cost and what it brought."""
    start = time.perf_counter()
    artifact = qc.compile(folder, target="cpu-w4", output=output, progress=True)
    compiled = time.perf_counter() - start
    summary = artifact.report().to_dict()["summary"]

    print(f"> {PROMPT}")
    for piece in artifact.stream_text(PROMPT, 80, chat=True):
        print(piece, end="", flush=True)
    print("\n")

    text = Path(text_file).read_text(encoding="utf-8")
    windows = windows_of(artifact.text.encode(text, special_tokens=False), 512, WINDOWS)
    original = qc.trace(folder).quantize("f32")

    def reference(ids: np.ndarray) -> np.ndarray:
        return original(input_ids=torch.from_numpy(ids))["logits"].numpy()

    result = evaluate_windows(artifact, windows, reference)
    stored = sum(entry.bytes for entry in artifact.manifest.files.values())
    before = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    print(f"compiled in             {compiled:.1f} s (without importing torch)")
    print(f"size before             {before / 1e6:.1f} MB (float32)")
    print(f"size after              {stored / 1e6:.1f} MB")
    print(f"bits per linear weight  {summary['bits_per_linear_weight']:.3f}")
    print(result)
    print(f"ms per token            {milliseconds_per_token(artifact):.2f} (best of three)")


def milliseconds_per_token(artifact: qc.Artifact, count: int = 128, repeats: int = 3) -> float:
    """Return the best of `repeats` greedy generations, everything included."""
    prompt = artifact.text.encode("The history of the city of Paris begins with")
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        made = sum(1 for _ in artifact.stream(prompt, count))
        best = min(best, (time.perf_counter() - start) / max(1, made))
    return 1e3 * best


if __name__ == "__main__":
    main(*sys.argv[1:])
