"""Greedy generation beside OpenVINO: in turn, the same prompt, medians, ratios pair by pair."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import qc

PROMPT = "The history of the city of Paris begins with"


@dataclass(frozen=True)
class Comparison:
    """Milliseconds per token, all in, of both sides of each pair, and what bounds them."""

    ours: tuple[float, ...]
    peers: tuple[float, ...]
    floor: float
    """Stored bytes of the linears over the measured read bandwidth, in ms: what one token costs
    if nothing is in a cache."""

    @property
    def ratio(self) -> float:
        """Median over the pairs of peer / ours."""
        return statistics.median(p / o for p, o in zip(self.peers, self.ours, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {
            "qc_ms_per_token": statistics.median(self.ours),
            "openvino_ms_per_token": statistics.median(self.peers),
            "ratio_median_of_pairs": self.ratio,
            "floor_ms_per_token": self.floor,
            "pairs": [list(pair) for pair in zip(self.ours, self.peers, strict=True)],
        }


class OpenVino:
    """A running worker in the peer's environment."""

    def __init__(self, python: Path, folder: Path, threads: int) -> None:
        worker = Path(__file__).with_name("openvino_worker.py")
        self.process = subprocess.Popen(
            [str(python), str(worker), str(folder), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.load_seconds = self.read()["load_seconds"]

    def read(self) -> dict[str, Any]:
        """Return the worker's next answer."""
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def generate(self, prompt: str, tokens: int) -> dict[str, Any]:
        """Generate and return times."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End the worker."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def read_bandwidth(megabytes: int = 1024, repeats: int = 5) -> float:
    """Measure how fast all cores together read memory, in bytes a second (best of `repeats`)."""
    from concurrent.futures import ThreadPoolExecutor

    cores = len(os.sched_getaffinity(0))
    parts = [np.ones(megabytes * 2**20 // 4 // cores, np.float32) for _ in range(cores)]
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, sum(p.nbytes for p in parts) / (time.perf_counter() - start))
    return best


def timed(run: Callable[[], int]) -> float:
    """Return milliseconds per token of a call that returns how many tokens it made."""
    start = time.perf_counter()
    made = run()
    return 1e3 * (time.perf_counter() - start) / made


def compare_generation(
    artifact: qc.Artifact, peer: OpenVino, tokens: int = 128, pairs: int = 9
) -> Comparison:
    """Time both sides in turn; tokenizing, prefill and choosing tokens are part of it."""

    def ours() -> int:
        ids = artifact.text.encode(PROMPT)
        session = artifact.session()
        logits = session.prefill([ids])
        for _ in range(tokens - 1):
            logits = session.step([int(logits[0].argmax())])
        return tokens

    def theirs() -> float:
        answer = peer.generate(PROMPT, tokens)
        return 1e3 * float(answer["seconds"]) / float(answer["tokens"])

    timed(ours), theirs()
    measured = [(timed(ours), theirs()) for _ in range(pairs)]
    linear_bytes = artifact.report().to_dict()["summary"]["linear_bytes"]
    floor = 1e3 * linear_bytes / read_bandwidth()
    return Comparison(tuple(a for a, _ in measured), tuple(b for _, b in measured), floor)
