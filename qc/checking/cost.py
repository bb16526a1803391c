"""What a compilation itself will take: seconds after the capture, and memory."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log, sqrt

import torch

from qc.ir.weights.weight import Weight, WeightFormat
from qc.passes.quantize.round_to_nearest import round_to_nearest

# Measured with SmolLM2-135M for `cpu-w4` and for int3·g64 + rank16 + sparse0.5% on two cores of an
# AMD EPYC (Zen 3), shared with other work: lowering and compiling 24 kernels took 9.7 and 6.5 s,
# linking 2.2 and 3.0 s, repacking and writing 146 and 131 MB 2.1 and 2.3 s, and the process grew to
# 1.77 and 2.35 to 2.8 GB. Reading and checking 135M weights took 4 s more than rounding them where
# the cache holds them.
SECONDS_A_KERNEL = 0.35
SECONDS_TO_LINK = 3.0
SECONDS_A_WEIGHT = 3e-8
STORED_BYTES_A_SECOND = 65e6
LIBRARIES = 0.45e9
"""Bytes of a process with the compiler's libraries."""
COPIES, COPIES_A_TERM = 1, 4
"""Float32 copies of the largest matrix that storing it holds, and those for each term."""

PROBES = (1 << 14, 1 << 16)
"""Weights of the random matrices that a format is timed on."""
REPEATED = 2
"""Times that a probe is run: the first one also warms up."""
LONG = 0.5
"""Seconds after which one size of probe must do."""


@dataclass(frozen=True)
class CompileCost:
    """Seconds by step, and the most memory at a time in bytes."""

    quantize: float
    kernels: float
    write: float
    memory: int

    @property
    def seconds(self) -> float:
        return self.quantize + self.kernels + self.write


def compile_cost(
    before: Iterable[Weight], after: Iterable[Weight], changed: Iterable[Weight], kernels: int
) -> CompileCost:
    """Estimate from the weights before and after the passes, those that are stored anew, and the
    number of kernels to generate."""
    changed = list(changed)
    stored = sum(weight.bits for weight in after) // 8
    values = sum(weight.bits for weight in before) // 8
    held = [4 * w.elements * (COPIES + COPIES_A_TERM * len(w.terms)) for w in changed]
    return CompileCost(
        quantize_seconds(changed),
        SECONDS_TO_LINK + SECONDS_A_KERNEL * kernels if kernels else 0.0,
        stored / STORED_BYTES_A_SECOND,
        round(LIBRARIES + values + stored + max(held, default=0)),
    )


def quantize_seconds(weights: Sequence[Weight]) -> float:
    """Estimate how long the weights take to store, from timing each format on small random
    matrices of the same proportions."""
    counted = Counter((weight.format, weight.shape) for weight in weights)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    work = sum(count * seconds_for(*each) for each, count in counted.items())
    read = SECONDS_A_WEIGHT * sum(weight.elements for weight in weights)
    return read + work / min(cores, max(1, len(weights)))


def seconds_for(format: WeightFormat, shape: tuple[int, ...]) -> float:
    """Time two sizes on one thread, and go on by the power of the size that they show.

    Time of the processor: what else a machine does is not known for the compilation either.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = list(probe_times(format, shape))
    finally:
        torch.set_num_threads(threads)
    elements = shape[0] * shape[1]
    size, seconds = times[-1]
    if elements <= size:
        return seconds
    power = 1.0
    if len(times) > 1:
        (small, first), (large, second) = times
        # Between proportional to the weights, and to their number times the shorter side.
        power = min(1.5, max(1.0, log(second / first) / log(large / small)))
    return seconds * float((elements / size) ** power)


def probe_times(format: WeightFormat, shape: tuple[int, ...]) -> Iterable[tuple[int, float]]:
    """Yield (weights, seconds) of smaller matrices that the format accepts."""
    for size in PROBES:
        scale = min(1.0, sqrt(size / (shape[0] * shape[1])))
        small = tuple(max(1, round(side * scale)) for side in shape)
        if format.refusal(small) is not None:
            small = tuple(min(side, 256) for side in shape)
        if format.refusal(small) is not None:
            small = shape
        values = torch.randn(small, generator=torch.Generator().manual_seed(0))
        seconds = min(processor_seconds(values, format) for _ in range(REPEATED))
        yield small[0] * small[1], seconds
        if seconds > LONG or small == shape:
            return


def processor_seconds(values: torch.Tensor, format: WeightFormat) -> float:
    """Return the processor time of this thread for storing a matrix."""
    start = time.thread_time()
    round_to_nearest(values, format)
    return max(time.thread_time() - start, 1e-6)
