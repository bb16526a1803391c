"""Contenders as running processes, asked in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.peers import Contender

Answer = dict[str, Any]


class Refusal(Exception):
    """A contender cannot do what was asked: the message is its own."""


class Running:
    """A worker that has said that it is ready. `ready_seconds` counts from the start of its
    process."""

    def __init__(self, contender: Contender, threads: int) -> None:
        start = time.perf_counter()
        self.process = subprocess.Popen(
            contender.command(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
            text=True,
        )
        self.read()
        self.ready_seconds = time.perf_counter() - start

    def ask(self, **request: Any) -> Answer:
        """Return the worker's answer; Refusal where it is an error."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> Answer:
        """Return the next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Refusal(f"the worker ended with {self.process.wait()}")
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise Refusal(str(answer["error"]))
        return answer

    def close(self) -> None:
        """End the worker."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def all_running(
    contenders: Mapping[str, Contender], threads: int
) -> Iterator[tuple[dict[str, Running], dict[str, str]]]:
    """Start a worker of each contender; yield those that are ready, and why the others are not."""
    running: dict[str, Running] = {}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        for name, contender in contenders.items():
            try:
                running[name] = Running(contender, threads)
                stack.callback(running[name].close)
            except (Refusal, OSError) as error:
                failed[name] = str(error)
        yield running, failed


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` processes computing."""
    spin = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@dataclass
class Rounds:
    """One figure of every contender, measured in turn."""

    unit: str
    smaller_is_better: bool
    found: dict[str, list[float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def measure(self, names: list[str], rounds: int, once: Callable[[str, int], float]) -> Rounds:
        """Ask `once(name, round)` of every contender in turn; round 0 is not counted."""
        for number in range(rounds + 1):
            self.turn(names, number, once)
        return self

    def turn(self, names: list[str], number: int, once: Callable[[str, int], float]) -> None:
        """Measure one round."""
        for name in names:
            if name in self.refused:
                continue
            try:
                value = once(name, number)
            except Refusal as error:
                self.refused[name] = str(error)
                continue
            if number:
                self.found.setdefault(name, []).append(value)

    def to_dict(self, ours: str) -> dict[str, Any]:
        """Return medians, all values, and how many times better `ours` is, pair by pair."""
        content: dict[str, Any] = {
            "unit": self.unit,
            "median": {name: statistics.median(values) for name, values in self.found.items()},
            "values": self.found,
            "refused": self.refused,
        }
        own = self.found.get(ours)
        if own:
            content["times_better_than"] = {
                name: ratio(values, own) if self.smaller_is_better else ratio(own, values)
                for name, values in self.found.items()
                if name != ours
            }
        return content


def ratio(above: list[float], below: list[float]) -> float:
    """Return the median of the ratios pair by pair."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def read_bandwidth(threads: int, megabytes: int = 1024, repeats: int = 5) -> float:
    """Measure how fast `threads` threads together read memory, in bytes a second (the best)."""
    from concurrent.futures import ThreadPoolExecutor

    parts = [np.ones(megabytes * 2**20 // 4 // threads, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, sum(p.nbytes for p in parts) / (time.perf_counter() - start))
    return best
