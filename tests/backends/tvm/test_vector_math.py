"""Every element-wise op of the IR, in vectors and in scalars, against its torch meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from qc.backends.tvm.vector_math import TVM_NAMES, convert, render
from qc.ir.op import Op
from qc.ir.ops import BINARY, COMPARISONS, GATES, UNARY, Binary, Cast, GatedActivation, Unary, Where

LANES = 8


def apply_function(op: Op, dtypes: tuple[torch.dtype, ...], result: torch.dtype, lanes: int) -> Any:
    """Build a function that applies `op` to arrays whose size `lanes` divides."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        size = T.arg("n", T.int64())
        arrays = [T.arg(f"x{i}", T.buffer((size,), TVM_NAMES[d])) for i, d in enumerate(dtypes)]
        out = T.arg("y", T.buffer((size,), TVM_NAMES[result]))
        with T.serial(0, size // lanes) as i:
            at = i if lanes == 1 else T.ramp(i * lanes, 1, lanes)
            value = render(op, [array[at] for array in arrays], lanes)
            T.buffer_store(out, convert(value, TVM_NAMES[result]), [at])
    return builder.get()


def compiled(functions: dict[str, Any], cpu: str = "x86-64-v3") -> Any:
    """Compile many functions at once."""
    module = tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in functions.items()})
    return tvm.compile(module, target=tvm.target.Target({"kind": "llvm", "mcpu": cpu}))


def meaning(op: Op, *values: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = op.meaning(*values, sizes={})
    return result


F32, F16, I64, BOOL = torch.float32, torch.float16, torch.int64, torch.bool
SPECIAL = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-30, 88.7])
ORDINARY = torch.cat([torch.linspace(-110, 100, 4096), torch.linspace(-4, 4, 4096)])
POSITIVE_ONLY = ("sqrt", "rsqrt", "log")


@pytest.fixture(scope="module")
def unary_functions() -> Any:
    return compiled({
        f"{kind}_{TVM_NAMES[dtype]}_{lanes}": apply_function(Unary(kind), (dtype,), dtype, lanes)
        for kind in UNARY if kind != "not" for dtype in (F32, F16) for lanes in (1, LANES)
    })  # fmt: skip


@pytest.mark.parametrize("lanes", [1, LANES])
@pytest.mark.parametrize("kind", [k for k in UNARY if k != "not"])
def test_function_of_one_value(unary_functions: Any, kind: str, lanes: int) -> None:
    x = torch.cat([SPECIAL, ORDINARY])
    if kind in ("sin", "cos"):
        x = torch.cat([x, torch.linspace(-1e5, 1e5, 4096)])
    if kind in POSITIVE_ONLY:
        x = x.abs()
    if kind == "gelu":  # torch's own depends on the machine there: inf, or nan on AVX-512
        x = x.where(~x.isinf(), 0.0)
    for dtype, tolerance in ((F32, 1e-6), (F16, 2e-3)):
        values = x.to(dtype)
        y = torch.empty_like(values)
        unary_functions[f"{kind}_{TVM_NAMES[dtype]}_{lanes}"](len(x), values, y)
        expected = UNARY[kind](values)
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, F16, I64, BOOL])
def test_functions_of_two_values(dtype: torch.dtype) -> None:
    numbers = torch.randint(-4, 5, (64,)) if dtype == I64 else torch.randn(64)
    a = (numbers > 0) if dtype == BOOL else numbers.to(dtype)
    b = a.roll(1)
    b = b if dtype == BOOL else torch.where(b == 0, torch.ones_like(b), b)
    kinds = [k for k in BINARY if k != "pow" and (dtype != BOOL or k not in ("sub", "floordiv"))]
    results = {k: meaning(Binary(k), a, b) for k in kinds}
    module = compiled({k: apply_function(Binary(k), (dtype, dtype), r.dtype, 1)
                       for k, r in results.items()})  # fmt: skip
    for kind, expected in results.items():
        y = torch.empty_like(expected)
        module[kind](64, a, b, y)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_powers() -> None:
    a, b = torch.rand(64) * 4, torch.randn(64)
    module = compiled({"pow": apply_function(Binary("pow"), (F32, F32), F32, LANES)})
    y = torch.empty_like(a)
    module["pow"](64, a, b, y)
    torch.testing.assert_close(y, a**b, rtol=1e-6, atol=0)


def test_choices_casts_and_gates() -> None:
    x, z, condition = torch.randn(64) * 3, torch.randn(64), torch.randn(64) > 0
    integers, halves = torch.randint(-9, 9, (64,)), torch.randn(64).half()
    cases: list[tuple[Op, tuple[torch.Tensor, ...], int]] = [
        (Where(), (condition, x, z), 1), (Where(), (condition, integers, x), 1),
        (Cast(I64), (x,), 1), (Cast(F16), (x,), LANES), (Cast(F32), (halves,), LANES),
        (Cast(BOOL), (integers,), 1), (Cast(F32), (condition,), 1), (Unary("not"), (x,), 1),
        (Unary("neg"), (integers,), 1), (Cast(torch.bfloat16), (x,), 1),
        *((GatedActivation(kind), (x, z), LANES) for kind in GATES),
        *((Binary(kind), (x, z), LANES) for kind in BINARY if kind not in ("pow", "and", "or",
                                                                           *COMPARISONS)),
    ]  # fmt: skip
    expected = [meaning(op, *values) for op, values, _ in cases]
    module = compiled({
        f"f{i}": apply_function(op, tuple(v.dtype for v in values), r.dtype, lanes)
        for i, ((op, values, lanes), r) in enumerate(zip(cases, expected, strict=True))
    })  # fmt: skip
    for i, ((_, values, _), reference) in enumerate(zip(cases, expected, strict=True)):
        y = torch.empty_like(reference)
        module[f"f{i}"](64, *values, y)
        torch.testing.assert_close(y, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("cpu", "lanes"), [("x86-64-v2", 4), ("x86-64-v4", 16)])
def test_other_vector_widths_compile(cpu: str, lanes: int) -> None:
    kinds = [kind for kind in UNARY if kind != "not"]
    compiled({kind: apply_function(Unary(kind), (F32,), F32, lanes) for kind in kinds}, cpu)
