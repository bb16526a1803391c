"""Time the linears of a GPU artifact: every weight has more copies than a cache holds, one CUDA
graph goes through all of them, and the median over its replays counts.

Stored values are random: what a kernel takes does not depend on them. Whether it is right, the GPU
part of the test suite says; `check` does so here for one shape of each format.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from qc.backends.region import region_of
from qc.backends.triton.compile import compile_launch
from qc.backends.triton.jit import Loaded, record
from qc.backends.triton.kernel import Argument, Call, Launch
from qc.backends.triton.linear.rule import linear_rule
from qc.ir import ops
from qc.ir.fused import fuse
from qc.ir.node import Node, make
from qc.ir.quantized import QuantizedTensor, quantize_activation
from qc.ir.target import parse_machine
from qc.ir.types import ActivationFormat, TensorType, symbol
from qc.ir.weights.dense import dense_weight
from qc.ir.weights.kept_groups import KeptGroupsFormat
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import Term, TermFormat, Weight
from qc.runtime.cuda.driver import Driver

ROWS = symbol("rows")
CACHED = 256 << 20
"""Bytes that all copies of a weight have at least: four times what an H200 caches."""
MOST_COPIES = 64
GOOD = 2e-3
"""Error of a product in float16, at most."""
REPLAYS = 20
WARM = 3


@dataclass(frozen=True)
class Problem:
    """One linear; `epilogue`: bias, SiLU and a residual behind it; `int8`: activations of 8 bits,
    one scale a token; of small floats where weights are; `gated`: two weights, of a gate and of
    what it gates, through a SiLU."""

    format: str
    outer: int
    inner: int
    epilogue: bool = False
    int8: bool = False
    gated: bool = False

    @property
    def label(self) -> str:
        """Name what is stored and multiplied."""
        behind = ", bias SiLU residual" if self.epilogue else ""
        behind += ", gate and up" if self.gated else ""
        inputs = f", {self.inputs.code} inputs" if self.inputs else ""
        return f"{self.format}{inputs}{behind}"

    @property
    def inputs(self) -> ActivationFormat | None:
        """How activations are stored; None: in float16."""
        if self.format == "nvfp4" and self.int8:
            return ActivationFormat(4, 16, "e2m1")
        kind = "e4m3" if self.format.startswith("e4m3") else "int"
        return ActivationFormat(8, kind=kind) if self.int8 else None

    def node(self, weights: Sequence[Weight]) -> Node:
        """Return the linear as a fused node."""
        x = make(ops.Input("x", TensorType((ROWS, self.inner), torch.float32, self.inputs)))
        w, *others = (make(ops.Parameter(weight)) for weight in weights)
        if self.gated:
            gate, value = make(ops.Linear(), x, w), make(ops.Linear(), x, *others)
            root = make(ops.GatedActivation("silu"), gate, value)
            return fuse("linear", root, frozenset({gate, value, root}))
        if not self.epilogue:
            root = make(ops.Linear(), x, w)
            return fuse("linear", root, frozenset({root}))
        bias = make(ops.Parameter(dense_weight("bias", torch.randn(self.outer))))
        residual = make(ops.Input("r", TensorType((ROWS, self.outer))))
        product = make(ops.Linear(), x, w, bias)
        active = make(ops.Unary("silu"), product)
        root = make(ops.Binary("add"), residual, active)
        return fuse("linear", root, frozenset({product, active, root}))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the weights."""
        return ("w", "v") if self.gated else ("w",)

    def planned(self) -> list[Weight]:
        """Return the weights without values."""
        shape, format = (self.outer, self.inner), parse_weights(self.format)
        return [format.planned(name, shape, torch.float32) for name in self.names]

    def weights(self, device: str) -> list[Weight]:
        """Return weights of random stored values."""
        shape, formats = (self.outer, self.inner), parse_weights(self.format).terms
        with torch.device(device):  # where checks of what is stored make their tables, too
            return [
                Weight(name, shape, tuple(random_term(each, shape, device) for each in formats))
                for name in self.names
            ]

    def call(self, node: Node, architecture: int) -> Call:
        """Ask the rule how the linear runs."""
        call = linear_rule(region_of(node, parse_machine(f"cuda:sm_{architecture}")))
        assert call is not None
        return call


def random_term(format: TermFormat, shape: tuple[int, int], device: str) -> Term:
    """Return random stored values: codes of any bits, small factors, entries anywhere."""
    arrays = {}
    for name, spec in format.arrays(shape).items():
        if spec.dtype.is_floating_point:
            arrays[name] = (torch.randn(spec.shape, device=device) / 8).to(spec.dtype)
        elif name not in ("starts", "columns", "places"):
            limits = torch.iinfo(spec.dtype)
            arrays[name] = torch.randint(
                limits.min, limits.max + 1, spec.shape, dtype=spec.dtype, device=device
            )
    if "starts" in format.arrays(shape):
        arrays |= random_entries(format, shape, device)
    try:
        return format.term(shape, arrays)
    except ValueError:  # bits that are no number: those with the most significant ones cleared are
        codes = {name: each & 0x77 for name, each in arrays.items() if name.endswith("codes")}
        return format.term(shape, arrays | codes)


def random_entries(
    format: TermFormat, shape: tuple[int, int], device: str
) -> dict[str, Tensor]:  # fmt: skip
    """Return the columns of randomly chosen entries, or the places of groups, and where rows
    start; some rows keep many groups, others few."""
    specs, width, chances = format.arrays(shape), shape[1], torch.zeros(1, device=device)
    name = "columns"
    if isinstance(format, KeptGroupsFormat):
        name, width = "places", format.groups(shape)[1]
        chances = torch.rand(shape[0], 1, device=device)
    (count,) = specs[name].shape
    scores = (torch.rand(shape[0], width, device=device) + chances).flatten()
    chosen = scores.topk(count, sorted=False).indices.sort().values
    rows = torch.bincount(chosen // width, minlength=shape[0])
    starts = torch.cat([rows.new_zeros(1), rows.cumsum(0)])
    return {
        "starts": starts.to(specs["starts"].dtype), name: (chosen % width).to(specs[name].dtype)
    }  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """What a linear took, in seconds; `bytes` are those of its stored weight."""

    problem: Problem
    rows: int
    seconds: float
    bytes: int


@dataclass
class Bench:
    """A problem on the GPU. Calls for different numbers of rows share copies of the weights."""

    problem: Problem
    driver: Driver
    overlapping: bool = True

    @cached_property
    def weights(self) -> list[Weight]:
        return self.problem.weights("cuda")

    @cached_property
    def node(self) -> Node:
        return self.problem.node(self.weights)

    @property
    def bytes(self) -> int:
        """Stored bytes of the weights."""
        return sum(term.bits for weight in self.weights for term in weight.terms) // 8

    @property
    def copies(self) -> int:
        return min(MOST_COPIES, max(2, -(-CACHED // self.bytes)))

    @cached_property
    def kept(self) -> dict[Argument, list[Tensor]]:
        """Every array of the weight, as often as there are copies."""
        return {}

    def call(self) -> Call:
        return self.problem.call(self.node, self.driver.capability)

    def calls(self, rows: int, call: Call | None = None) -> tuple[list[Loaded], list[Any], Tensor]:
        """Return the call on each copy of the weight, its operands and its result."""
        call = call or self.call()
        values = operands(self.node, rows)
        result = torch.full((rows, self.problem.outer), float("nan"), device="cuda").half()
        cubin_of = lambda launch: compile_launch(launch, self.driver.capability)  # noqa: E731
        with torch.device("cuda"):  # where the tables that repacking makes lie, too
            first = Loaded(call, values, {"rows": rows}, result, self.driver, cubin_of)
        found = [first]
        for argument, array in first.arrays.items():
            if first.is_weight(argument) and argument not in self.kept:
                clones = [array.clone() for _ in range(self.copies - 1)]
                self.kept[argument] = [array, *clones]
        for number in range(1, self.copies):
            mine = {each: arrays[number] for each, arrays in self.kept.items()}
            found.append(
                first.copied({each: mine.get(each, a) for each, a in first.arrays.items()})
            )
        torch.cuda.synchronize()
        return found, values, result

    def time(self, rows: int, call: Call | None = None) -> Timing:
        """Time one number of rows."""
        calls, _, _ = self.calls(rows, call)
        graph = record(self.driver, calls, self.overlapping)
        seconds = time_graph(self.driver, graph) / len(calls)
        return Timing(self.problem, rows, seconds, self.bytes)

    def check(self, rows: int, call: Call | None = None) -> float:
        """Return the relative error of a call in a graph with others, against float64."""
        calls, values, result = self.calls(rows, call)
        self.driver.launch_graph(record(self.driver, calls[-1:] * 3, self.overlapping))
        self.driver.synchronize()
        exact = self.expected(values)
        error = float((result.double() - exact).norm() / exact.norm())
        return error if error == error else float("inf")

    def expected(self, values: Sequence[Any]) -> Tensor:
        """Return the result in float64."""
        x = values[0]
        rows = (x.dequantize() if isinstance(x, QuantizedTensor) else x).cuda().double()
        product, *others = (rows @ dense_of(weight).T for weight in self.weights)
        if self.problem.gated:
            return torch.nn.functional.silu(product) * others[0]
        if not self.problem.epilogue:
            return product
        (bias,) = (v for v in values if isinstance(v, Weight) and len(v.shape) == 1)
        (residual,) = (v for v in values[1:] if isinstance(v, Tensor))
        active = torch.nn.functional.silu(product + bias.dense().cuda().double())
        return residual.cuda().double() + active


def dense_of(weight: Weight) -> Tensor:
    """Return a weight in float64."""
    with torch.device("cuda"):
        return torch.stack([term.dense().double() for term in weight.terms]).sum(0)


def operands(node: Node, rows: int) -> list[Any]:
    """Return random values of the fused node's operands: small ones, for scales that are codes
    times scales are large, and results are float16."""
    found: list[Any] = []
    for operand in node.inputs:
        if isinstance(operand.op, ops.Parameter):
            found.append(operand.op.weight)
            continue
        value, format = torch.randn(rows, operand.tensor.shape[-1]) / 256, operand.tensor.format
        found.append(quantize_activation(value, format) if format else value.half())
    return found


def time_graph(driver: Driver, graph: Any) -> float:
    """Return the median seconds of a graph."""
    start, stop = driver.event(), driver.event()
    taken = []
    for number in range(REPLAYS + WARM):
        driver.record(start)
        driver.launch_graph(graph)
        driver.record(stop)
        driver.synchronize()
        if number >= WARM:
            taken.append(driver.seconds_between(start, stop))
    driver.refused("cuGraphExecDestroy", graph)
    return statistics.median(taken)


def time_torch(call: Callable[[Any], Any], weights: Sequence[Any]) -> float:
    """Return the median seconds that torch takes for one weight, in a CUDA graph of all."""
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
    for number in range(REPLAYS + WARM):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        if number >= WARM:
            taken.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(taken) / len(weights)


def dense_seconds(outer: int, inner: int, rows: int, dtype: torch.dtype) -> float:
    """Return the seconds of torch's product with a dense weight."""
    copies = min(MOST_COPIES, max(2, -(-CACHED // (2 * outer * inner))))
    weights = [torch.randn(outer, inner, device="cuda", dtype=dtype) for _ in range(copies)]
    x = torch.randn(rows, inner, device="cuda", dtype=dtype)
    return time_torch(lambda w: torch.nn.functional.linear(x, w), weights)


def int4_seconds(outer: int, inner: int, rows: int, group: int = 128) -> float | None:
    """Return the seconds of torch's own int4 product, bfloat16 times int4 with scales and zeros;
    None where this torch lacks it."""
    if not hasattr(torch, "_weight_int4pack_mm"):
        return None
    copies = min(MOST_COPIES, max(2, -(-CACHED // (outer * inner // 2))))
    try:
        weights = []
        for _ in range(copies):
            bytes = torch.randint(
                0, 256, (outer, inner // 2), dtype=torch.uint8, device="cuda"
            )  # fmt: skip
            packed = torch._convert_weight_to_int4pack(bytes, 8)
            factors = torch.randn(inner // group, outer, 2, device="cuda").bfloat16()
            weights.append((packed, factors))
        x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
        return time_torch(lambda w: torch._weight_int4pack_mm(x, w[0], group, w[1]), weights)
    except (RuntimeError, NotImplementedError) as error:
        print(f"torch's int4 product of {outer} x {inner} fails: {error}", flush=True)
        return None


def copy_bandwidth() -> float:
    """Return bytes read and written per second by a large copy, the faster of two ways."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda s: target.copy_(s)), (lambda s: torch.add(s, 1.0, out=target))
    return 2 * source.nbytes / min(time_torch(way, [source]) for way in ways)


# ---------------------------------------------------------------- compiling


def compile_everything(
    problems: Sequence[Problem], rows: Sequence[int], architecture: int, workers: int
) -> int:
    """Compile every launch side by side, so that timing finds them in the cache; return how many
    there are."""
    items = [(problem, rows, architecture) for problem in problems]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return sum(pool.map(compile_problem, items))


def compile_problem(item: tuple[Problem, Sequence[int], int]) -> int:
    """Compile the launches of one problem."""
    torch.set_num_threads(1)
    problem, rows, architecture = item
    launches = set(launches_of(problem.call(problem.node(problem.planned()), architecture), rows))
    for launch in launches:
        compile_launch(launch, architecture)
    return len(launches)


def launches_of(call: Call, rows: Sequence[int]) -> Iterator[Launch]:
    """Yield what a call launches for these numbers of rows."""
    for count in rows:
        yield from call.variant(count).launches
