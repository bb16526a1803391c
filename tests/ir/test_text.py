"""The printed form, which golden files and error messages are made of."""

from collections.abc import Callable

from qc.ir.node import Origin, make
from qc.ir.ops import Linear, Torch
from qc.ir.target import Target
from qc.ir.text import excerpt
from qc.ir.types import ActivationFormat, TensorType
from qc.ir.weights.grouped import GroupedFormat
from qc.passes.pipeline import Context, Pipeline
from qc.passes.plan.fuse import Fuse
from qc.passes.quantize.activations import QuantizeActivations
from qc.passes.quantize.round_to_nearest import RoundToNearest
from qc.passes.quantize.tables import StoreTables
from tests.ir.toys import block_graph
from tests.passes.lift.drawing import graph, mul, value

RECIPE = Pipeline(
    [
        StoreTables("f16"),
        RoundToNearest(GroupedFormat(4, 32, "minimum")),
        QuantizeActivations(ActivationFormat(8, 32)),
    ]
)


def test_each_stage_of_a_block(golden: Callable[[str, str], None]) -> None:
    context = Context(Target("any", "any"))
    canonical = block_graph()
    quantized = RECIPE.run(canonical, context)
    planned = Pipeline([Fuse()]).run(quantized, context)
    golden("ir/block_canonical.txt", f"{canonical}\n")
    golden("ir/block_quantized.txt", f"{quantized}\n")
    golden("ir/block_planned.txt", f"{planned}\n")


def test_scalars_print_in_place_and_calls_by_name() -> None:
    x = value("x", 2)
    call = make(Torch("aten.erfinv.default", (), (), TensorType((2,))), mul(x, 2.0))
    lines = str(graph(call)).splitlines()
    assert lines[1].startswith("%1 = mul(%0, 2.0)")
    assert lines[2].startswith("%2 = torch(%1, aten.erfinv.default)")
    assert lines[-1] == "return out0=%2"


def test_an_excerpt_points_at_the_node() -> None:
    x = value("x", 2, 3)
    node = make(Linear(), x, value("w", 4, 3), origin=Origin("model.head"))
    text = excerpt(graph(mul(node, 2.0)), node).splitlines()
    at = next(i for i, line in enumerate(text) if "model.head" in line)
    assert text[at].startswith("%2 = linear")
    assert text[at + 1] == "^" * len("%2 = linear(%1, %0)")
