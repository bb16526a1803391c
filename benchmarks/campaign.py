"""Many configurations on one model, several at once: one JSON line for each as it is finished.

    python -m benchmarks.campaign MODEL --device cuda --workers 8 -o results.jsonl
    python -m benchmarks.campaign MODEL --only 'gptq3|rtn3' --seeds 0 -o results.jsonl
    python -m benchmarks.campaign --decide results.jsonl

Every configuration of benchmarks.claims is calibrated on 128 sequences of 512 tokens and evaluated
by the protocol of benchmarks.accuracy. Seed 0 takes the first windows of the calibration text,
other seeds windows of the evaluation text that are never evaluated on. `deciding` is the perplexity
on text behind the calibration windows, by which searches choose. What the file holds already is not
measured again. Workers compute on one CPU each, and share a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Lock
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.accuracy import WINDOW, WINDOWS, losses_of, stored_bits
from benchmarks.claims import COMPLETE, CONFIGURATIONS, decide, whole
from qc.errors import QcError
from qc.ir.device import parse_device
from qc.ir.graph import Graph
from qc.ir.ops import Parameter
from qc.ir.target import Target
from qc.passes.calibration import SELF, Calibration
from qc.passes.calibration.data import cut
from qc.passes.pipeline import Context, Pass, Pipeline

SAMPLES = 128
"""Sequences that methods are calibrated on."""

DECIDING = 48
"""Windows behind them on which searches decide."""

SOURCES: tuple[tuple[str, Source, int], ...] = (
    ("text", "text", SAMPLES), ("self 32", "self", 32), ("self 128", "self", SAMPLES),
)  # fmt: skip
"""What complete recipes are calibrated on: by name, a source and a number of sequences."""

FIRST_OF_SEED = 200
"""Window of the evaluation text where the calibration data of seed 1 starts."""


Source = Literal["text", "self"]
"""Where calibration data comes from: the calibration text, or the model."""


@dataclass(frozen=True)
class Job:
    """What is measured: passes under a name, with a seed; `samples` sequences of `source`, the
    bench's number where that is 0. A pipeline is run as it is, passes between those that all
    configurations have."""

    name: str
    passes: tuple[Pass, ...] | Pipeline
    seed: int = 0
    source: Source = "text"
    samples: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """What a result is known by."""
        return self.name, self.seed

    @property
    def pipeline(self) -> Pipeline:
        """All that is run."""
        return self.passes if isinstance(self.passes, Pipeline) else whole(self.passes)


@dataclass(frozen=True)
class Bench:
    """A canonical model, two streams of tokens, and the token that its texts start with."""

    graph: Graph
    calibration: Tensor
    evaluation: Tensor
    device: str = "cpu"
    samples: int = SAMPLES
    windows: int = WINDOWS
    deciding: int = DECIDING
    start: int | None = None

    def sequences(self, seed: int, samples: int) -> list[Tensor]:
        """Return the calibration sequences of a seed."""
        if seed == 0:
            return cut(self.calibration, samples, WINDOW)
        first = (FIRST_OF_SEED + (seed - 1) * samples) % (len(self.evaluation) // WINDOW)
        return cut(self.evaluation[first * WINDOW :], samples, WINDOW)

    def measure(self, job: Job) -> dict[str, Any]:
        """Quantize and evaluate; return what was found, as plain JSON."""
        samples = job.samples or self.samples
        text: Any = SELF if job.source == SELF else self.sequences(job.seed, samples)
        data = Calibration(text, samples, WINDOW, job.seed, self.device)
        bound = data.bound(self.graph, None, self.start)
        context = Context(Target("any", "any"), calibration=bound)
        start, used = time.perf_counter(), time.process_time()
        graph = job.pipeline.run(self.graph, context)
        seconds, used = time.perf_counter() - start, time.process_time() - used
        test = cut(self.evaluation, self.windows, WINDOW)
        behind = self.calibration[SAMPLES * WINDOW :]
        held_out = cut(behind, self.deciding, WINDOW) if self.deciding else []
        losses = losses_of(graph, [*test, *held_out], parse_device(self.device))
        coverage = context.calibration.coverage if context.calibration else {}
        errors = [each.error for each in coverage.values() if each.error is not None]
        return {
            "name": job.name,
            "seed": job.seed,
            "perplexity": perplexity(losses[: len(test)]),
            "deciding": perplexity(losses[len(test) :]),
            "bits": stored_bits(graph),
            "error": round(sum(errors) / len(errors), 6) if errors else None,
            "formats": formats_of(graph),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(used, 1),
            "gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
            "device": self.device,
            "source": job.source,
            "samples": samples,
            "windows": self.windows,
            "passes": [repr(one) for one in getattr(job.passes, "passes", job.passes)],
        }


def perplexity(losses: Sequence[float]) -> float | None:
    """Return exp(mean loss) over windows, from the sums of each."""
    if not losses:
        return None
    return round(math.exp(min(math.fsum(losses) / (len(losses) * (WINDOW - 1)), 100)), 4)


def formats_of(graph: Graph) -> dict[str, int]:
    """Count the matrices in each format."""
    matrices = (p.op.weight for p in graph.parameters if isinstance(p.op, Parameter))
    return dict(Counter(str(each.format) for each in matrices if len(each.shape) == 2))


# ---------------------------------------------------------------- many at once


def run_all(
    bench: Bench, jobs: Iterable[Job], file: Path, workers: int, until: float = math.inf
) -> None:
    """Measure jobs in their order, `workers` at a time, none that would start after `until`."""
    fork = multiprocessing.get_context("fork")  # shares the weights; CUDA starts in each worker
    queue: Any = fork.SimpleQueue()
    lock = fork.Lock()
    known = {(each["name"], each["seed"]) for each in read_results(file)}
    missing = [job for job in jobs if job.key not in known]
    running = [
        fork.Process(target=work, args=(bench, queue, file, lock, number, until))
        for number in range(workers)
    ]
    for process in running:
        process.start()
    for job in [*missing, *[None] * workers]:
        queue.put(job)
    for process in running:
        process.join()


def work(bench: Bench, queue: Any, file: Path, lock: Lock, number: int, until: float) -> None:
    """Measure jobs from a queue until it is over."""
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[number % len(cpus)]})
    torch.set_num_threads(1)
    for job in iter(queue.get, None):
        if time.time() <= until:
            append(file, measured(bench, job), lock)


def measured(bench: Bench, job: Job) -> dict[str, Any]:
    """Measure a job; return what went wrong where something did."""
    try:
        return bench.measure(job)
    except (ArithmeticError, LookupError, QcError, RuntimeError, ValueError) as error:
        traceback.print_exc()
        return {
            "name": job.name,
            "seed": job.seed,
            "error": f"{type(error).__name__}: {error}",
        }


def append(file: Path, result: dict[str, Any], lock: Any) -> None:
    """Write one line, and say it."""
    line = json.dumps(result, ensure_ascii=False)
    with lock, file.open("a", encoding="utf-8") as out:
        out.write(line + "\n")
    short = {
        k: result.get(k) for k in ("name", "seed", "perplexity", "deciding", "bits", "seconds")
    }
    print(json.dumps(short, ensure_ascii=False), flush=True)


def read_results(file: Path) -> list[dict[str, Any]]:
    """Return the results of a file that are no failures."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [each for each in map(json.loads, lines) if "perplexity" in each]


def open_bench(folder: str, device: str) -> Bench:
    """Read a model and the two texts."""
    from qc.compiler import trace
    from qc.stages import encoder_of
    from real_model import CALIBRATION, EVALUATION

    model = trace(folder).canonicalize()
    encode = encoder_of(model.captured.captured.tokenizer)
    assert encode is not None, "the model has no tokenizer"
    calibration, evaluation = (
        torch.tensor(encode(each.read_text(encoding="utf-8"))) for each in (CALIBRATION, EVALUATION)
    )
    start = model.captured.captured.bos_id
    return Bench(model.graph, calibration, evaluation, device, start=start)


def complete_jobs() -> list[Job]:
    """Return the recipes as they are compiled, on text and on what the model writes."""
    return [
        Job(f"{name}, {text}", passes, source=source, samples=samples)
        for name, passes in COMPLETE.items()
        for text, source, samples in SOURCES
    ]


def add_bench(parser: argparse.ArgumentParser, jobs: str) -> None:
    """Add the options of all campaigns."""
    parser.add_argument("model", nargs="?")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--workers", type=int, default=1, help="processes, one CPU each")
    parser.add_argument("-o", "--output", type=Path, default=Path(f"build/{jobs}.jsonl"))


def main(configurations: Callable[[], dict[str, tuple[Pass, ...]]] = CONFIGURATIONS.copy) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_bench(parser, "campaign")
    parser.add_argument("--only", default="", help="a regular expression of names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--decide", type=Path, metavar="FILE", help="only say what holds")
    options = parser.parse_args()
    if options.decide is None:
        chosen = {n: p for n, p in configurations().items() if re.search(options.only, n)}
        jobs = [Job(name, p, seed) for seed in options.seeds for name, p in chosen.items()]
        jobs += [job for job in complete_jobs() if re.search(options.only, job.name)]
        run_all(open_bench(options.model, options.device), jobs, options.output, options.workers)
    for verdict in decide(read_results(options.decide or options.output)):
        print(verdict)


if __name__ == "__main__":
    main()
