"""The parts of the benchmark: each returns what goes into the results under its name."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import qc
from benchmarks.contest import (
    Refusal,
    Rounds,
    Running,
    all_running,
    busy_processes,
    ratio,
    read_bandwidth,
)
from benchmarks.peers import Contender
from qc.evaluation import windows_of

PROMPT = "The history of the city of Paris begins with"
TOKENS = 128
LONG_CONTEXT, LONG_TOKENS = 2000, 32
PREFILL = 512
BATCH = 8
WINDOW, WINDOWS = 512, 64

Result = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all parts know. `ours` is the contender that the others are compared with."""

    model: Path
    text: str
    contenders: dict[str, Contender]
    ours: str
    threads: int
    rounds: int
    target: str

    def prompt(self, tokens: int, number: int) -> str:
        """Return a text of about `tokens` tokens, another one for each number: what a contender
        keeps of one prompt is of no use for the next."""
        text: str = self.tokenizer.decode(self.tokens[number * tokens :][:tokens])
        return text

    @cached_property
    def tokenizer(self) -> Any:
        return qc.load(self.contenders[self.ours].model).text

    @cached_property
    def tokens(self) -> list[int]:
        found: list[int] = self.tokenizer.encode(self.text, special_tokens=False)
        return found


# ---------------------------------------------------------------- without running


def machine(setting: Setting) -> Result:
    """Name the CPU, and measure the rate at which its memory is read."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line for line in lines if line.startswith("model name")), "?: unknown")
    return {
        "cpu": name.split(":")[1].strip(),
        "threads": setting.threads,
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "read_bytes_a_second": read_bandwidth(setting.threads),
        "load_average": os.getloadavg()[0],
    }


def size(setting: Setting) -> Result:
    """Count stored bytes: what is needed to run, the tokenizer apart."""
    linear = qc.load(setting.contenders[setting.ours].model).report().to_dict()["summary"]
    return {
        "stored_bytes": {name: each.bytes for name, each in setting.contenders.items()},
        "linear_bytes": linear["linear_bytes"],
    }


def compile_time(setting: Setting) -> Result:
    """Compile in a process of its own, three times; beside it, how long peers took to convert."""
    output = Path("build/bench-compile.qc")
    code = (
        "import re, sys, time; start = time.perf_counter()\n"
        "import qc\n"
        "qc.compile(sys.argv[1], sys.argv[2], output=sys.argv[3])\n"
        "print(time.perf_counter() - start, "  # ru_maxrss would count what this process had
        "re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    command = [sys.executable, "-c", code, str(setting.model), setting.target, str(output)]
    runs = []
    for _ in range(3):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append([float(word) for word in done.stdout.split()[-2:]])
    float_bytes = sum(path.stat().st_size for path in setting.model.glob("*.safetensors"))
    return {
        "seconds": sorted(seconds for seconds, _ in runs),
        "peak_bytes": max(int(1024 * kilobytes) for _, kilobytes in runs),
        "model_bytes": float_bytes,
        "peers_convert_seconds": {
            name: each.prepare_seconds
            for name, each in setting.contenders.items()
            if each.prepare_seconds is not None
        },
    }


# ---------------------------------------------------------------- speed


def decode_once(running: dict[str, Running]) -> Callable[[str, int], float]:
    """Return what measures ms per token of greedy generation after a short prompt, all in."""

    def once(name: str, number: int) -> float:
        answer = running[name].ask(do="generate", prompts=[PROMPT], tokens=TOKENS)
        return 1e3 * float(answer["seconds"]) / TOKENS

    return once


def decode(setting: Setting) -> Result:
    """128 greedy tokens after a short prompt: tokenizing, prompt, tokens, text."""
    with all_running(setting.contenders, setting.threads) as (running, failed):
        rounds = Rounds("ms a token", True, refused=failed)
        rounds.measure(list(running), setting.rounds, decode_once(running))
    return rounds.to_dict(setting.ours)


def context(setting: Setting) -> Result:
    """Greedy tokens after 2,000 tokens of context, the prompt not counted."""

    def once(name: str, number: int) -> float:
        prompts = [setting.prompt(LONG_CONTEXT, number)]
        answer = running[name].ask(do="generate", prompts=prompts, tokens=LONG_TOKENS)
        seconds = float(answer["seconds"]) - float(answer["first_token_seconds"])
        return 1e3 * seconds / (LONG_TOKENS - 1)

    with all_running(setting.contenders, setting.threads) as (running, failed):
        rounds = Rounds("ms a token", True, refused=failed)
        rounds.measure(list(running), setting.rounds, once)
    return rounds.to_dict(setting.ours)


def prefill(setting: Setting) -> Result:
    """A prompt of 512 tokens, until the first token is there."""

    def once(name: str, number: int) -> float:
        prompts = [setting.prompt(PREFILL, number)]
        answer = running[name].ask(do="generate", prompts=prompts, tokens=1)
        return float(answer["prompt_tokens"]) / float(answer["seconds"])

    with all_running(setting.contenders, setting.threads) as (running, failed):
        rounds = Rounds("tokens a second", False, refused=failed)
        rounds.measure(list(running), setting.rounds, once)
    return rounds.to_dict(setting.ours)


def batch(setting: Setting) -> Result:
    """Eight sequences at a time against one: tokens a second of all together."""

    def rate(count: int) -> Callable[[str, int], float]:
        def once(name: str, number: int) -> float:
            answer = running[name].ask(do="generate", prompts=[PROMPT] * count, tokens=TOKENS)
            return count * TOKENS / float(answer["seconds"])

        return once

    with all_running(setting.contenders, setting.threads) as (running, failed):
        single = Rounds("tokens a second", False, refused=dict(failed))
        several = Rounds("tokens a second", False, refused=dict(failed))
        for number in range(setting.rounds + 1):  # in turn, so that pairs are close in time
            single.turn(list(running), number, rate(1))
            several.turn(list(running), number, rate(BATCH))
    return gain(single, several, setting.ours)


def threads(setting: Setting) -> Result:
    """One thread against two (or as many as are asked for): ms a token."""
    with (
        all_running(setting.contenders, 1) as (alone, failed),
        all_running(setting.contenders, setting.threads) as (together, _),
    ):
        one = Rounds("ms a token", True, refused=dict(failed))
        many = Rounds("ms a token", True, refused=dict(failed))
        for number in range(setting.rounds + 1):
            one.turn(list(alone), number, decode_once(alone))
            many.turn(list(together), number, decode_once(together))
    return gain(many, one, setting.ours)


def busy(setting: Setting) -> Result:
    """With two processes that compute all the time beside it: ms a token, and times slower."""
    with all_running(setting.contenders, setting.threads) as (running, failed):
        quiet = Rounds("ms a token", True, refused=dict(failed))
        loud = Rounds("ms a token", True, refused=dict(failed))
        for number in range(setting.rounds + 1):
            quiet.turn(list(running), number, decode_once(running))
            with busy_processes(2):
                loud.turn(list(running), number, decode_once(running))
    return gain(quiet, loud, setting.ours)


def gain(before: Rounds, after: Rounds, ours: str) -> Result:
    """Return two measurements of the same contenders and the ratio after / before of each."""
    return {
        "before": before.to_dict(ours),
        "after": after.to_dict(ours),
        "ratio": {
            name: ratio(after.found[name], values)
            for name, values in before.found.items()
            if len(after.found.get(name, [])) == len(values)
        },
    }


# ---------------------------------------------------------------- memory, loading, accuracy


def load(setting: Setting) -> Result:
    """Start of a fresh process to ready, and to the first token; peak memory after 128 tokens and
    after a prompt of 2,000."""

    def once(name: str, number: int) -> float:
        runner = Running(setting.contenders[name], setting.threads)
        try:
            if number == 0:
                runner.ask(do="generate", prompts=[PROMPT], tokens=TOKENS)
                short[name] = runner.ask(do="memory")["peak_bytes"]
                prompts = [setting.prompt(LONG_CONTEXT, 0)]
                runner.ask(do="generate", prompts=prompts, tokens=2)
                long[name] = runner.ask(do="memory")["peak_bytes"]
            else:
                start = time.perf_counter()
                runner.ask(do="generate", prompts=[PROMPT], tokens=1)
                seconds = runner.ready_seconds + time.perf_counter() - start
                first.setdefault(name, []).append(seconds)
            return runner.ready_seconds
        finally:
            runner.close()

    short: dict[str, int] = {}
    long: dict[str, int] = {}
    first: dict[str, list[float]] = {}
    ready = Rounds("seconds", True).measure(list(setting.contenders), min(5, setting.rounds), once)
    return {
        "ready": ready.to_dict(setting.ours),
        "first_token": {name: sorted(values)[len(values) // 2] for name, values in first.items()},
        "peak_bytes": short,
        "peak_bytes_long_prompt": long,
    }


def accuracy(setting: Setting) -> Result:
    """Perplexity over windows that are predicted from nothing but themselves."""
    windows = [window[0].tolist() for window in windows_of(setting.tokens, WINDOW, WINDOWS)]
    found: dict[str, float] = {}
    refused: dict[str, str] = {}
    with all_running(setting.contenders, setting.threads) as (running, failed):
        refused |= failed
        for name, runner in running.items():
            try:
                answer = runner.ask(do="surprise", windows=windows)
                found[name] = math.exp(float(answer["nats"]) / float(answer["tokens"]))
            except Refusal as error:
                refused[name] = str(error)
    predicted = sum(len(window) - 1 for window in windows)
    return {"tokens": predicted, "perplexity": found, "refused": refused}


PARTS: dict[str, Callable[[Setting], Result]] = {
    "machine": machine,
    "size": size,
    "decode": decode,
    "context": context,
    "prefill": prefill,
    "batch": batch,
    "threads": threads,
    "busy": busy,
    "load": load,
    "accuracy": accuracy,
    "compile": compile_time,
}
