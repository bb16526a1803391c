"""Speed of the CPU's attention kernels against torch's scaled_dot_product_attention.

    python benchmarks/attention.py [--threads N] [--json]

The heads of SmolLM2-135M (9 query heads, 3 key heads, 64 channels), rotation of the queries
included, keys and values in a float32 cache. torch gets its keys and values already repeated.
Both alternate, so that other load hits both alike; the best and the median of all rounds count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import tvm

from qc.backends.region import SizeArgument, region_of
from qc.backends.tvm.attention import attention
from qc.backends.tvm.build import llvm_target
from qc.backends.tvm.kernel import Kernel
from qc.ir.fused import fuse
from qc.ir.node import make
from qc.ir.ops import Append, Attention, Input, Rope
from qc.ir.target import host_cpu
from qc.ir.types import Dim, TensorType, bind_dim, symbol

HEADS, KV_HEADS, DIM = 9, 3, 64
LENGTHS = ((1, 100), (1, 500), (1, 1000), (1, 4000), (16, 500), (64, 0), (512, 0), (512, 512))
"""(new tokens, cached tokens)."""

ROUNDS = 15


def attention_kernel() -> Kernel:
    """Return the kernel of cached, rotated, grouped attention."""

    def value(label: str, *shape: Dim) -> Any:
        return make(Input(label, TensorType(shape)))

    batch, seq, past = symbol("batch"), symbol("seq"), symbol("past")
    caches = [
        make(Append(), value(f"past_{n}", batch, past, KV_HEADS, DIM),
             value(f"new_{n}", batch, seq, KV_HEADS, DIM))
        for n in "kv"
    ]  # fmt: skip
    tables = value("cos", 1, seq, DIM), value("sin", 1, seq, DIM)
    query = make(Rope(), value("q", batch, seq, HEADS, DIM), *tables)
    root = make(Attention(DIM**-0.5, causal=True), query, *caches)
    kernel = attention(region_of(fuse("attention", root, frozenset({query, root})), host_cpu()))
    assert kernel is not None
    return kernel


def compiled(kernel: Kernel) -> Any:
    """Compile the kernel for this machine."""
    function = kernel.function.with_attr("global_symbol", "attention")
    module = tvm.IRModule({"attention": function})
    return tvm.compile(module, target=llvm_target(host_cpu()))["attention"]


def arguments_of(kernel: Kernel, sizes: Mapping[str, int]) -> list[Any]:
    """Make random arguments."""
    arguments: list[Any] = []
    for argument in kernel.arguments:
        if isinstance(argument, SizeArgument):
            arguments.append(bind_dim(argument.dim, dict(sizes)))
            continue
        assert argument.shape is not None
        shape = [bind_dim(d, dict(sizes)) for d in argument.shape]
        arguments.append(tvm.runtime.from_dlpack(torch.randn(shape)))
    return arguments


def torch_attention(seq: int, past: int) -> Callable[[], Any]:
    """Return the same attention in torch, without rotation and without repeating heads."""
    q = torch.randn(1, HEADS, seq, DIM)
    k, v = torch.randn(1, HEADS, past + seq, DIM), torch.randn(1, HEADS, past + seq, DIM)
    visible = torch.ones(seq, past + seq, dtype=torch.bool).tril(past)
    mask = None if seq == 1 or not past else visible
    causal = seq > 1 and not past
    return lambda: F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


def seconds(call: Callable[[], Any], repeat: int) -> float:
    """Return the mean time of some calls."""
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def measure(kernel: Kernel, function: Any, seq: int, past: int) -> dict[str, float]:
    """Return microseconds a call of both, best and median."""
    sizes = {"batch": 1, "seq": seq, "past": past, "context": past + seq}
    arguments, reference = arguments_of(kernel, sizes), torch_attention(seq, past)
    repeat = 50 if seq == 1 else 2
    rounds = [(seconds(lambda: function(*arguments), repeat), seconds(reference, repeat))
              for _ in range(ROUNDS)]  # fmt: skip
    ours, theirs = zip(*rounds, strict=True)
    found = {"seq": seq, "past": past}
    figures = {"qc_best": min(ours), "qc_median": statistics.median(ours),
               "torch_best": min(theirs), "torch_median": statistics.median(theirs)}  # fmt: skip
    return found | {name: round(1e6 * value, 1) for name, value in figures.items()}


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # TVM's thread pool reads its size once, when it starts.
    os.environ["TVM_NUM_THREADS"] = str(options.threads)
    kernel = attention_kernel()
    start = time.perf_counter()
    function = compiled(kernel)
    compile_seconds = time.perf_counter() - start
    rows = [measure(kernel, function, seq, past) for seq, past in LENGTHS]
    if options.json:
        print(json.dumps({"compile_seconds": compile_seconds, "microseconds": rows}))
        return
    print(f"compiled in {compile_seconds:.1f} s; microseconds a call:")
    print(*(f"{name:>13}" for name in rows[0]))
    for row in rows:
        print(*(f"{value:>13}" for value in row.values()))


if __name__ == "__main__":
    main()
