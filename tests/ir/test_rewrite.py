"""Rewriting by rules, and substitution that keeps shared values shared."""

import pytest

from qc.errors import VerificationError
from qc.ir import ops
from qc.ir.node import Node, Origin, make
from qc.ir.rewrite import rewrite, substitute
from tests.passes.lift.drawing import add, graph, mul, unary, value


def double_negation(node: Node) -> Node | None:
    """neg(neg(x)) --> x"""
    if node.op == ops.Unary("neg") and node.inputs[0].op == ops.Unary("neg"):
        return node.inputs[0].inputs[0]
    return None


def test_rules_run_to_a_fixed_point() -> None:
    node = x = value("x", 2)
    for _ in range(7):
        node = unary("neg", node)
    assert rewrite(graph(node), [double_negation]).same_as(graph(unary("neg", x)))


def test_nothing_changes_without_a_match() -> None:
    before = graph(unary("exp", value("x", 2)))
    assert rewrite(before, [double_negation]).nodes == before.nodes


def test_the_first_rule_wins() -> None:
    x = value("x", 2)

    def to(kind: str):  # type: ignore[no-untyped-def]
        is_exp = ops.Unary("exp")
        return lambda node: unary(kind, node.inputs[0]) if node.op == is_exp else None

    after = rewrite(graph(unary("exp", x)), [to("sin"), to("cos")])
    assert after.same_as(graph(unary("sin", x)))


def test_shared_values_stay_shared() -> None:
    x = value("x", 2)
    shared = unary("neg", unary("neg", unary("exp", x)))
    after = rewrite(graph(add(shared, shared)), [double_negation])
    assert after.same_as(graph(add(e := unary("exp", x), e)))
    assert len(after.nodes) == 3


def test_a_rule_that_never_ends_is_named() -> None:
    def swap(node: Node) -> Node | None:
        kinds = {ops.Unary("sin"): "cos", ops.Unary("cos"): "sin"}
        return unary(kinds[node.op], node.inputs[0]) if node.op in kinds else None  # type: ignore[index]

    with pytest.raises(VerificationError, match="swapping reached no fixed point in 5 rounds"):
        rewrite(graph(unary("sin", value("x", 2))), [swap], "swapping", rounds=5)


def test_a_replacement_of_another_type_is_refused_with_its_origin() -> None:
    x = value("x", 2)
    node = make(ops.Unary("exp"), x, origin=Origin("model.layers.3"))

    def drop(node: Node) -> Node | None:
        return value("y", 3) if node.op == ops.Unary("exp") else None

    with pytest.raises(VerificationError, match=r"exp : f32\[2\] by .*model\.layers\.3"):
        rewrite(graph(node), [drop], "dropping")


def test_replacements_note_the_pass() -> None:
    x = value("x", 2)
    inner = make(ops.Unary("exp"), x, origin=Origin("model.act"))

    def to_sin(node: Node) -> Node | None:
        return unary("sin", node.inputs[0]) if node.op == ops.Unary("exp") else None

    (after,) = rewrite(graph(inner), [to_sin], "turn").outputs
    assert after.origin == Origin("model.act", ("turn",))


def test_a_substitute_may_read_what_it_replaces() -> None:
    x = value("x", 2)
    e = unary("exp", x)
    after = substitute(graph(unary("sin", e)), {e: unary("neg", e)})
    assert after.same_as(graph(unary("sin", unary("neg", unary("exp", x)))))


def test_substitutes_share_new_nodes() -> None:
    x = value("x", 2)
    a, b = unary("exp", x), unary("sin", x)
    new = unary("tanh", x)
    after = substitute(graph(add(a, b)), {a: unary("neg", new), b: unary("abs", new)})
    t = unary("tanh", x)
    assert after.same_as(graph(add(unary("neg", t), unary("abs", t))))
    assert len(after.nodes) == 5


def test_substitutes_follow_each_other() -> None:
    x = value("x", 2)
    a = unary("exp", x)
    b = mul(a, a)
    after = substitute(graph(b), {a: unary("sin", x), b: add(a, a)})
    s = unary("sin", x)
    assert after.same_as(graph(add(s, s)))


def test_an_output_can_be_replaced() -> None:
    x = value("x", 2)
    e = unary("exp", x)
    assert substitute(graph(e), {e: unary("sin", x)}).same_as(graph(unary("sin", x)))
