"""Whatever `check` accepts builds and computes what torch computes; the rest is refused up front.

A sweep of formats, sums, shapes and targets over linears: the formats are the examples of every
class that the catalog finds, and sums are drawn from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from random import Random
from typing import Any

import pytest
import torch

from qc.backends.region import Region, region_of
from qc.backends.tvm.kernel import Kernel
from qc.backends.tvm.linear.rule import linear_rule
from qc.checking.check import Expected, expected
from qc.errors import FormatError
from qc.ir import ops
from qc.ir.fused import Fused
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.quantized import quantize_activation
from qc.ir.target import CPUS, Target, cpu_features, host_cpu
from qc.ir.types import ActivationFormat, TensorType, symbol
from qc.ir.weights.catalog import example_formats
from qc.ir.weights.dense import dense_weight
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import WeightFormat
from qc.passes.pipeline import Context, Pipeline
from qc.passes.plan import plan
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.round_to_nearest import RoundToNearest
from tests.backends.tvm.linear.cases import buffers, build, widened

SHAPES = ((33, 129), (48, 576), (7, 31), (1, 7), (127, 33))
ACTIVATIONS = (None, ActivationFormat(8, 32))
ROWS = (1, 2, 13)
"""One row, fewer than a tile of any target, and tiles that overlap."""

NAMED_SUMS = (
    "int3·g64 + rank16 + sparse0.5%",
    "int4·g128 + rank32",
    "int4·g32·min + sparse1%",
    "int2·g32·min + columns1(dense f16)",
    "nf4·g64·scale(uint8·row) + rank4",
)
RANDOM_SUMS = 40
TOLERANCE = 1e-5
"""In the Frobenius norm: a hundred times what float32 sums of 576 products differ by."""

ALL = {name: tuple(formats) for name, formats in example_formats().items()}
SINGLE = tuple(WeightFormat((term,)) for formats in ALL.values() for term in formats)


def random_sums() -> tuple[WeightFormat, ...]:
    """Draw sums of 2 or 3 examples, always the same while the examples are."""
    draw = Random(0)
    terms = [format.terms[0] for format in SINGLE]
    return tuple(
        WeightFormat(tuple(draw.sample(terms, draw.choice((2, 3))))) for _ in range(RANDOM_SUMS)
    )


SUMS = (*map(parse_weights, NAMED_SUMS), *random_sums())


@dataclass(frozen=True)
class Scheme:
    """One linear, stored in a format, with activations in another."""

    format: WeightFormat
    shape: tuple[int, int]
    activation: ActivationFormat | None

    @cached_property
    def passes(self) -> Pipeline:
        store = RoundToNearest(self.format)
        return Pipeline(
            [store, QuantizeActivations(self.activation)] if self.activation else [store]
        )

    @cached_property
    def graph(self) -> Graph:
        """The linear with random float32 weights."""
        outer, inner = self.shape
        values = torch.randn(outer, inner, generator=torch.Generator().manual_seed(outer + inner))
        x = make(ops.Input("x", TensorType((symbol("rows"), inner), torch.float32)))
        weight = make(ops.Parameter(dense_weight("w", values)))
        return Graph((x,), (make(ops.Linear(), x, weight),), ("y",))

    def expected(self, target: Target) -> Expected:
        """Return what `check` says."""
        return expected(self.graph, self.passes, target)

    def quantized(self) -> Graph:
        return self.passes.run(self.graph, Context(Target("any", "any")))

    def __str__(self) -> str:
        return f"{self.format} {list(self.shape)} x {self.activation or 'float32'}"


def linear_node(graph: Graph, target: Target) -> Node:
    """Return the fused node of the linear."""
    planned = plan(target).run(graph, Context(target))
    fused = [node for node in planned.nodes if isinstance(node.op, Fused)]
    return next(n for n in fused if any(isinstance(i.op, ops.Linear) for i in n.op.body.nodes))


@dataclass
class Built:
    """A scheme with its stored weight and its kernel."""

    scheme: Scheme
    node: Node
    kernel: Kernel

    def error(self, function: Any, rows: int) -> float:
        """Return the relative distance from the product in float64 of the stored weights."""
        generator = torch.Generator().manual_seed(rows)
        values: list[Any] = []
        for operand in self.node.inputs:
            if isinstance(operand.op, ops.Parameter):
                values.append(operand.op.weight)
                continue
            x = torch.randn(rows, self.scheme.shape[1], generator=generator)
            format = operand.tensor.format
            values.append(quantize_activation(x, format) if format else x)
        tensors = [v if isinstance(v, torch.Tensor) else dense(v) for v in values]
        assert isinstance(self.node.op, Fused)
        wanted = self.node.op.meaning(*tensors, sizes={}).double()
        result = torch.full((rows, self.scheme.shape[0]), float("nan"))
        function(*buffers(self.kernel, values, result))
        if not bool(torch.isfinite(result).all()):
            return float("inf")
        return float((result - wanted).norm() / wanted.norm().clamp_min(1e-30))


def dense(value: Any) -> torch.Tensor:
    """Return a stored weight or quantized values in float64."""
    return widened(value.dense() if hasattr(value, "terms") else value)


def check_all(schemes: Sequence[Scheme], target: Target) -> list[str]:
    """Check, build and run; return what went wrong."""
    wrong: list[str] = []
    built: list[Built] = []
    for scheme in schemes:
        found = scheme.expected(target)
        if found.refusals:
            wrong += refused_badly(scheme, found, target)
            continue
        node = linear_node(scheme.quantized(), target)
        region: Region = region_of(node, target)
        kernel = linear_rule(region)
        if kernel is None:
            wrong.append(f"{scheme}: no kernel")
            continue
        rules = found.linears[0].rules
        if kernel.rule != f"linear_{'_'.join(rules)}":
            wrong.append(f"{scheme}: {kernel.rule}, check promised {rules}")
        built.append(Built(scheme, node, kernel))
    module = build([each.kernel for each in built], target)
    if not target.features <= cpu_features():
        return wrong
    for number, each in enumerate(built):
        for rows in ROWS:
            error = each.error(module[f"k{number}"], rows)
            if not error <= TOLERANCE:
                wrong.append(f"{each.scheme}, {rows} rows, {each.kernel.rule}: error {error:.1e}")
    return wrong


def refused_badly(scheme: Scheme, found: Expected, target: Target) -> list[str]:
    """Say what a refusal lacks: one sentence, also from the passes, and a format that works."""
    refusal = found.refusals[0]
    sentence = str(refusal)
    wrong = []
    if "\n" in sentence or len(sentence) > 400:
        wrong.append(f"{scheme}: {sentence!r} is no short sentence")
    try:
        scheme.quantized()
        wrong.append(f"{scheme}: refused, but it can be stored")
    except FormatError as error:
        if str(error) != sentence:
            wrong.append(f"{scheme}: check says {sentence!r}, the pass {str(error)!r}")
    instead = Scheme(parse_weights(refusal.instead), scheme.shape, scheme.activation)
    if instead.expected(target).refusals:
        wrong.append(f"{scheme}: {refusal.instead} is refused too")
    return wrong


def in_turns(formats: Sequence[WeightFormat], shapes: int = 1) -> Iterator[Scheme]:
    """Give each format some of the shapes, one kind of activation each."""
    sizes, activations = cycle(SHAPES), cycle(ACTIVATIONS)
    for format in formats:
        for _ in range(shapes):
            yield Scheme(format, next(sizes), next(activations))


def refused_schemes() -> list[Scheme]:
    """Return the examples with the shapes that they refuse."""
    every = (Scheme(format, shape, None) for format in SINGLE for shape in SHAPES)
    return [scheme for scheme in every if scheme.format.refusal(scheme.shape) is not None]


def test_what_check_accepts_computes_what_torch_computes() -> None:
    """The first example of every class and some sums, on this machine."""
    few = [WeightFormat((formats[0],)) for formats in ALL.values()]
    named = SUMS[: len(NAMED_SUMS)]
    assert not check_all(list(in_turns([*few, *named])), host_cpu())


def test_refusals_are_found_by_the_check() -> None:
    """The sweep below holds refusals: it would prove nothing without."""
    refused = refused_schemes()
    assert len(refused) > 5
    wrong = []
    for scheme in refused:
        found = scheme.expected(host_cpu())
        assert found.refusals, scheme
        wrong += refused_badly(scheme, found, host_cpu())
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_format_in_every_shape(name: str) -> None:
    formats = [WeightFormat((term,)) for term in ALL[name]]
    assert not check_all(list(in_turns(formats, len(SHAPES))), host_cpu())


@pytest.mark.slow
def test_narrow_vectors() -> None:
    assert not check_all(list(in_turns([*SINGLE, *SUMS[:12]])), CPUS["x86_64-v2"])


@pytest.mark.slow
def test_sums() -> None:
    assert not check_all(list(in_turns(SUMS, shapes=2)), host_cpu())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x86_64-v4", "avx512-vnni"])
def test_wider_vectors_build(name: str) -> None:
    """And run where the processor has them."""
    assert not check_all(list(in_turns([*SINGLE, *SUMS[:12]])), CPUS[name])
