"""Pipelines run passes in order, check what they promise, and can be edited."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from qc.errors import StageError, VerificationError
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import rewrite
from qc.ir.target import Target
from qc.passes.pipeline import Context, Pass, Pipeline, Step
from qc.passes.stage import CANONICAL, Stage
from tests.passes.lift.drawing import graph, unary, value


@dataclass(frozen=True)
class Turn(Pass):
    """exp(x) --> kind(x)"""

    name: ClassVar[str] = "turn"
    exact: ClassVar[bool] = False
    kind: str = "sin"

    def run(self, before: Graph, context: Context) -> Graph:
        def rule(node: Node) -> Node | None:
            return unary(self.kind, node.inputs[0]) if node.op == ops.Unary("exp") else None

        return rewrite(before, [rule])


@dataclass(frozen=True)
class Claim(Turn):
    """The same, said to be exact."""

    name: ClassVar[str] = "claim"
    exact: ClassVar[bool] = True


@dataclass(frozen=True)
class Keep(Pass):
    """x --> x"""

    name: ClassVar[str] = "keep"

    def run(self, before: Graph, context: Context) -> Graph:
        return before


def context() -> Context:
    return Context(Target("any", "any"))


BEFORE = graph(unary("exp", value("x", 3)))


def test_passes_run_in_order_and_are_logged() -> None:
    here = context()
    after = Pipeline([Keep(), Turn("sin"), Turn("cos")]).run(BEFORE, here)
    assert after.same_as(graph(unary("sin", value("x", 3))))
    assert [(s.name, s.changed > 0) for s in here.log] == [
        ("keep", False), ("turn", True), ("turn", False),
    ]  # fmt: skip


def test_the_log_prints_names_times_and_changes() -> None:
    assert str(Step("fuse", 0.5, 12)).split() == ["0.50", "s", "fuse", "12", "nodes", "changed"]
    assert str(Step("keep", 0.0, 0)).endswith("(unchanged)")


def test_progress_is_reported() -> None:
    seen: list[tuple[str, float]] = []
    told = Context(Target("any", "any"), lambda step, fraction: seen.append((step, fraction)))
    Pipeline([Keep(), Turn()]).run(BEFORE, told)
    assert seen == [("keep", 0.0), ("turn", 0.5), ("", 1.0)]


def test_a_pass_prints_its_configuration() -> None:
    assert repr(Turn("cos")) == "Turn(kind='cos')"
    assert Turn("cos") == Turn("cos") != Turn("sin")


def test_pipelines_are_extended_and_edited() -> None:
    pipeline = Pipeline([Keep(), Turn()], verify=True, tolerance=1e-3)
    longer = (pipeline + (Turn("cos"),)) + Pipeline([Keep()])  # noqa: RUF005  # no list
    assert longer.passes == (Keep(), Turn(), Turn("cos"), Keep())
    assert (longer.verify, longer.tolerance) == (True, 1e-3)
    assert longer.replace(Turn, Keep()).passes == (Keep(),) * 4
    assert pipeline.passes == (Keep(), Turn())


def test_a_false_claim_of_exactness_is_found() -> None:
    with pytest.raises(VerificationError, match=r"Claim\(kind='sin'\) says that it is exact"):
        Pipeline([Claim()], verify=True).run(BEFORE, context())
    Pipeline([Claim()]).run(BEFORE, context())
    Pipeline([Turn()], verify=True).run(BEFORE, context())


def test_not_a_number_is_not_exact() -> None:
    negative = graph(unary("exp", unary("neg", unary("abs", value("x", 3)))))
    with pytest.raises(VerificationError, match="inf"):
        Pipeline([Claim("log")], verify=True).run(negative, context())


def test_a_dropped_output_is_not_exact() -> None:
    @dataclass(frozen=True)
    class Drop(Keep):
        def run(self, before: Graph, context: Context) -> Graph:
            return Graph(before.inputs, (unary("sin", before.inputs[0]),), ("other",))

    with pytest.raises(VerificationError, match="Drop"):
        Pipeline([Drop()], verify=True).run(BEFORE, context())


def test_stages_are_checked_on_both_sides() -> None:
    @dataclass(frozen=True)
    class Needs(Keep):
        requires: ClassVar[Stage] = CANONICAL

    @dataclass(frozen=True)
    class Ensures(Keep):
        ensures: ClassVar[Stage] = CANONICAL

    x = value("x", 2, 3)
    computed = graph(make(ops.Linear(), x, unary("exp", value("w", 4, 3))))
    for one in (Needs(), Ensures()):
        with pytest.raises(StageError, match="not a canonical graph"):
            Pipeline([one]).run(computed, context())
