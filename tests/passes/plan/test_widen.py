"""What a GPU would multiply as floats is rounded where it is made; nothing else changes."""

import pytest

from qc.ir import ops
from qc.ir.fused import Fused
from qc.ir.graph import Graph
from qc.ir.node import make
from qc.ir.target import parse_machine
from qc.ir.types import ActivationFormat
from qc.passes.exactness import relative_difference
from qc.passes.pipeline import Context, Pipeline
from qc.passes.plan import plan
from qc.passes.plan.widen import WidenActivations
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.round_to_nearest import RoundToNearest
from tests.ir.toys import block_graph
from tests.passes.lift.drawing import BATCH, graph, stored, value

INT8, INT4 = ActivationFormat(8, 32), ActivationFormat(4)
TOKEN, WIDE = ActivationFormat(8), ActivationFormat(8, 128)
E4M3, E2M1 = ActivationFormat(8, kind="e4m3"), ActivationFormat(4, 16, "e2m1")


def linear(format: ActivationFormat, channels: int = 256, linears: int = 1) -> Graph:
    """Return linears of one quantized input."""
    codes = make(ops.Quantize(format), value("x", BATCH, channels))
    return graph(*(make(ops.Linear(), codes, stored(8, channels)) for _ in range(linears)))


def widened(before: Graph, machine: str) -> Graph:
    target = parse_machine(machine)
    return Pipeline([WidenActivations()], verify=True, tolerance=0.0).run(before, Context(target))


def test_linears_that_share_codes_share_floats() -> None:
    x = value("x", BATCH, 256)
    floats = make(ops.FakeQuantize(INT8), x)
    expected = graph(*(make(ops.Linear(), floats, stored(8, 256)) for _ in range(3)))
    assert widened(linear(INT8, linears=3), "cuda:sm_90").same_as(expected)


@pytest.mark.parametrize(
    ("format", "channels", "machine", "changes"),
    [
        (INT8, 256, "cuda:sm_80", True),
        (INT8, 256, "rocm:gfx942", True),
        (INT8, 64, "cuda:sm_90", True),
        (INT8, 32, "cuda:sm_90", False),  # the group is all there is
        (WIDE, 256, "cuda:sm_90", False),
        (TOKEN, 256, "cuda:sm_90", False),
        (TOKEN, 256, "rocm:gfx942", False),
        (INT4, 256, "cuda:sm_90", True),
        (E4M3, 256, "cuda:sm_80+sm_90", True),
        (E4M3, 256, "cuda:sm_90", False),
        (E2M1, 256, "cuda:sm_90", True),
        (E2M1, 256, "cuda:sm_120", False),
        (INT8, 256, "cpu:avx512-vnni", False),
        (INT8, 256, "arm64", False),
        (INT8, 256, "torch", False),
    ],
    ids=str,
)
def test_floats_are_for_what_no_unit_multiplies(
    format: ActivationFormat, channels: int, machine: str, changes: bool
) -> None:
    before = linear(format, channels)
    after = widened(before, machine)
    assert after.same_as(before) == (not changes)
    assert any(isinstance(node.op, ops.FakeQuantize) for node in after.nodes) == changes


def test_a_block_keeps_its_kernels_and_its_meaning() -> None:
    store = (RoundToNearest("int4·g32"), QuantizeActivations(INT8))
    target = parse_machine("cuda:sm_90")
    quantized = Pipeline(store).run(block_graph(), Context(target))
    codes, floats = (
        plan(parse_machine(machine)).run(quantized, Context(parse_machine(machine)))
        for machine in ("cpu:x86_64-v3", "cuda:sm_90")
    )
    assert relative_difference(codes, floats) == 0.0
    assert [text.replace("fake_", "") for text in labels(floats)] == labels(codes)
    assert labels(codes) != labels(floats)


def labels(planned: Graph) -> list[str]:
    """Print what is inside every kernel."""
    return [node.op.attributes() for node in planned.nodes if isinstance(node.op, Fused)]


def test_the_printed_form_names_the_format() -> None:
    lines = str(widened(linear(INT8), "cuda:sm_90")).splitlines()
    (line,) = (each for each in lines if "fake_quantize" in each)
    assert "= fake_quantize(%0) int8/g32" in line
    assert ": f32[batch, 256]" in line


def test_plans_of_other_machines_have_no_such_pass() -> None:
    names = {
        machine: [one.name for one in plan(parse_machine(machine)).passes]
        for machine in ("cpu:x86_64-v3", "arm64", "torch", "cuda:sm_90", "rocm:gfx942")
    }
    gpu = ["widen_activations", "fuse"]
    assert names == {
        "cpu:x86_64-v3": ["fuse"], "arm64": ["fuse"], "torch": [], "cuda:sm_90": gpu,
        "rocm:gfx942": gpu,
    }  # fmt: skip
