"""Time a matrix-vector product in every storage format, beside float16 and int4.

    python -m benchmarks.formats [FORMAT ...] [--size 4096] [--activation int8]

One row, all threads; the weights are copied until they are larger than any cache and read in turn,
so that every byte comes from memory. All formats take turns in every round; the table has medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tvm
from rich.progress import track

from benchmarks.linear import read_function
from qc.backends.region import RESULT, ArrayArgument, region_of
from qc.backends.tvm.build import llvm_target
from qc.backends.tvm.kernel import Kernel
from qc.backends.tvm.linear.rule import linear_rule
from qc.ir import ops
from qc.ir.fused import fuse
from qc.ir.node import make
from qc.ir.quantized import quantize_activation, split_groups
from qc.ir.target import Target, parse_machine
from qc.ir.threads import side_by_side
from qc.ir.types import ActivationFormat, TensorType, symbol
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import Weight
from qc.passes.quantize.round_to_nearest import round_to_nearest

BASELINES = ("dense f16", "int4·g128·min")
FORMATS = (
    *BASELINES, "int2·g128·min", "int3·g128·min", "int5·g128·min", "int6·g128·min", "int8·row",
    "int4·o128·min", "int4·g32·min·scale(uint6·g8)·minimum(uint6·g8)",
    "int3·g16·min·scale(int3·o16·min)·minimum(int3·o16·min)",
    "fp4", "nf4·g64", "mxfp4", "nvfp4", "fp6", "fp8", "lookup4·row", "lookup4·tensor",
    "lookup6·tensor", "lookup8·tensor", "codebook2x8·d8", "codebook1x8·d2", "codebook1x12·d8",
    "trellis2·w10", "trellis4·w8", "trellis1.5·d2·w9", "planes1·g128", "planes2·g128",
    "planes3·g128",
    "signs2·g128", "trits2·g128", "ternary·g128", "ternary2bit·g128", "bitstack2·rank4",
    "kept50%·g16(int4·row)", "columns20%(int4·row·zero)", "sparse5%", "rank64", "train2·bond16",
    "int4·g128·min + rank16 + sparse0.5%", "int3·g128·min + rank16 + sparse0.5%",
)  # fmt: skip


@dataclass
class Contestant:
    """A compiled product, with enough copies of its weight."""

    name: str
    rule: str
    bytes: int
    stored_bits: float
    run: Any
    calls: list[list[Any]]
    seconds: list[float] = field(default_factory=list)
    at: int = 0

    def sample(self, count: int) -> None:
        """Time `count` products, each with the next copy."""
        start = time.perf_counter()
        for _ in range(count):
            self.run(*self.calls[self.at])
            self.at = (self.at + 1) % len(self.calls)
        self.seconds.append((time.perf_counter() - start) / count)


def random_weight(text: str, size: int) -> Weight:
    """Store a random matrix."""
    values = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    return Weight(text, (size, size), round_to_nearest(values, parse_weights(text)))


def contestant(
    weight: Weight, activation: ActivationFormat | None, target: Target, megabytes: int
) -> Contestant:
    """Compile the product with a matrix, copy what it reads."""
    size = weight.shape[1]
    x = make(ops.Input("x", TensorType((symbol("rows"), size), torch.float32, activation)))
    root = make(ops.Linear(), x, make(ops.Parameter(weight)))
    node = fuse("linear", root, frozenset({root}))
    kernel = linear_rule(region_of(node, target))
    assert kernel is not None
    function = kernel.function.with_attr("global_symbol", "kernel")
    module = tvm.compile(tvm.IRModule({"kernel": function}), target=llvm_target(target))
    stored = {place: repack(weight).contiguous() for place, repack in kernel.repack.items()}
    bytes = sum(array.nbytes for array in stored.values())
    values = activations(size, activation)
    calls = [
        arguments(kernel, values, {place: a.clone() for place, a in stored.items()}, size)
        for _ in range(max(2, -(-megabytes * 1_000_000 // bytes)))
    ]
    bits = weight.bits_per_element
    return Contestant(weight.name, kernel.rule, bytes, bits, module["kernel"], calls)


def activations(size: int, format: ActivationFormat | None) -> dict[str, torch.Tensor]:
    """Return one random row as a kernel takes it."""
    x = torch.randn(1, size)
    if format is None:
        return {"values": x}
    quantized = quantize_activation(x, format)
    groups, _ = split_groups(quantized.codes.float(), format.group)
    total = groups.sum(-1) * quantized.scale
    return {"codes": quantized.codes, "scale": quantized.scale, "total": total}


def arguments(kernel: Kernel, x: dict[str, Any], stored: dict[Any, Any], size: int) -> list[Any]:
    """Lay out the arguments of a call."""
    found = []
    for argument in kernel.arguments:
        assert isinstance(argument, ArrayArgument)
        if argument.operand == RESULT:
            array = torch.zeros(1, size)
        else:
            place = argument.operand, argument.array
            array = stored[place] if place in stored else x[argument.array]
        found.append(tvm.runtime.from_dlpack(array))
    return found


def bandwidth(target: Target, megabytes: int) -> float:
    """Measure bytes read a second, all threads, the best of ten."""
    plain = torch.zeros(256, megabytes * 1_000_000 // 256, dtype=torch.uint8)
    sums = torch.zeros(256, target.vector_bytes, dtype=torch.uint8)
    read, views = read_function(target), [tvm.runtime.from_dlpack(a) for a in (plain, sums)]
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        read(*views)
        best = min(best, time.perf_counter() - start)
    return plain.nbytes / best


def table(found: Sequence[Contestant], size: int, bytes_per_second: float) -> str:
    """Lay the results out as Markdown; ratios are medians over rounds of the paired times."""

    def ratio(one: Contestant, other: Contestant) -> float:
        pairs = zip(one.seconds, other.seconds, strict=True)
        return statistics.median(a / b for a, b in pairs)

    lines = [
        "| format | bits | bytes read | ms | GB/s | time / f16 | bytes / int4 | time / int4 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    half, int4 = found[0], found[1]
    for one in found:
        median = statistics.median(one.seconds)
        lines.append(
            f"| {one.name} | {one.stored_bits:.2f} | {one.bytes / 1e6:.2f} MB | "
            f"{1e3 * median:.3f} | {one.bytes / median / 1e9:.1f} | {ratio(one, half):.2f} | "
            f"{one.bytes / int4.bytes:.2f} | {ratio(one, int4):.2f} |"
        )
    return "\n".join([*lines, "", f"read bandwidth {bytes_per_second / 1e9:.1f} GB/s"])


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", help="default: all")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--megabytes", type=int, default=100, help="copies of each weight")
    parser.add_argument("--activation", choices=("int8", "f32"), default="int8")
    parser.add_argument("--target", default="cpu", help="a machine that this one can stand for")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    # TVM's thread pool reads its size once, when it starts; left alone, it takes half of all CPUs.
    os.environ["TVM_NUM_THREADS"] = str(options.threads)
    target = parse_machine(options.target)
    activation = ActivationFormat(8, 32) if options.activation == "int8" else None
    names = [*BASELINES, *(f for f in options.formats or FORMATS if f not in BASELINES)]
    stored = side_by_side(partial(random_weight, size=options.size), names)
    found = [
        contestant(weight, activation, target, options.megabytes)
        for _, weight in track(stored, "store and compile", len(names))
    ]
    for one in found:
        one.sample(len(one.calls))
        one.seconds.clear()
    for _ in track(range(options.rounds), "measure"):
        for one in found:
            one.sample(4)
    bytes_per_second = bandwidth(target, 400)
    print(table(found, options.size, bytes_per_second))
    if options.json:
        content = {
            "machine": str(target),
            "threads": options.threads,
            "size": options.size,
            "activation": options.activation,
            "bandwidth": bytes_per_second,
            "rows": [
                {"format": c.name, "rule": c.rule, "bytes": c.bytes, "seconds": c.seconds}
                for c in found
            ],
        }
        Path(options.json).write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
