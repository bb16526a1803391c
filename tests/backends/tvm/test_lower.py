"""Programs: what shares kernels and buffers, what is refused, what any model may return."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qc
from qc.backends.artifact import ArtifactFacts
from qc.backends.lowering import Lowered
from qc.backends.region import Region
from qc.backends.tvm.artifact import manifest_of
from qc.backends.tvm.build import write_program
from qc.backends.tvm.kernel import Kernel, KernelRule
from qc.backends.tvm.lower import lower
from qc.backends.tvm.rules import CPU_RULES
from qc.errors import UnsupportedError
from qc.ir.graph import Graph
from qc.ir.node import Node, Origin, make
from qc.ir.ops import Append, Binary, Input, Operand, Parameter, Scalar, Torch, Unary
from qc.ir.target import CPUS, host_cpu
from qc.ir.types import TensorType, symbol
from qc.ir.weights.dense import dense_term
from qc.ir.weights.weight import Weight
from qc.passes.exactness import distance
from qc.passes.pipeline import Context
from qc.passes.plan.fuse import Fuse
from qc.runtime import Artifact, load
from qc.runtime.manifest import KernelStep
from qc.runtime.package import ArtifactWriter
from tests.families import build

BATCH, SEQ, PAST = symbol("batch"), symbol("seq"), symbol("past")
TARGET = CPUS["x86_64-v3"]


def program_of(graph: Graph, rules: tuple[KernelRule, ...] = CPU_RULES) -> Lowered:
    return lower(Fuse().run(graph, Context(TARGET)), TARGET, rules)


def artifact_of(program: Lowered, place: Path) -> Artifact:
    """Compile and load a program."""
    with ArtifactWriter(place) as writer:
        write_program(program, writer, lambda step, fraction: None)
        writer.finish(manifest_of(program, ArtifactFacts("cpu"), has_tokenizer=False))
    return load(place)


def number(value: float) -> Node:
    return make(Scalar(value, torch.float32))


def rows(label: str = "x", width: int = 24) -> Node:
    return make(Input(label, TensorType((BATCH, width), torch.float32)))


# ---------------------------------------------------------------- sharing


def test_layers_share_their_kernels() -> None:
    """A third layer is more steps with the same kernels."""
    two, three = (
        lower(qc.trace(build("llama", num_hidden_layers=n)).quantize("w4").lower(TARGET).graph,
              TARGET, CPU_RULES)
        for n in (2, 3)
    )  # fmt: skip
    assert two.kernels.keys() == three.kernels.keys()
    assert len(three.steps) > len(two.steps)
    # Trailing positions use the kernels of all positions: one for all norms with int8 results.
    norms = [step for step in three.steps if isinstance(step, KernelStep)
             and "norm" in step.origin and step.kernel.startswith("rows")]  # fmt: skip
    assert len(norms) == 2 * 3 + 1
    assert len({step.kernel for step in norms}) == 1


def test_ids_stay_below_the_rows_of_the_smallest_table() -> None:
    planned = qc.trace(build("llama", num_hidden_layers=1)).quantize("f32").lower(TARGET)
    values = {value.name: value for value in lower(planned.graph, TARGET, CPU_RULES).values}
    assert values["input_ids"].below == 128
    assert values["past_key_0"].kind == "state"
    assert values["past_key_0"].shape == ("batch", "context", 2, 16)
    assert values["logits"].shape == ("batch", "keep", 128)


def test_parameters_of_one_name_are_stored_apart(tmp_path: Path) -> None:
    x = rows()
    one, two = (
        make(Parameter(Weight("w", (24,), (dense_term(torch.full((24,), float(n))),))))
        for n in (2, 3)
    )
    graph = Graph((x,), (make(Binary("add"), make(Binary("mul"), x, one), two),), ("output",))
    program = program_of(graph)
    assert len(program.arrays) == 2
    values = torch.randn(3, 24)
    assert distance(2 * values + 3, artifact_of(program, tmp_path / "m")(values)) < 1e-6


# ---------------------------------------------------------------- rules


def only_single_ops(rule: KernelRule) -> KernelRule:
    """Return a rule that refuses what computes more than one op."""

    def single(region: Region) -> Kernel | None:
        inner = [n for n in region.body.nodes if not isinstance(n.op, Input | Scalar)]
        return rule(region) if len(inner) == 1 else None

    return single


def test_what_no_rule_takes_whole_is_computed_in_parts(tmp_path: Path) -> None:
    x = rows()
    root = make(Unary("tanh"), make(Binary("mul"), make(Binary("add"), x, number(1.0)), x))
    graph = Graph((x,), (root,), ("output",))
    whole = program_of(graph)
    parts = program_of(graph, tuple(only_single_ops(rule) for rule in CPU_RULES))
    assert (len(whole.steps), len(parts.steps)) == (1, 3)
    values = torch.randn(5, 24)
    expected = ((values + 1) * values).tanh()
    for name, program in (("whole", whole), ("parts", parts)):
        assert distance(expected, artifact_of(program, tmp_path / name)(values)) < 1e-6


def test_an_op_without_a_kernel_is_named_with_its_origin() -> None:
    x = rows()
    root = make(Unary("tanh"), x, origin=Origin("layers.3.act"))
    with pytest.raises(UnsupportedError, match=r"no kernel computes tanh.*layers\.3\.act"):
        program_of(Graph((x,), (root,), ("output",)), ())


def test_values_that_grow_with_the_past_are_refused() -> None:
    def cache(label: str, length: object) -> Node:
        return make(Input(label, TensorType((BATCH, length, 2, 8), torch.float32)))  # type: ignore[arg-type]

    past, new = cache("past", PAST), cache("new", SEQ)
    appended = make(Append(), past, new)
    total = make(Torch("aten.relu.default", (Operand(0),), (), appended.type), appended)
    graph = Graph((new, past), (total, appended), ("output", "present"))
    with pytest.raises(UnsupportedError, match="grows with the cached past; only caches may"):
        program_of(graph)


# ---------------------------------------------------------------- what models may return and use


class Returns(nn.Module):
    """A model of one expression."""

    def __init__(self, compute: Callable[[Returns, Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.edges = nn.Parameter(torch.linspace(-2, 2, 9))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


@pytest.mark.parametrize(
    "compute",
    [
        pytest.param(lambda model, x: x, id="an input"),
        pytest.param(lambda model, x: x.reshape(-1, 8), id="an input reshaped"),
        pytest.param(lambda model, x: (x * 2).reshape(-1, 8), id="a value reshaped"),
        pytest.param(lambda model, x: torch.topk(x, 3)[0], id="an item on torch"),
        pytest.param(lambda model, x: torch.topk(x, 3)[1], id="integers of torch"),
        pytest.param(lambda model, x: torch.searchsorted(model.edges, x) + 1, id="a parameter"),
        pytest.param(lambda model, x: x.argmax(-1), id="integers"),
        pytest.param(lambda model, x: x > 0.5, id="booleans"),
        pytest.param(lambda model, x: x.sum(), id="one number"),
        pytest.param(lambda model, x: torch.topk(x.sort()[0] + 1, 3)[0] * 2, id="torch twice"),
        pytest.param(lambda model, x: x.to(torch.float16), id="halves"),
        pytest.param(lambda model, x: model.edges + 0 * x.sum(), id="a parameter, nearly"),
    ],
)
def test_anything_may_be_returned(
    compute: Callable[[Returns, Tensor], Tensor],
) -> None:
    model = Returns(compute).eval()
    artifact = qc.compile(model, "cpu-f32", example_inputs=(torch.randn(3, 16),))
    x = torch.randn(5, 16)
    expected = model(x).detach()
    found = torch.as_tensor(artifact(x))
    assert found.shape == expected.shape
    assert torch.allclose(found.float(), expected.float(), rtol=1e-5, atol=1e-6)
    if not expected.is_floating_point():
        assert found.dtype == expected.dtype


def test_the_host_is_a_target_that_code_is_made_for() -> None:
    assert host_cpu() in CPUS.values()
