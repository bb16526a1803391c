"""What every transform in front of quantization keeps: the meaning, the stage, all other nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qc
from qc.backends.tvm.lower import lower
from qc.backends.tvm.rules import CPU_RULES
from qc.ir import ops
from qc.ir.fused import Fused
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.node import make
from qc.ir.target import CPUS, Target
from qc.ir.types import ActivationFormat
from qc.passes.exactness import distance, relative_difference
from qc.passes.lift import LIFT
from qc.passes.pipeline import Context, Pass, Pipeline
from qc.passes.prepare import PREPARE
from qc.passes.prepare.explicit_cache import ExplicitCache
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.transform.fold_gains import FoldGains
from qc.passes.transform.fold_scales import FoldScales
from qc.passes.transform.rotate_heads import RotateHeads
from qc.passes.transform.rotate_inputs import RotateInputs
from qc.passes.transform.rotate_stream import RotateStream
from qc.passes.transform.smooth_inputs import SmoothInputs
from qc.runtime.manifest import KernelStep
from tests.comparison import assert_equal_up_to_flips
from tests.families import DECODERS, FAMILIES, build, captured
from tests.ir.toys import block_graph
from tests.passes.lift.drawing import BATCH, apply, graph, stored, value

TRANSFORMS = (
    RotateInputs(),
    RotateInputs(block=8),
    RotateInputs("down|o_proj"),
    SmoothInputs(),
    SmoothInputs(beta=1.0, targets="gate|up"),
    FoldGains(),
    RotateStream(),
    RotateStream(seed=1),
    RotateHeads(),
)

FOLDED = (
    FoldGains(),
    RotateStream(),
    RotateHeads(),
    Pipeline((SmoothInputs(), FoldScales())),
    Pipeline((RotateStream(), RotateHeads(), SmoothInputs(), FoldScales())),
)
"""What leaves no trace but other values in the weights, mostly."""


@pytest.mark.parametrize("one", TRANSFORMS, ids=repr)
def test_the_meaning_stays(one: Pass) -> None:
    before = block_graph()
    after = apply(one, before)
    one.ensures.check(after)
    assert set(after.nodes) != set(before.nodes)
    assert relative_difference(before, after) < 1e-6  # measured: 3e-7


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_meaning(family: str) -> None:
    before = captured(family)
    for one in (*PREPARE, *LIFT):
        before = apply(one, before)
    after = apply(RotateInputs(), apply(SmoothInputs(), before))
    rotations = sum(isinstance(n.op, ops.Hadamard) for n in after.nodes)
    inputs = {n.inputs[0] for n in before.nodes if isinstance(n.op, ops.Linear)}
    assert rotations == len(inputs)
    assert relative_difference(before, after) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_meaning_when_folded(family: str) -> None:
    before = captured(family)
    for one in (*PREPARE, *LIFT):
        before = apply(one, before)
    for passes in FOLDED:
        after = passes.run(before, Context(Target("any", "any")))
        assert relative_difference(before, after) < 2e-6, passes  # measured: 6e-7


ROTATED = set(DECODERS) - {"gemma2", "gemma3_text"}
"""Families whose stream is rotated; gemma's norms behind linears have gains inside the stream, and
encoders put out the stream itself."""


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_are_found_by_what_touches_them(family: str) -> None:
    before = captured(family)
    for one in (*PREPARE, *LIFT):
        before = apply(one, before)
    after = apply(RotateStream(), before)
    assert (after is not before) == (family in ROTATED)
    assert not any(isinstance(n.op, ops.Hadamard) for n in after.nodes)


@pytest.mark.parametrize("one", TRANSFORMS, ids=repr)
def test_quantized_linears_stay(one: Pass) -> None:
    x = value("x", BATCH, 32)
    codes = make(ops.Quantize(ActivationFormat(8, 32)), x)
    computed = make(ops.Unary("exp"), value("w", 8, 32))
    before = graph(make(ops.Linear(), codes, stored(8, 32)), make(ops.Linear(), x, computed))
    assert apply(one, before).same_as(before)
    coded = apply(RoundToNearest("int4·g32"), graph(make(ops.Linear(), x, stored(8, 32))))
    assert apply(one, coded).same_as(coded)


RECIPE = (
    ExplicitCache(torch.float16),
    SmoothInputs(),
    RotateInputs(),
    RoundToNearest("int4·g32·min"),
    QuantizeActivations(ActivationFormat(8, 32)),
)


@pytest.fixture(scope="module")
def rotated_llama() -> Any:
    """A llama of one block with two factors: 96 = 8 * 12 channels, 160 = 8 * 20 hidden ones."""
    model = build("llama", num_hidden_layers=1, hidden_size=96, intermediate_size=160)
    return qc.trace(model).quantize(Pipeline(RECIPE, verify=True))


def test_rotations_are_fused_with_norms(rotated_llama: Any) -> None:
    target = CPUS["x86_64-v3"]
    planned = rotated_llama.lower(target).graph
    rows = [n.op.attributes() for n in planned.nodes
            if isinstance(n.op, Fused) and "hadamard" in n.op.attributes()]  # fmt: skip
    assert sorted(rows) == [
        "rows: hadamard quantize",  # the linears of the gate take its scales
        "rows: mul hadamard quantize",  # the result of attention
        *3 * ["rows: rms_norm mul hadamard quantize"],
    ]
    program = lower(planned, target, CPU_RULES)
    assert program.on_torch == []
    assert all(isinstance(step, KernelStep) for step in program.steps)
    assert len(program.steps) == sum(isinstance(n.op, Fused) for n in planned.nodes)


def test_a_rotated_model_compiles(rotated_llama: Any) -> None:
    ids = torch.randint(0, 128, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = rotated_llama(input_ids=ids)["logits"]
    assert torch.equal(rotated_llama.lower("torch").build()(ids), expected)
    assert_equal_up_to_flips(expected, rotated_llama.lower("cpu").build()(ids))


def test_an_outlier_channel_costs_less_when_rotated() -> None:
    """The claim of the method, in the smallest setting: one channel of x is 50 times larger."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 50
    before = graph(make(ops.Linear(), value("x", 64, 64), stored(32, 64)))
    plain, rotated = (error_of(one, x) for one in (before, apply(RotateInputs(), before)))
    assert rotated < 0.5 * plain


def error_of(before: Graph, x: torch.Tensor) -> float:
    """Return the error of 4-bit codes with one scale a token, with exact weights."""
    source, weight = before.outputs[0].inputs
    codes = make(ops.Quantize(ActivationFormat(4)), source)
    after = graph(make(ops.Linear(), codes, weight))
    return distance(*(evaluate(one, {"x": x})["out0"] for one in (before, after)))
