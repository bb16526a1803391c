"""Products with stored vectors vanish into norms and linears, or stay where they cannot."""

import torch

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.passes.transform.fold_scales import FoldScales
from qc.passes.transform.smooth_inputs import SmoothInputs
from tests.ir.toys import DIM, GROUPS, HEADS, block_graph
from tests.passes.lift.drawing import (
    BATCH,
    SEQ,
    apply,
    graph,
    mul,
    run,
    stored,
    table,
    unary,
    value,
)


def scales(count: int) -> Node:
    return table(torch.rand(count, generator=torch.Generator().manual_seed(1)) + 0.5)


def products(found: Graph) -> int:
    return sum(node.op == ops.Binary("mul") for node in found.nodes)


def linear(x: Node, out: int, *bias: Node) -> Node:
    channels = x.tensor.shape[-1]
    assert isinstance(channels, int)
    return make(ops.Linear(), x, stored(out, channels), *bias)


def test_a_norm_takes_the_factors() -> None:
    x = value("x", BATCH, 8)
    for norm in (
        make(ops.RMSNorm(1e-6), x, scales(8)),
        make(ops.LayerNorm(1e-6), x, scales(8), stored(8)),
    ):
        after = run(FoldScales(), graph(linear(mul(norm, scales(8)), 4)))
        assert products(after) == 0


def test_a_linear_takes_the_factors_through_gates_and_slices() -> None:
    x = value("x", BATCH, SEQ, 8)
    gated = make(ops.GatedActivation("silu"), linear(x, 6), linear(x, 6, stored(6)))
    cut = make(ops.Slice(1, 0, SEQ), gated)
    after = run(FoldScales(), graph(linear(mul(cut, scales(6)), 4)))
    assert products(after) == 0
    after = run(FoldScales(), graph(linear(mul(unary("relu", linear(x, 6)), scales(6)), 4)))
    assert products(after) == 0


def test_what_is_not_homogeneous_keeps_the_product() -> None:
    x = linear(value("x", BATCH, 8), 6)
    for kind in ("gelu", "silu", "tanh"):
        assert products(run(FoldScales(), graph(linear(mul(unary(kind, x), scales(6)), 4)))) == 1


def test_factors_that_are_not_positive_stay() -> None:
    x = unary("relu", linear(value("x", BATCH, 8), 6))
    negative = table(torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, 1.0]))
    assert products(run(FoldScales(), graph(mul(x, negative)))) == 1


def test_a_value_that_others_read_keeps_the_product() -> None:
    norm = make(ops.RMSNorm(1e-6), value("x", BATCH, 8), scales(8))
    scaled = linear(mul(norm, scales(8)), 4)
    assert products(run(FoldScales(), graph(scaled, linear(norm, 4)))) == 1
    assert products(run(FoldScales(), graph(scaled, norm))) == 1


def heads_graph(factors: torch.Tensor) -> Graph:
    """Grouped attention whose result is multiplied by factors."""
    x = value("x", BATCH, SEQ, 16)
    q, k, v = (
        make(ops.Reshape((BATCH, SEQ, count, DIM)), linear(x, count * DIM))
        for count in (HEADS, GROUPS, GROUPS)
    )
    mixed = make(ops.Attention(0.3, causal=True), q, k, v)
    merged = make(ops.Reshape((BATCH, SEQ, HEADS * DIM)), mixed)
    return graph(linear(mul(merged, table(factors)), 5))


def test_query_heads_that_share_values_must_ask_for_the_same_factor() -> None:
    own = torch.rand(GROUPS, 1, DIM) + 0.5
    equal = own.expand(GROUPS, HEADS // GROUPS, DIM).flatten()
    assert products(run(FoldScales(), heads_graph(equal))) == 0
    assert products(run(FoldScales(), heads_graph(torch.rand(HEADS * DIM) + 0.5))) == 1


def test_two_products_become_one() -> None:
    x = value("x", BATCH, 8)
    after = run(FoldScales(), graph(linear(mul(mul(x, scales(8)), scales(8)), 4)))
    assert products(after) == 1


def test_smoothing_a_block_leaves_one_product() -> None:
    """That of the merged heads: the toy's query heads share values."""
    before = block_graph()
    after = apply(FoldScales(), apply(SmoothInputs(), before))
    assert products(after) - products(before) == 1
