"""Fusing keeps the meaning, computes nothing twice, and leaves nothing outside."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qc.ir import ops
from qc.ir.fused import Fused
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.target import Target
from qc.ir.types import ActivationFormat, TensorType, TupleType
from qc.ir.weights.grouped import GroupedFormat
from qc.passes.exactness import relative_difference
from qc.passes.lift import LIFT
from qc.passes.pipeline import Context, Pass, Pipeline
from qc.passes.plan.fuse import Fuse, find_regions
from qc.passes.prepare import PREPARE
from qc.passes.prepare.explicit_cache import ExplicitCache
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.round_to_nearest import RoundToNearest
from tests.families import FAMILIES, captured
from tests.ir.toys import block_graph
from tests.passes.lift.drawing import (
    BATCH,
    SEQ,
    add,
    graph,
    mul,
    permute,
    reshape,
    stored,
    unary,
    value,
)

QUANTIZE = (RoundToNearest(GroupedFormat(4, 32)), QuantizeActivations(ActivationFormat(8, 32)))


def run(before: Graph, *passes: Pass) -> Graph:
    return Pipeline(passes).run(before, Context(Target("any", "any")))


def planned(before: Graph) -> Graph:
    """Fuse, and hold the result to all laws."""
    check_regions(before)
    after = run(before, Fuse())
    assert relative_difference(before, after) <= 1e-6
    computed = Counter(type(n.op) for n in before.nodes if not isinstance(n.op, ops.Scalar))
    again = Counter(type(n.op) for n in computed_nodes(after))
    assert again == computed  # nothing is computed twice, and nothing is lost
    return after


def computed_nodes(after: Graph) -> list[Node]:
    """List the nodes of a planned graph with those inside of fused ones."""
    found: list[Node] = []
    for node in after.nodes:
        if isinstance(node.op, Fused):
            found += [n for n in node.op.body.nodes if not isinstance(n.op, ops.Input)]
        else:
            found.append(node)
    return [n for n in found if not isinstance(n.op, ops.Scalar)]


def check_regions(before: Graph) -> None:
    """No region holds a value that is read outside, but its root; none overlaps another."""
    taken: set[Node] = set()
    for root, region in find_regions(before).items():
        assert root in region.inside
        assert not region.inside & taken
        taken |= region.inside
        for node in region.inside - {root}:
            assert node not in before.outputs
            assert set(before.users[node]) <= region.inside


def labels(after: Graph) -> list[str]:
    return [node.op.attributes() for node in after.nodes if isinstance(node.op, Fused)]


def test_a_block() -> None:
    after = planned(run(block_graph(), *QUANTIZE))
    found = Counter(label.split(":")[0] for label in labels(after))
    assert found == {"linear": 7, "rows": 5, "attention": 1, "rope": 1, "elements": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_meaning(family: str) -> None:
    lifted = run(captured(family), *PREPARE, *LIFT)
    after = planned(lifted)
    planned(run(lifted, ExplicitCache(torch.float16), *QUANTIZE))
    assert sum(isinstance(n.op, Fused) for n in after.nodes) < len(lifted.nodes)


def test_a_chain_is_one_kernel() -> None:
    x = value("x", BATCH, 8)
    after = planned(graph(unary("exp", add(mul(unary("sin", x), 2.0), x))))
    assert labels(after) == ["elements: sin scalar mul add exp"]


def test_a_value_read_twice_outside_is_a_kernel_of_its_own() -> None:
    x = value("x", BATCH, 8)
    shared = unary("exp", x)
    after = planned(graph(unary("sin", shared), unary("cos", shared)))
    assert sorted(labels(after)) == ["elements: cos", "elements: exp", "elements: sin"]


def test_a_value_read_twice_inside_is_no_reason_to_stop() -> None:
    shared = unary("exp", value("x", BATCH, 8))
    after = planned(graph(add(unary("sin", shared), unary("cos", shared))))
    assert labels(after) == ["elements: exp sin cos add"]


def test_an_output_is_never_hidden() -> None:
    inner = unary("exp", value("x", BATCH, 8))
    after = planned(graph(inner, unary("sin", inner)))
    assert len(labels(after)) == 2


def test_a_linear_takes_what_follows_it() -> None:
    x, y = value("x", BATCH, 8), value("y", BATCH, 4)
    linear = make(ops.Linear(), x, stored(4, 8))
    assert labels(planned(graph(add(unary("relu", linear), y)))) == ["linear: linear relu add"]


def test_two_linears_of_one_gate_are_one_kernel() -> None:
    x = value("x", BATCH, 8)
    a, b = (make(ops.Linear(), x, stored(4, 8)) for _ in range(2))
    gated = make(ops.GatedActivation("silu"), a, b)
    assert labels(planned(graph(gated))) == ["linear: linear linear gated"]
    same = make(ops.GatedActivation("silu"), a, a)
    assert labels(planned(graph(same))) == ["linear: linear gated"]
    apart = make(
        ops.GatedActivation("silu"), a, make(ops.Linear(), value("z", BATCH, 8), stored(4, 8))
    )
    planned(graph(apart))


def test_a_residual_of_two_linears_is_added_once() -> None:
    """Each linear could take the sum; the first one does, the other comes in as an operand."""
    x = value("x", BATCH, 8)
    a, b = (make(ops.Linear(), x, stored(4, 8)) for _ in range(2))
    assert sorted(labels(planned(graph(add(a, b))))) == ["linear: linear", "linear: linear add"]


def test_a_reshape_is_a_view_unless_it_is_inside() -> None:
    x = value("x", BATCH, 8)
    after = planned(graph(unary("exp", reshape(x, BATCH, 2, 4))))
    assert labels(after) == ["elements: reshape exp"]
    alone = planned(graph(reshape(x, BATCH, 2, 4)))
    assert labels(alone) == []


def test_calls_and_their_items_stay_outside() -> None:
    x = value("x", BATCH, 8)
    types = TupleType((TensorType((BATCH, 3)), TensorType((BATCH, 3), torch.int64)))
    call = make(ops.Torch("aten.topk.default", (ops.Operand(0), 3), (), types), unary("exp", x))
    after = planned(graph(unary("sin", make(ops.Item(0), call)), make(ops.Item(1), call)))
    assert labels(after) == ["elements: exp", "elements: sin"]


def test_norms_take_rows_and_only_rows() -> None:
    x, y = value("x", BATCH, SEQ, 8), value("y", BATCH, SEQ, 8)
    norm = make(ops.RMSNorm(1e-6), add(x, y), stored(8))
    after = planned(
        graph(make(ops.Linear(), make(ops.Quantize(ActivationFormat()), norm), stored(4, 8)))
    )
    assert labels(after) == ["rows: add rms_norm quantize", "linear: linear"]
    turned = make(ops.RMSNorm(1e-6), permute(x, 1, 0, 2), stored(8))
    assert "elements: permute" in labels(planned(graph(turned)))


def test_rotations_join_the_rows_around_them() -> None:
    x = value("x", BATCH, SEQ, 8)
    norm = make(ops.RMSNorm(1e-6), x, stored(8))
    turned = make(ops.Hadamard(8), mul(norm, stored(8)), stored(2, 2))
    codes = make(ops.Quantize(ActivationFormat()), turned)
    after = planned(graph(make(ops.Linear(), codes, stored(4, 8))))
    assert labels(after) == ["rows: rms_norm mul hadamard quantize", "linear: linear"]
    several = [make(ops.Linear(), turned, stored(4, 8)) for _ in range(2)]
    assert "rows: rms_norm mul hadamard" in labels(planned(graph(*several)))
    assert labels(planned(graph(make(ops.Hadamard(4), x, stored(2, 2))))) == ["rows: hadamard"]
    computed = make(ops.Hadamard(4), unary("tanh", x), unary("exp", stored(2, 2)))
    assert labels(planned(graph(computed))) == ["elements: exp", "rows: tanh hadamard"]


def test_equal_bodies_are_equal_in_structure() -> None:
    x = value("x", BATCH, 8)
    a, b = (make(ops.Linear(), x, stored(4, 8)) for _ in range(2))
    after = planned(graph(unary("exp", a), unary("exp", b), unary("sin", a), unary("sin", b)))
    kernels = [n.op.structure for n in after.nodes if isinstance(n.op, Fused)]
    assert len(kernels) == 6
    assert len(set(map(repr, kernels))) == 3


@st.composite
def drawn_graphs(draw: st.DrawFn) -> Graph:
    """Draw a graph of element, row and matrix operations that read each other at random."""
    nodes = [value("x", BATCH, SEQ, 8), value("y", BATCH, SEQ, 8)]
    for _ in range(draw(st.integers(1, 14))):
        a, b = (nodes[draw(st.integers(0, len(nodes) - 1))] for _ in range(2))
        nodes.append(draw(st.sampled_from(BUILDERS))(a, b))
    picked = draw(st.lists(st.sampled_from(nodes[2:]), min_size=1, max_size=3, unique=True))
    return Graph(tuple(nodes[:2]), tuple(picked), tuple(f"out{i}" for i in range(len(picked))))


BUILDERS = (
    lambda a, b: unary("tanh", a),
    lambda a, b: mul(a, 0.5),
    add,
    lambda a, b: make(ops.GatedActivation("silu"), a, b),
    lambda a, b: make(ops.RMSNorm(1e-5), a, stored(8)),
    lambda a, b: make(ops.Linear(), a, stored(8, 8)),
    lambda a, b: reshape(permute(reshape(a, BATCH, SEQ, 2, 4), 0, 1, 3, 2), BATCH, SEQ, 8),
    lambda a, b: make(ops.Softmax(2), a),
    lambda a, b: make(ops.Hadamard(8), a, stored(2, 2)),
    lambda a, b: make(ops.Linear(), make(ops.Quantize(ActivationFormat(8, 4)), a), stored(8, 8)),
)


@given(drawn_graphs())
@settings(max_examples=60)
def test_any_graph_keeps_its_meaning(before: Graph) -> None:
    planned(before)
