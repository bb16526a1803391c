"""The decode language: building, folding, evaluating."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc.ir.weights.expression import (
    COL,
    ROW,
    Const,
    Expr,
    Load,
    ToFloat,
    TorchRendering,
    arith,
    minimum,
    rename_arrays,
    walk,
)

PYTHON = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "and": lambda a, b: a & b,
    "or": lambda a, b: a | b, "shr": lambda a, b: a >> b, "shl": lambda a, b: a << b, "min": min,
    "eq": lambda a, b: int(a == b), "lt": lambda a, b: int(a < b),
}  # fmt: skip


def value_at(expr: Expr, row: int, col: int, **arrays: torch.Tensor) -> float:
    rendering = TorchRendering(
        arrays, {"row": torch.tensor([[row]]).int(), "col": torch.tensor([[col]]).int()}
    )
    return float(rendering.value(expr).reshape(-1)[0])


@pytest.mark.parametrize("kind", PYTHON)
@given(a=st.integers(0, 500), b=st.integers(1, 8))
def test_integers_fold_and_evaluate_as_in_python(kind: str, a: int, b: int) -> None:
    expected = PYTHON[kind](a, b)
    assert arith(kind, a, b) == Const(expected)
    assert value_at(arith(kind, ROW, COL), a, b) == expected


def test_operators_build_what_they_say() -> None:
    assert str(((ROW * 3 + COL) >> 2) & 15) == "((((row * 3) + col) >> 2) & 15)"
    assert str(minimum(COL % 4, 2)) == "((col % 4) min 2)"
    assert (ROW // 1) is ROW
    assert str(ToFloat(Load("codes", (ROW, COL))) * Load("scale", (ROW,))) == (
        "(float(codes[row, col]) * scale[row])"
    )


def test_an_integer_and_a_float_are_two_constants() -> None:
    assert Const(1) != Const(1.0)
    assert hash(Const(2)) == hash(Const(2))
    assert arith("add", 2, 0.5) == arith("add", Const(2), Const(0.5))
    rendering = TorchRendering({}, {})
    assert rendering.value(Const(1)).dtype == torch.int32
    assert rendering.value(Const(1.0)).dtype == torch.float32


def test_equal_expressions_are_one_key_and_know_what_they_read() -> None:
    first, second = (Load("a", (ROW, COL // 2 + 1)) for _ in range(2))
    assert first == second
    assert len({first, second, Load("a", (ROW, COL // 2 + 2)), Load("b", first.index)}) == 3
    assert first.indices == {ROW, COL}
    assert first.operands == first.index
    assert first.reads
    assert not first.counts
    assert (COL // 2 + 1).counts
    assert not (COL * Const(1.0)).counts


def test_a_deep_expression_needs_no_deep_stack() -> None:
    deep: Expr = ROW
    for number in range(5000):
        deep = deep * 3 + (number + 1)
    assert len({deep}) == 1
    assert deep.indices == {ROW}
    assert deep.counts
    assert len(walk(deep)) == 3 * 5000 + 1


def test_loads_widen() -> None:
    arrays = {"codes": torch.tensor([[200]], dtype=torch.uint8), "scale": torch.ones(1, 1).half()}
    rendering = TorchRendering(
        arrays, {"row": torch.zeros(1, 1).int(), "col": torch.zeros(1, 1).int()}
    )
    assert rendering.value(Load("codes", (ROW, COL)) << 8).dtype == torch.int32
    assert int(rendering.value(Load("codes", (ROW, COL)) << 8)) == 51200
    assert rendering.value(Load("scale", (ROW, COL))).dtype == torch.float32


def test_renaming_touches_arrays_only() -> None:
    expr = ToFloat(Load("a", (ROW, Load("b", (COL,))))) * Const(2.0)
    renamed = rename_arrays(expr, "0.")
    assert str(renamed) == "(float(0.a[row, 0.b[col]]) * 2.0)"
    assert len(walk(renamed)) == len(walk(expr)) == 7


def test_anything_else_is_no_expression() -> None:
    with pytest.raises(TypeError, match="is no expression"):
        value_at(Expr(), 0, 0)
