"""Measure qc: qc_worker.py ARTIFACT THREADS (requests: see serving.py)."""

from __future__ import annotations

import sys
import time

import numpy as np
from serving import Answer, nats_of, serve

import qc


def main() -> None:
    """Answer requests."""
    artifact = qc.load(sys.argv[1])
    artifact.set_threads(int(sys.argv[2]))

    def generate(prompts: list[str], tokens: int) -> Answer:
        start = time.perf_counter()
        rows = [artifact.text.encode(prompt) for prompt in prompts]
        session = artifact.session(len(rows))
        logits = session.prefill(rows)
        made = [logits.argmax(-1)]
        first = time.perf_counter() - start
        for _ in range(tokens - 1):
            made.append(session.step(made[-1].tolist()).argmax(-1))
        for row in np.stack(made, axis=1):
            artifact.text.decode(row.tolist())
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds, "first_token_seconds": first,
            "tokens": tokens, "prompt_tokens": len(rows[0]),
        }  # fmt: skip

    def surprise(windows: list[list[int]]) -> Answer:
        nats = sum(nats_of(artifact(np.array([ids]))[0], ids) for ids in windows)
        return {"nats": nats, "tokens": sum(len(ids) - 1 for ids in windows)}

    serve(generate=generate, surprise=surprise)


if __name__ == "__main__":
    main()
