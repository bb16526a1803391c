"""Tables of embeddings in fewer bits."""

import pytest
import torch

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import make
from qc.ir.target import Target
from qc.ir.types import as_dim
from qc.ir.weights.dense import dense_weight
from qc.passes.pipeline import Context, Pipeline
from qc.passes.quantize.tables import StoreTables
from tests.ir.toys import block_graph
from tests.passes.lift.drawing import BATCH, graph, value


def run(before: Graph, format: str = "f16") -> Graph:
    return Pipeline([StoreTables(format)]).run(before, Context(Target("any", "any")))


def table_of(after: Graph) -> ops.Parameter:
    node = next(n for n in after.nodes if isinstance(n.op, ops.Embedding))
    assert isinstance(node.inputs[1].op, ops.Parameter)
    return node.inputs[1].op


def lookup(values: torch.Tensor) -> Graph:
    ids = value("ids", BATCH, dtype=torch.int64)
    return graph(make(ops.Embedding(), ids, make(ops.Parameter(dense_weight("table", values)))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_table_is_rounded_and_keeps_its_type(dtype: torch.dtype) -> None:
    values = torch.randn(5, 8)
    after = run(lookup(values), {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype])
    assert table_of(after).weight.bits_per_element == 16
    assert torch.equal(table_of(after).weight.dense(), values.to(dtype).float())
    assert after.outputs[0].tensor.dtype == torch.float32


def test_a_vocabulary_is_stored_in_int8_a_scale_a_row() -> None:
    values = torch.randn(5, 64) * torch.tensor([1.0, 10.0, 0.1, 1e-3, 50.0])[:, None]
    table = table_of(run(lookup(values), "int8·row")).weight
    assert str(table.format) == "int8·row"
    step = values.abs().amax(1, keepdim=True) / 127
    # half a step of the grid, and what storing the scale in float16 moves 127 steps by
    assert bool(((table.dense() - values).abs() <= step * (0.5 + 127 * 2**-11)).all())


def test_tables_of_positions_have_a_format_of_their_own() -> None:
    ids = make(ops.Arange(as_dim(5), as_dim(0)))
    table = make(ops.Parameter(dense_weight("positions", torch.randn(5, 64))))
    after = run(graph(make(ops.Embedding(), ids, table)), "int8·row")
    assert str(table_of(after).weight.format) == "dense f16"


def test_embeddings_that_share_a_table_keep_sharing_it() -> None:
    ids = value("ids", BATCH, dtype=torch.int64)
    table = make(ops.Parameter(dense_weight("table", torch.randn(5, 64))))
    twice = make(ops.Binary("add"), *(make(ops.Embedding(), ids, table) for _ in range(2)))
    after = run(graph(twice), "int8·row")
    assert len([n for n in after.nodes if isinstance(n.op, ops.Parameter)]) == 1


def test_a_tied_head_keeps_the_original() -> None:
    after = run(block_graph())
    head = after.outputs[0].inputs[1].op
    assert isinstance(head, ops.Parameter)
    assert str(head.weight.format) == "dense f32"
    assert str(table_of(after).weight.format) == "dense f16"


def test_a_table_beyond_the_range_stays() -> None:
    before = lookup(torch.full((5, 8), 1e6))
    assert run(before).same_as(before)


def test_a_second_run_changes_nothing() -> None:
    once = run(block_graph())
    assert run(once).same_as(once)
