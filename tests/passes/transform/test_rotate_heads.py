"""Values inside heads are turned, the linears around with them."""

import torch

from qc.ir import ops
from qc.ir.node import make
from qc.passes.transform.rotate_heads import RotateHeads
from tests.ir.toys import Block, block_graph
from tests.passes.lift.drawing import apply, graph, run


def test_the_values_and_the_output_turn() -> None:
    before = block_graph()
    after = run(RotateHeads(), before)
    assert after.same_as(before)  # the same ops; other values in two weights
    pairs = zip(before.parameters, after.parameters, strict=True)
    changed = [old.origin.module for old, new in pairs if old is not new]
    assert sorted(changed) == ["o", "v"]


def test_values_that_others_read_stay() -> None:
    toy = Block()
    x = make(ops.Embedding(), toy.ids, toy.table)
    mixed = toy.attention(x)
    (attention,) = (n for n in graph(mixed).nodes if isinstance(n.op, ops.Attention))
    for other in (attention, attention.inputs[2], attention.inputs[2].inputs[0]):
        before = graph(mixed, other)
        assert set(apply(RotateHeads(), before).nodes) == set(before.nodes)


def test_heads_may_follow_heads() -> None:
    """A second attention reads what the first writes: its linears turn once for each."""
    toy = Block()
    x = make(ops.Embedding(), toy.ids, toy.table)
    before = graph(toy.attention(toy.attention(x)))
    after = run(RotateHeads(), before)
    pairs = list(zip(before.parameters, after.parameters, strict=True))
    assert sum(old is not new for old, new in pairs) == 4
    assert all(torch.isfinite(n.op.weight.dense()).all() for n in after.parameters
               if isinstance(n.op, ops.Parameter))  # fmt: skip
