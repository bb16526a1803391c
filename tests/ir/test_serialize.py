"""Graphs come back from a file as they were; what is no graph is refused in one sentence."""

import contextlib
import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc.errors import ArtifactError, UnsupportedError
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.meaning import evaluate
from qc.ir.node import Origin, make
from qc.ir.plain import read_value, write_value
from qc.ir.serialize import graph_from_json, graph_to_json
from qc.ir.target import parse_machine
from qc.ir.types import ActivationFormat, TensorType, TupleType, symbol
from qc.ir.weights.dense import dense_term
from qc.ir.weights.grouped import GroupedFormat
from qc.ir.weights.weight import Weight
from qc.passes.pipeline import Context, Pipeline
from qc.passes.plan import plan
from qc.passes.plan.fuse import Fuse
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.quantize.tables import StoreTables
from tests.ir.test_ops import CASES, SIZES, Case, placed
from tests.ir.toys import block_graph, some_ids
from tests.passes.lift.drawing import BATCH, SEQ, graph, value

PASSES: dict[str, tuple[object, ...]] = {
    "float": (),
    "int3": (RoundToNearest(GroupedFormat(3, None, "zero")),),
    "w4": (
        StoreTables("bf16"),
        RoundToNearest(GroupedFormat(4, 32, "minimum")),
        QuantizeActivations(ActivationFormat(8, 32)),
    ),
}
GPU = parse_machine("cuda:sm_90")
PASSES["planned"] = (*PASSES["w4"], Fuse())
PASSES["planned for a GPU"] = (*PASSES["w4"], *plan(GPU).passes)


def run(before: Graph, *passes: object) -> Graph:
    return Pipeline(passes).run(before, Context(GPU))  # type: ignore[arg-type]


def through_text(content: Any) -> Any:
    """Go through what a file would hold."""
    return json.loads(json.dumps(content, allow_nan=False))


def reloaded(before: Graph) -> Graph:
    content, arrays = graph_to_json(before)
    return graph_from_json(through_text(content), arrays)


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_a_graph_comes_back_as_it_was(passes: tuple[object, ...]) -> None:
    toy, inputs = run(block_graph(), *passes), some_ids()
    loaded = reloaded(toy)
    assert loaded.same_as(toy)
    assert str(loaded) == str(toy)
    assert [n.origin for n in loaded.nodes] == [n.origin for n in toy.nodes]
    assert torch.equal(evaluate(loaded, inputs)["logits"], evaluate(toy, inputs)["logits"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_op_comes_back(case: Case) -> None:
    inputs = [make(ops.Input(f"x{i}", placed(v).tensor)) for i, v in enumerate(case.values)]
    before = Graph(tuple(inputs), (make(case.op, *inputs),), ("out",))
    loaded = reloaded(before)
    assert loaded.same_as(before)
    values = {f"x{i}": v for i, v in enumerate(case.values)}
    found, expected = (evaluate(g, values, SIZES)["out"] for g in (loaded, before))
    assert torch.equal(found, expected)


def test_uninterpreted_calls_come_back() -> None:
    x = value("x", BATCH, SEQ)
    types = TupleType((TensorType((BATCH, 3)), TensorType((BATCH, 3), torch.int64)))
    op = ops.Torch("aten.topk.default", (ops.Operand(0), 3), (("largest", False),), types)
    item = make(ops.Item(1), make(op, x, origin=Origin("model.router", ("aten",))))
    shape = (SEQ + 2 * BATCH, 2)
    kwargs = (("dtype", torch.float16), ("layout", torch.strided), ("pin_memory", None))
    zeros = make(
        ops.Torch("aten.zeros.default", (shape,), kwargs, TensorType(shape, torch.float16))
    )
    before = graph(item, zeros, x)
    loaded = reloaded(before)
    assert loaded.same_as(before)
    assert loaded.outputs[0].inputs[0].origin == Origin("model.router", ("aten",))
    found = evaluate(loaded, {"x": torch.randn(2, 5)})
    assert found["out1"].shape == (9, 2)


def test_a_sum_of_terms_comes_back() -> None:
    first = GroupedFormat(4, 16, "minimum").nearest(torch.randn(6, 33))
    rest = dense_term(0.01 * torch.randn(6, 33).half())
    weight = Weight("w", (6, 33), (first, rest))
    (loaded,) = reloaded(graph(make(ops.Parameter(weight)))).outputs
    assert isinstance(loaded.op, ops.Parameter)
    assert loaded.op.weight.format == weight.format
    assert torch.equal(loaded.op.weight.dense(), weight.dense())


def test_weights_of_one_name_are_kept_apart_and_one_weight_once() -> None:
    _, arrays = graph_to_json(run(block_graph(), *PASSES["w4"]))
    assert {"embed.weight.0.values", "embed.weight.0.codes"} <= arrays.keys()
    x, y = (Weight("w", (2,), (dense_term(torch.full((2,), v)),)) for v in (1.0, 2.0))
    nodes = [make(ops.Parameter(w)) for w in (x, y, x)]
    content, arrays = graph_to_json(graph(*nodes))
    assert set(arrays) == {"w.0.values", "w.0.values#2"}
    found = evaluate(graph_from_json(content, arrays), {})
    assert [float(found[f"out{i}"][0]) for i in range(3)] == [1.0, 2.0, 1.0]


def plain_values() -> st.SearchStrategy[Any]:
    """Whatever a field may hold."""
    leaves = st.one_of(
        st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False),
        st.text(max_size=9), st.sampled_from([torch.float16, torch.int8, torch.bool]),
        st.builds(lambda a, b: a * BATCH * SEQ + b * symbol("past"),
                  st.integers(1, 9), st.integers(1, 9)),
        st.builds(ops.Operand, st.integers(0, 9)),
        st.builds(ActivationFormat, st.integers(2, 8), st.none() | st.integers(1, 128)),
        st.builds(GroupedFormat, st.integers(2, 8), st.none() | st.integers(1, 128),
                  st.sampled_from(["symmetric", "zero", "minimum"])),
    )  # fmt: skip
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


@given(plain_values())
def test_values_come_back(content: Any) -> None:
    found = read_value(through_text(write_value(content)), "here")
    assert found == content
    assert type(found) is type(content)


@pytest.mark.parametrize("content", [object(), {1: 2}, sympy.sin(SEQ), torch.complex64, 1j])
def test_values_without_a_form_are_refused(content: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot be saved"):
        write_value(content)


def test_a_call_outside_aten_is_refused_when_saving_with_its_origin() -> None:
    call = ops.Torch("mine.call.default", (), (), TensorType(()))
    with pytest.raises(UnsupportedError, match=r"mine\.call.*at model\.experts"):
        graph_to_json(graph(make(call, origin=Origin("model.experts"))))


# ---------------------------------------------------------------- files that are no graphs


def small() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return a written linear: nodes are x, w, linear, reshape, call."""
    weight = Weight("w", (4, 33), (GroupedFormat(4, 16).nearest(torch.randn(4, 33)),))
    x = value("x", BATCH, 33)
    y = make(ops.Linear(), x, make(ops.Parameter(weight)), origin=Origin("model.head"))
    flat = make(ops.Reshape((4 * BATCH,)), y)
    call = ops.Torch("aten.relu.default", (ops.Operand(0),), (), TensorType((4 * BATCH,)))
    return graph_to_json(graph(make(call, flat)))


Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def op(content: dict[str, Any], number: int) -> dict[str, Any]:
    found: dict[str, Any] = content["nodes"][number]["op"]
    return found


def term(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = op(content, 1)["weight"]["terms"][0]
    return found


EDITS: dict[str, tuple[Edit, str]] = {
    "newer": (lambda c, a: c.update(version=2), "has version 2; this qc reads version 1"),
    "boolean version": (lambda c, a: c.update(version=True), "has version True"),
    "no version": (lambda c, a: c.pop("version"), "has no 'version'"),
    "more": (lambda c, a: c.update(extra=1), "unknown field 'extra'"),
    "no nodes": (lambda c, a: c.pop("nodes"), "has no 'nodes'"),
    "nodes": (lambda c, a: c.update(nodes={}), "the nodes of the graph is {}, not a list"),
    "node": (lambda c, a: c["nodes"].append(3), "node 5 of the graph is 3, not an object"),
    "op": (lambda c, a: op(c, 2).update({"is": "Liner"}), 'an unknown \'Liner\' .did you mean "Li'),
    "builtin": (lambda c, a: op(c, 2).update({"is": "__import__"}), "an unknown '__import__'"),
    "op is text": (lambda c, a: c["nodes"][2].update(op="Linear"), "not an object that says what"),
    "field": (lambda c, a: op(c, 3).update(shap=[1]), "Reshape has no field 'shap'"),
    "no field": (lambda c, a: op(c, 3).pop("shape"), "Reshape needs the field 'shape'"),
    "field type": (lambda c, a: op(c, 3).update(shape=7), "'shape' of Reshape cannot be 7"),
    "field item": (lambda c, a: op(c, 3).update(shape=["4"]), "'shape' of Reshape cannot be"),
    "boolean size": (lambda c, a: op(c, 3).update(shape=[True]), "cannot be"),
    "size text": (lambda c, a: op(c, 3).update(shape=[{"dim": "__import__('os')"}]),
                  "is not a size"),
    "size": (lambda c, a: op(c, 3).update(shape=[{"dim": "5*batch"}]), "has not as many elements"),
    "no value": (lambda c, a: op(c, 3).update(shape=[{"eval": "1"}]), "which is no value"),
    "deep": (lambda c, a: op(c, 3).update(shape=json.loads("[" * 40 + "]" * 40)),
             "nested too deeply"),
    "cycle": (lambda c, a: c["nodes"][2].update(inputs=[0, 3]), "node 3, which does not stand"),
    "itself": (lambda c, a: c["nodes"][2].update(inputs=[0, 2]), "does not stand before it"),
    "negative": (lambda c, a: c["nodes"][2].update(inputs=[-1, 1]), "names node -1"),
    "boolean input": (lambda c, a: c["nodes"][2].update(inputs=[False, True]), "names node False"),
    "operands": (lambda c, a: c["nodes"][2].update(inputs=[0]), r"does not fit.*model\.head"),
    "origin": (lambda c, a: c["nodes"][2].update(origin=[]), "has the origin"),
    "no outputs": (lambda c, a: c.update(outputs={}), "has no outputs"),
    "output": (lambda c, a: c.update(outputs={"out": 99}), "names node 99"),
    "inputs": (lambda c, a: c.update(inputs=[2]), "not one Input node each"),
    "unlisted": (lambda c, a: c.update(inputs=[]), "reads 'x', which is none of its inputs"),
    "twice": (lambda c, a: c.update(inputs=[0, 0]), "not one Input node each"),
    "format": (lambda c, a: term(c)["format"].update({"is": "Groped"}), "an unknown 'Groped'"),
    "bits": (lambda c, a: term(c)["format"].update(bits_per_code=9), "codes have 2 to 8 bits"),
    "offset": (lambda c, a: term(c)["format"].update(offset="mean"), "'offset' of GroupedFormat"),
    "no array": (lambda c, a: a.pop("w.0.scale"), "needs the array 'w.0.scale'"),
    "fewer arrays": (lambda c, a: term(c)["arrays"].pop("scale"), "stores codes, scale"),
    "dtype": (lambda c, a: a.update({"w.0.scale": a["w.0.scale"].float()}),
              "'scale' of int4·g16 is f32.4, 3., expected f16"),
    "shape": (lambda c, a: a.update({"w.0.codes": a["w.0.codes"][:, 1:]}), "'codes' of int4·g16"),
    "odd dtype": (lambda c, a: a.update({"w.0.codes": a["w.0.codes"].to(torch.uint16)}), "uint16"),
    "rows": (lambda c, a: op(c, 1)["weight"].update(shape=[5, 33]), "'codes' of int4·g16"),
    "huge": (lambda c, a: op(c, 1)["weight"].update(shape=[2**60, 33]), "has the shape"),
    "vector": (lambda c, a: op(c, 1)["weight"].update(shape=[33]), "weight 'w':"),
    "no terms": (lambda c, a: op(c, 1)["weight"].update(terms=[]), "has no terms"),
    "weight dtype": (lambda c, a: op(c, 1)["weight"].update(dtype="f32"), "has the dtype f32"),
    "namespace": (lambda c, a: op(c, 4).update(overload="prim.device.default"), "may not call"),
    "files": (lambda c, a: op(c, 4).update(overload="aten.from_file.default"), "may not call"),
    "no operator": (lambda c, a: op(c, 4).update(overload="aten.nothing.default"), "no operator"),
    "no overload": (lambda c, a: op(c, 4).update(overload="aten"), "no operator"),
    "dunder": (lambda c, a: op(c, 4).update(overload="aten.__class__.__call__"), "no operator"),
    "in place": (lambda c, a: op(c, 4).update(overload="aten.relu_.default"), "in place"),
    "arguments": (lambda c, a: op(c, 4).update(args=[1, 2, 3]), "does not take these arguments"),
    "operand": (lambda c, a: op(c, 4).update(args=[{"is": "Operand", "index": 1}]),
                "has 1 operands and uses others"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_a_wrong_file_is_refused_in_one_sentence(edit: Edit, message: str) -> None:
    content, arrays = small()
    content = copy.deepcopy(through_text(content))
    edit(content, arrays)
    with pytest.raises(ArtifactError, match=message) as caught:
        graph_from_json(content, arrays)
    assert "\n" not in str(caught.value)


def test_the_unedited_file_is_read() -> None:
    content, arrays = small()
    assert graph_from_json(through_text(content), arrays).output_names == ("out0",)


def test_a_wrong_body_is_refused() -> None:
    content, arrays = graph_to_json(run(block_graph(), *PASSES["planned"]))
    content = through_text(content)
    fused = next(n for n in content["nodes"] if n["op"]["is"] == "Fused")
    fused["op"]["body"]["nodes"][-1]["inputs"] = [77]
    with pytest.raises(ArtifactError, match=r"of the body of node \d+ of the graph names node 77"):
        graph_from_json(content, arrays)


REPLACEMENTS: list[Any] = [
    None, True, -1, 0, 7, 2**70, 1.5, "x", [], {}, [[]],
    {"is": "Add"}, {"is": "Size"}, {"dim": "x+"}, {"dtype": "f32"},
]  # fmt: skip


@given(st.data())
def test_damaged_files_never_crash(data: st.DataObject) -> None:
    """Whatever one value of the file is replaced by, the answer is a graph or an ArtifactError."""
    content, arrays = small()
    content = through_text(content)
    path = data.draw(st.sampled_from(list(places(content))))
    new = data.draw(st.sampled_from(REPLACEMENTS))
    holder = content
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = new
    with contextlib.suppress(ArtifactError):
        graph_from_json(content, arrays)


def places(content: Any) -> Any:
    """Yield the path of every value in nested JSON."""
    children = content.items() if isinstance(content, dict) else enumerate(content)
    for key, child in children:
        yield (key,)
        if isinstance(child, dict | list):
            yield from ((key, *rest) for rest in places(child))
