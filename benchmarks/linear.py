"""Speed of the CPU's linear kernels: matrix-vector products against the memory's bandwidth,
matrix products against torch.

    python benchmarks/linear.py [--threads N] [--json]

Matrix-vector products rotate through copies of the weight that no cache holds. Each sweep over all
copies alternates with a plain read of the same memory, so that other load hits both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import tvm
from torch import Tensor
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from qc.backends.region import RESULT, ArrayArgument, region_of
from qc.backends.tvm.build import llvm_target
from qc.backends.tvm.kernel import Kernel
from qc.backends.tvm.linear import linear_rules
from qc.backends.tvm.linear.vectors import span, splat
from qc.ir import ops
from qc.ir.fused import fuse
from qc.ir.node import Node, make
from qc.ir.quantized import quantize_activation, split_groups
from qc.ir.target import Target, host_cpu
from qc.ir.types import ActivationFormat, TensorType, symbol
from qc.ir.weights.dense import DenseFormat, dense_term
from qc.ir.weights.grouped import GroupedFormat, grouped_term
from qc.ir.weights.weight import TermFormat, Weight

INT8 = ActivationFormat(8, 32)
INT4 = GroupedFormat(4, 32, "minimum")
SHAPES = ((4096, 4096, False), (576, 576, False), (960, 576, False), (1536, 576, True),
          (576, 1536, False), (49152, 576, False))  # fmt: skip
"""out, in, gated: a large square, then SmolLM2-135M. A gated pair has 2 out x in weights."""


@dataclass(frozen=True)
class Problem:
    """One linear kernel to measure."""

    outer: int
    inner: int
    gated: bool
    format: TermFormat
    activation: ActivationFormat | None

    @property
    def weights(self) -> int:
        return 2 if self.gated else 1

    @property
    def label(self) -> str:
        shape = f"{self.outer}x{self.inner}{' gated' if self.gated else ''}"
        return f"{shape} {self.format} · {self.activation or 'f32'}"

    def operations(self, rows: int) -> float:
        return 2.0 * rows * self.outer * self.inner * self.weights

    def weight(self, name: str) -> Weight:
        """Return random stored values."""
        shape = (self.outer, self.inner)
        if isinstance(self.format, DenseFormat):
            return Weight(name, shape, (dense_term(torch.randn(shape).to(self.format.dtype)),))
        assert isinstance(self.format, GroupedFormat)
        codes = torch.randint(0, 1 << self.format.bits_per_code, shape, dtype=torch.uint8)
        scale = torch.rand(self.outer, self.format.groups(self.inner)) * 0.01
        return Weight(name, shape, (grouped_term(self.format, codes, scale, -8 * scale),))

    def node(self) -> Node:
        """Return the fused node."""
        type = TensorType((symbol("rows"), self.inner), torch.float32, self.activation)
        x = make(ops.Input("x", type))
        parameters = [make(ops.Parameter(self.weight(f"w{i}"))) for i in range(self.weights)]
        linears = [make(ops.Linear(), x, parameter) for parameter in parameters]
        if not self.gated:
            return fuse("linear", linears[0], frozenset(linears))
        root = make(ops.GatedActivation("silu"), *linears)
        return fuse("linear", root, frozenset({*linears, root}))


@dataclass
class Result:
    """Seconds of single runs; speeds are those of the fastest run, and the median in brackets."""

    label: str
    rows: int
    work: float
    unit: str
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def speed(self, name: str, statistic: Callable[[Sequence[float]], float] = min) -> float:
        return self.work / statistic(self.seconds[name]) / 1e9

    def line(self) -> str:
        speeds = "  ".join(
            f"{name} {self.speed(name):.1f} ({self.speed(name, statistics.median):.1f})"
            for name in self.seconds
        )
        return f"{self.label:<40} {self.rows:>4} rows  {self.unit}  {speeds}"


@dataclass(frozen=True)
class Compiled:
    """A kernel that can be run, with its weights."""

    problem: Problem
    kernel: Kernel
    run: Callable[..., None]
    packed: dict[int, dict[str, Tensor]]

    def arguments(self, rows: int, packed: dict[int, dict[str, Tensor]] | None = None) -> list[Any]:
        """Lay out the arguments for random activations."""
        x, stored = self.x_arrays(rows), packed or self.packed
        found = []
        for argument in self.kernel.arguments:
            assert isinstance(argument, ArrayArgument)
            if argument.operand == RESULT:
                found.append(torch.zeros(rows, self.problem.outer))
            elif argument.operand in stored:
                found.append(stored[argument.operand][argument.array])
            else:
                found.append(x[argument.array])
        return [tvm.runtime.from_dlpack(array) for array in found]

    def x_arrays(self, rows: int) -> dict[str, Tensor]:
        x = torch.randn(rows, self.problem.inner)
        if self.problem.activation is None:
            return {"values": x}
        quantized = quantize_activation(x, self.problem.activation)
        groups, _ = split_groups(quantized.codes.float(), self.problem.activation.group)
        total = groups.sum(-1) * quantized.scale
        return {"codes": quantized.codes, "scale": quantized.scale, "total": total}


def compile_problem(problem: Problem, target: Target) -> Compiled:
    """Compile the kernel that the first matching rule gives."""
    node = problem.node()
    region = region_of(node, target)
    kernel = next(k for k in (rule(region) for rule in linear_rules) if k is not None)
    function = kernel.function.with_attr("global_symbol", "kernel")
    module = tvm.compile(tvm.IRModule({"kernel": function}), target=llvm_target(target))
    packed: dict[int, dict[str, Tensor]] = {}
    for (operand, array), repack in kernel.repack.items():
        parameter = node.inputs[operand].op
        assert isinstance(parameter, ops.Parameter)
        packed.setdefault(operand, {})[array] = repack(parameter.weight)
    return Compiled(problem, kernel, module["kernel"], packed)


def read_function(target: Target) -> Any:
    """Build a function that reads u8[chunks, size] on all threads and keeps a checksum."""
    lanes, streams = target.vector_bytes, 8
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("read")
        chunks, size = T.int64(), T.int64()
        data = T.arg("data", T.Buffer((chunks, size), "uint8", layout=None))
        sums = T.arg("sums", T.Buffer((chunks, lanes), "uint8", layout=None))
        T.func_attr({"tirx.noalias": True})
        with T.parallel(T.int64(0), chunks) as chunk:
            totals = T.alloc_buffer((streams * lanes,), "uint8", layout=None)
            for stream in range(streams):
                at = span(stream * lanes, lanes)
                T.buffer_store(totals, splat(T.uint8(0), lanes), [at])
            with T.serial(T.int64(0), T.floordiv(size, T.int64(streams * lanes))) as step:
                for stream in range(streams):
                    at = span(stream * lanes, lanes)
                    value = data[chunk, span((step * streams + stream) * lanes, lanes)]
                    T.buffer_store(totals, T.bitwise_xor(totals[at], value), [at])
            whole = totals[span(0, lanes)]
            for stream in range(1, streams):
                whole = T.bitwise_xor(whole, totals[span(stream * lanes, lanes)])
            T.buffer_store(sums, whole, [chunk, span(0, lanes)])
    function = builder.get().with_attr("global_symbol", "read")
    return tvm.compile(tvm.IRModule({"read": function}), target=llvm_target(target))["read"]


def seconds(run: Callable[[], object]) -> float:
    """Time one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_vector(compiled: Compiled, read: Any, megabytes: int, sweeps: int) -> Result:
    """Multiply one row by copies of the weights, `megabytes` in all, reading them in between."""
    one = sum(a.nbytes for arrays in compiled.packed.values() for a in arrays.values())
    copies = -(-megabytes * 1_000_000 // one)
    sets = [
        {i: {n: a.clone() for n, a in arrays.items()} for i, arrays in compiled.packed.items()}
        for _ in range(copies)
    ]
    calls = [compiled.arguments(1, packed) for packed in sets]
    plain = torch.zeros(256, copies * one // 256, dtype=torch.uint8)
    sums = torch.zeros(256, host_cpu().vector_bytes, dtype=torch.uint8)
    views = [tvm.runtime.from_dlpack(plain), tvm.runtime.from_dlpack(sums)]

    def sweep() -> None:
        for call in calls:
            compiled.run(*call)

    result = Result(compiled.problem.label, 1, float(copies * one), "GB/s")
    for name, run in (("qc", sweep), ("read", lambda: read(*views))):
        run()
        result.seconds[name] = []
    for _ in range(sweeps):
        result.seconds["qc"].append(seconds(sweep))
        result.seconds["read"].append(seconds(lambda: read(*views)))
    return result


def measure_matrix(compiled: Compiled, rows: int, repeats: int, with_bfloat16: bool) -> Result:
    """Multiply many rows, in turns with torch's float32 and bfloat16 products."""
    problem = compiled.problem
    call = compiled.arguments(rows)
    x = torch.randn(rows, problem.inner)
    weight = torch.randn(problem.outer * problem.weights, problem.inner)
    half_x, half_weight = x.bfloat16(), weight.bfloat16()
    runs: dict[str, Callable[[], object]] = {
        "qc": lambda: compiled.run(*call),
        "torch f32": lambda: x @ weight.T,
    }
    if with_bfloat16:
        runs["torch bf16"] = lambda: half_x @ half_weight.T
    result = Result(problem.label, rows, problem.operations(rows), "GOP/s")
    for name, run in runs.items():
        run()
        result.seconds[name] = []
    for _ in range(repeats):
        for name, run in runs.items():
            result.seconds[name].append(seconds(run))
    return result


def measure(arguments: argparse.Namespace) -> list[Result]:
    """Measure everything, printing as it comes."""
    target = host_cpu()
    read = read_function(target)
    results = []

    def keep(result: Result) -> None:
        results.append(result)
        if not arguments.json:
            print(result.line(), flush=True)

    for outer, inner, gated in SHAPES:
        problem = Problem(outer, inner, gated, INT4, INT8)
        keep(measure_vector(compile_problem(problem, target), read, arguments.megabytes, 12))
    for format, activation in (
        (GroupedFormat(8, 32), INT8), (GroupedFormat(2, 32, "minimum"), INT8),
        (INT4, None), (DenseFormat(torch.float16), None), (DenseFormat(), None),
    ):  # fmt: skip
        compiled = compile_problem(Problem(4096, 4096, False, format, activation), target)
        keep(measure_vector(compiled, read, arguments.megabytes, 8))
    for format, activation in ((INT4, INT8), (INT4, None), (DenseFormat(), None)):
        for outer, inner in ((3072, 576), (576, 1536)):
            compiled = compile_problem(Problem(outer, inner, False, format, activation), target)
            for rows in (8, 64, 512):
                with_bfloat16 = activation is not None and rows == 64
                keep(measure_matrix(compiled, rows, 15, with_bfloat16))
    return results


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--megabytes", type=int, default=600, help="weights in rotation")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # TVM's thread pool reads its size once, when it starts; left alone, it takes half of all CPUs.
    os.environ["TVM_NUM_THREADS"] = str(arguments.threads)
    machine = f"{platform.machine()} {host_cpu()}, {arguments.threads} threads"
    if not arguments.json:
        print(f"{machine}; fastest (median)")
    results = measure(arguments)
    if arguments.json:
        print(json.dumps({"machine": machine, "results": [asdict(r) for r in results]}))


if __name__ == "__main__":
    main()
