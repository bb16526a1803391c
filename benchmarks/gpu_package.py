"""Compare a GPU package with the artifact of the same model, token by token and in time.

    python -m benchmarks.gpu_package make FOLDER       builds both, anywhere: cuda:sm_90-w4
    python -m benchmarks.gpu_package compare FOLDER    on a GPU: qc.runtime and numpy are enough

The model has the shapes of SmolLM2-135M in four blocks, a vocabulary of 4096, and random weights.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from qc.runtime import Artifact, load

TARGET, BLOCKS, VOCABULARY, CONTEXT, TOKENS = "cuda:sm_90-w4", 4, 4096, 1024, 128
LENGTHS = (1, 2, 5, 16, 17, 40, 100, 600)
"""Of prompts: other kernels take other numbers of rows, and the last takes two calls."""


def make(folder: Path) -> None:
    """Build package and artifact."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import qc
    from qc.compiler import build

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=BLOCKS, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    build(folder / "model", TARGET, folder / "package")
    qc.compile(folder / "model", TARGET, output=folder / "artifact.qc")


def run_package(folder: Path, prompt: list[int]) -> tuple[list[int], str]:
    """Return greedy tokens of the package, and what it says of time."""
    place = folder / "package"
    command = [place / "runner", place / "weights.qcw", " ".join(map(str, prompt)),
               "--ids", "--stats", "-n", str(TOKENS)]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the package failed: {done.stderr}")
    return list(map(int, done.stdout.split())), "; ".join(done.stderr.splitlines())


def run_artifact(artifact: Artifact, prompt: list[int]) -> tuple[list[int], float]:
    """Return greedy tokens of the artifact, and the milliseconds of one."""
    session, found = artifact.session(), list[int]()
    session.reserve(CONTEXT)
    logits = session.prefill(prompt)
    start = time.perf_counter()
    for _ in range(TOKENS):
        found.append(int(np.argmax(logits[0])))
        logits = session.step(found[-1])
    return found, 1e3 * (time.perf_counter() - start) / TOKENS


def compare(folder: Path) -> None:
    """Print a line a prompt. Exit with 1 where any token differs."""
    artifact = load(folder / "artifact.qc")
    wrong = artifact.verify().wrong
    print(f"golden outputs of the artifact: {'wrong' if wrong else 'right'}")
    random = np.random.default_rng(0)
    differing = 0
    for length in LENGTHS:
        prompt = random.integers(0, VOCABULARY, length).tolist()
        found, said = run_package(folder, prompt)
        expected, milliseconds = run_artifact(artifact, prompt)
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        differing += same != TOKENS
        print(
            f"prompt of {length}: {same} of {TOKENS} tokens equal; artifact {milliseconds:.3f} ms "
            f"a token; package: {said}"
        )
    sys.exit(bool(wrong) or bool(differing))


if __name__ == "__main__":
    {"make": make, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
