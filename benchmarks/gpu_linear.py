"""Speed of the GPU's linear kernels against torch's float16 matrix product, with a check of each.

    python benchmarks/gpu_linear.py                   on a machine with a GPU and Triton
    python benchmarks/gpu_linear.py --write FOLDER    compile only, for --architecture
    python benchmarks/gpu_linear.py --read FOLDER     run what was compiled elsewhere

Every weight has as many copies as no cache holds; one CUDA graph goes through all of them, one
after the other, and its median over replays counts. Bandwidth is of the stored weights, against
that of a large copy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qc.backends.region import region_of
from qc.backends.triton.jit import Loaded
from qc.backends.triton.kernel import Call, Cubin, Launch
from qc.backends.triton.linear.rule import linear_rule
from qc.ir import ops
from qc.ir.fused import fuse
from qc.ir.node import Node, make
from qc.ir.quantized import QuantizedTensor, quantize_activation
from qc.ir.target import parse_machine
from qc.ir.types import ActivationFormat, TensorType, symbol
from qc.ir.weights.dense import dense_weight
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import Weight
from qc.runtime.cuda.driver import Driver, find_driver

ROWS = symbol("rows")
SHAPES = ((4096, 4096), (14336, 4096))
FORMATS = ("int4·g128", "int4·g128 + rank32 + sparse1%")
COUNTS = (1, 16, 64)
CACHED = 400 << 20
"""Bytes that all copies of a weight have at least: several times what a GPU's cache holds."""
REPLAYS = 20


@dataclass(frozen=True)
class Problem:
    """One linear; `epilogue`: bias, SiLU and a residual behind it; `int8`: activations of 8 bits,
    one scale a token."""

    format: str
    outer: int
    inner: int
    epilogue: bool = False
    int8: bool = False

    def node(self, weight: Weight) -> Node:
        format = ActivationFormat(8) if self.int8 else None
        x = make(ops.Input("x", TensorType((ROWS, self.inner), torch.float32, format)))
        w = make(ops.Parameter(weight))
        if not self.epilogue:
            root = make(ops.Linear(), x, w)
            return fuse("linear", root, frozenset({root}))
        bias = make(ops.Parameter(dense_weight("bias", torch.randn(self.outer))))
        residual = make(ops.Input("r", TensorType((ROWS, self.outer))))
        product = make(ops.Linear(), x, w, bias)
        active = make(ops.Unary("silu"), product)
        root = make(ops.Binary("add"), residual, active)
        return fuse("linear", root, frozenset({product, active, root}))

    def weight(self, values: bool) -> Weight:
        """Return random stored values, or the plan of a weight without."""
        shape, format = (self.outer, self.inner), parse_weights(self.format)
        if not values:
            return format.planned("w", shape, torch.float32)
        terms = tuple(
            term.nearest(torch.randn(shape))
            if "rank" not in str(term)
            else random_low_rank(term, shape)
            for term in format.terms
        )
        return Weight("w", shape, terms)


def random_low_rank(format: Any, shape: tuple[int, int]) -> Any:
    """Return random factors: the decomposition of a large matrix takes minutes."""
    stored = {
        name: (torch.randn(spec.shape) / 8).to(spec.dtype)
        for name, spec in format.arrays(shape).items()
    }
    return format.term(shape, stored)


@dataclass(frozen=True)
class Measured:
    """What one problem took: microseconds, and how wrong it was."""

    problem: Problem
    rows: int
    microseconds: float
    torch_microseconds: float
    stored_bytes: int
    gigabytes_per_second: float
    error: float


def problems() -> list[Problem]:
    """List what is measured."""
    found = []
    for shape in SHAPES:
        found += [Problem(format, *shape, epilogue="rank" in format) for format in FORMATS]
        found.append(Problem("int4·g128", *shape, int8=True))
    return found


def key_of(launch: Launch, architecture: int) -> str:
    """Name a launch by its content."""
    options = [launch.constants, launch.num_warps, launch.num_stages, architecture]
    text = json.dumps([launch.source, launch.function, options])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def call_of(problem: Problem, architecture: int, weight: Weight) -> tuple[Node, Call]:
    """Ask the rule how a problem runs."""
    node = problem.node(weight)
    call = linear_rule(region_of(node, parse_machine(f"cuda:sm_{architecture}")))
    assert call is not None
    return node, call


def write(folder: Path, architecture: int) -> None:
    """Compile all launches into a folder."""
    from qc.backends.triton.compile import compile_launch

    folder.mkdir(parents=True, exist_ok=True)
    for problem in problems():
        _, call = call_of(problem, architecture, problem.weight(values=False))
        for rows in COUNTS:
            for launch in call.variant(rows).launches:
                cubin = compile_launch(launch, architecture)
                (folder / key_of(launch, architecture)).write_bytes(pickle.dumps(cubin))
                print(problem, rows, launch.function, cubin.registers, flush=True)


def reader(folder: Path | None, architecture: int) -> Callable[[Launch], Cubin]:
    """Return what gives the compiled kernel of a launch."""

    def cubin_of(launch: Launch) -> Cubin:
        if folder is None:
            from qc.backends.triton.compile import compile_launch

            return compile_launch(launch, architecture)
        found: Cubin = pickle.loads((folder / key_of(launch, architecture)).read_bytes())
        return found

    return cubin_of


def measure(
    problem: Problem, driver: Driver, cubin_of: Callable[[Launch], Cubin]
) -> list[Measured]:
    """Check and time one problem for all numbers of rows."""
    torch.manual_seed(0)
    weight = problem.weight(values=True)
    node, call = call_of(problem, driver.capability, weight)
    size = sum(term.bits for term in weight.terms) // 8
    copies = max(2, -(-CACHED // size))
    dense = weight.dense()
    exact = dense.cuda().double()
    plain = [
        dense.half().cuda()
        for _ in range(max(2, -(-CACHED // (2 * problem.outer * problem.inner))))
    ]
    found = []
    for rows in COUNTS:
        values = operands(problem, node, rows)
        results = torch.full((rows, problem.outer), float("nan"), dtype=torch.float16).cuda()
        first = Loaded(call, values, {"rows": rows}, results, driver, cubin_of)
        calls = [first, *(first.copied() for _ in range(copies - 1))]
        torch.cuda.synchronize()
        first.run()
        driver.synchronize()
        error = relative(results, expected(problem, values, exact))
        seconds = time_driver(driver, calls) / copies
        x = float_rows(values[0]).half()
        reference = time_torch(lambda w, x=x: torch.nn.functional.linear(x, w), plain) / len(plain)
        found.append(
            Measured(
                problem, rows, seconds * 1e6, reference * 1e6, size, size / seconds / 1e9, error
            )
        )
        print(json.dumps({**asdict(found[-1])}, ensure_ascii=False), flush=True)
    return found


def operands(problem: Problem, node: Node, rows: int) -> list[Any]:
    """Return the values of the fused node's operands."""
    found: list[Any] = []
    for operand in node.inputs:
        if isinstance(operand.op, ops.Parameter):
            found.append(operand.op.weight)
            continue
        value, format = torch.randn(rows, operand.tensor.shape[-1]), operand.tensor.format
        found.append(quantize_activation(value, format) if format else value.half())
    return found


def float_rows(value: Any) -> Tensor:
    """Return rows on the GPU, quantized ones widened."""
    rows: Tensor = value.dequantize() if isinstance(value, QuantizedTensor) else value
    return rows.cuda()


def expected(problem: Problem, values: Sequence[Any], exact: Tensor) -> Tensor:
    """Return the result in float64, on the GPU."""
    product = float_rows(values[0]).double() @ exact.T
    if not problem.epilogue:
        return product
    vectors = [v for v in values if isinstance(v, Weight) and len(v.shape) == 1]
    (residual,) = [v for v in values[1:] if isinstance(v, Tensor)]
    active = torch.nn.functional.silu(product + vectors[0].dense().cuda().double())
    return residual.cuda().double() + active


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the relative Frobenius error; infinity for NaN."""
    error = float((found.double() - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def time_driver(driver: Driver, calls: Sequence[Loaded]) -> float:
    """Return the median seconds of a graph of all calls."""
    driver.begin_capture()
    last: list[int] = []
    for each in calls:
        last = each.record(last)
    driver.wait_for(last)
    graph = driver.end_capture()
    start, stop = driver.event(), driver.event()
    taken = []
    for number in range(REPLAYS + 3):
        driver.record(start)
        driver.launch_graph(graph)
        driver.record(stop)
        driver.synchronize()
        if number >= 3:
            taken.append(driver.seconds_between(start, stop))
    return statistics.median(taken)


def time_torch(call: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> float:
    """Return the median seconds of a graph of one call a weight."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for weight in weights[:2]:
            call(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            call(weight)
    taken = []
    for number in range(REPLAYS + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        if number >= 3:
            taken.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(taken)


def copy_bandwidth() -> float:
    """Return bytes read and written per second by a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / time_torch(lambda s: target.copy_(s), [source])


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path)
    parser.add_argument("--read", type=Path)
    parser.add_argument("--architecture", type=int, default=90)
    options = parser.parse_args()
    if options.write is not None:
        write(options.write, options.architecture)
        return
    start = time.perf_counter()
    driver = find_driver()
    print(driver.name, f"copy {copy_bandwidth() / 1e9:.0f} GB/s", flush=True)
    cubin_of = reader(options.read, driver.capability)
    for problem in problems():
        measure(problem, driver, cubin_of)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
