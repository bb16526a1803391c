"""Element-wise ops as TVM expressions, for vectors of any width and for scalars.

TVM turns exp of a vector into one libm call a lane; here exp, tanh, erf, sin and cos are
polynomials after range reduction, good to a few units in the last place of float32. log and pow
stay libm calls, for they are rare. Half-precision values are computed in float32 and rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from tvm import tirx
from tvm.ir import TensorLoad
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from qc.ir.op import Op
from qc.ir.ops import BINARY, COMPARISONS, Binary, Cast, GatedActivation, Unary, Where

PrimExpr = Any
"""A TVM expression: TVM ships without type information."""

TVM_NAMES = {
    torch.float64: "float64", torch.float32: "float32", torch.float16: "float16",
    torch.bfloat16: "bfloat16", torch.int64: "int64", torch.int32: "int32", torch.int16: "int16",
    torch.int8: "int8", torch.uint8: "uint8", torch.bool: "bool",
}  # fmt: skip
"""The element type of a dtype, as TVM calls it."""

RANKS = ("bool", "uint8", "int8", "int16", "int32", "int64", "bfloat16", "float16", "float32",
         "float64")  # fmt: skip
"""Element types from the narrowest to the widest."""

branch_depth: ContextVar[int] = ContextVar("branch_depth", default=0)


def element_type(value: PrimExpr) -> str:
    """Return "float32" for a float32 vector or scalar."""
    return str(value.ty).rpartition("x")[0] if "x" in str(value.ty) else str(value.ty)


def lanes_of(value: PrimExpr) -> int:
    """Return the number of lanes, 1 for a scalar."""
    return int(str(value.ty).rpartition("x")[2]) if "x" in str(value.ty) else 1


def vector_type(element: str, lanes: int) -> str:
    """Name the type of `lanes` elements."""
    return element if lanes == 1 else f"{element}x{lanes}"


def constant(value: float | int | bool, like: PrimExpr) -> PrimExpr:
    """Return `value` in the type of `like`."""
    return tirx.const(value, str(like.ty))


def convert(value: PrimExpr, element: str) -> PrimExpr:
    """Cast to another element type as torch does: to bool by comparison with zero."""
    present = element_type(value)
    if present == element:
        return value
    if element == "bool":
        return tirx.NE(value, constant(0, value))
    return tirx.Cast(vector_type(element, lanes_of(value)), value)


def spread(value: PrimExpr, lanes: int) -> PrimExpr:
    """Repeat a scalar in all lanes; a vector stays as it is."""
    return value if lanes_of(value) == lanes else tirx.Broadcast(value, lanes)


def bind(value: PrimExpr) -> PrimExpr:
    """Compute `value` once, by a statement before the one that is being written.

    Floating-point values and vectors pass through memory that LLVM turns into registers: TVM's
    simplifier puts the definition of a bound variable wherever it is used, so that compile time
    doubles with every step of a chain.
    """
    element, lanes = element_type(value), lanes_of(value)
    if isinstance(value, tirx.Var):
        return value
    if element in ("bool", "int64") or isinstance(value, TensorLoad):
        return T.Bind(value)
    cell = T.alloc_buffer((lanes,), element)
    first = tirx.const(0, "int64")
    at = first if lanes == 1 else T.ramp(first, tirx.const(1, "int64"), lanes)
    T.buffer_store(cell, value, [at])
    return T.Bind(cell[at])


def let(value: PrimExpr, body: Callable[[PrimExpr], PrimExpr]) -> PrimExpr:
    """Compute `value` once, whatever number of times `body` mentions it: by `bind` where a
    function is being written, by an expression elsewhere and inside branches."""
    if isinstance(value, tirx.Var | tirx.IntImm | tirx.FloatImm):
        return body(value)
    if IRBuilder.is_in_scope() and not branch_depth.get():
        return body(bind(value))
    variable = tirx.Var("t", str(value.ty))
    return tirx.Let(variable, value, body(variable))


@contextmanager
def inside_branch() -> Iterator[None]:
    """Write expressions that may be evaluated only under a condition, such as guarded loads."""
    token = branch_depth.set(branch_depth.get() + 1)
    try:
        yield
    finally:
        branch_depth.reset(token)


def polynomial(x: PrimExpr, coefficients: Sequence[float]) -> PrimExpr:
    """Evaluate by Horner's rule, highest power first."""
    total = constant(coefficients[0], x)
    for coefficient in coefficients[1:]:
        total = total * x + constant(coefficient, x)
    return total


def clamp(x: PrimExpr, low: float, high: float) -> PrimExpr:
    """Limit to [low, high]; NaN passes."""
    limited = tirx.Select(x > constant(high, x), constant(high, x), x)
    return let(limited, lambda y: tirx.Select(y < constant(low, y), constant(low, y), y))


def power_of_two(exponent: PrimExpr) -> PrimExpr:
    """Return 2^exponent for int32 exponents of normal float32 numbers."""
    bits = (exponent + constant(127, exponent)) << constant(23, exponent)
    return tirx.reinterpret(vector_type("float32", lanes_of(exponent)), bits)


# The reduction and the coefficients are those of Cephes' expf (S. Moshier), on |r| <= ln(2) / 2.
LOG2_E = 1.44269504088896341
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)


def exp_mantissa(x: PrimExpr, n: PrimExpr) -> PrimExpr:
    """Return exp(x) / 2^n where n is the integer nearest x / ln 2."""
    reduced = x - n * constant(LN2_HIGH, x) - n * constant(LN2_LOW, x)
    return let(reduced, lambda r: polynomial(r, EXP) * (r * r) + r + constant(1.0, r))


def exp(x: PrimExpr) -> PrimExpr:
    """exp over the whole float32 range, denormal results and infinity included."""

    def scaled(y: PrimExpr, n: PrimExpr) -> PrimExpr:
        # 2^n in two factors: one factor alone overflows before the result does.
        exponent = convert(n, "int32")
        half = let(exponent, lambda e: e >> constant(1, e))
        return let(half, lambda h: exp_mantissa(y, n) * power_of_two(h)
                   * power_of_two(exponent - h))  # fmt: skip

    return let(clamp(x, -104.0, 89.0), lambda y: let(
        tirx.nearbyint(y * constant(LOG2_E, y)), lambda n: scaled(y, n)))  # fmt: skip


def exp_of_nonpositive(x: PrimExpr) -> PrimExpr:
    """exp for x <= 0, cheaper: results below 2e-38 become 1e-38. For softmax."""
    limited = tirx.max(x, constant(-87.0, x))
    return let(limited, lambda y: let(
        tirx.nearbyint(y * constant(LOG2_E, y)),
        lambda n: exp_mantissa(y, n) * power_of_two(convert(n, "int32"))))  # fmt: skip


def sigmoid(x: PrimExpr) -> PrimExpr:
    """1 / (1 + exp(-x))."""
    return constant(1.0, x) / (constant(1.0, x) + exp(-x))


# Rational approximations of Eigen (MathFunctionsImpl.h): odd numerator, even denominator.
TANH_TOP = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11,
            5.12229709037114e-08, 1.48572235717979e-05, 6.37261928875436e-04,
            4.89352455891786e-03)  # fmt: skip
TANH_BOTTOM = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03,
               4.89352518554385e-03)  # fmt: skip
ERF_TOP = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06,
           -5.69250639462346e-05, -7.34990630326855e-04, -2.95459980854025e-03,
           -1.60960333262415e-02)  # fmt: skip
ERF_BOTTOM = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03,
              -7.37332916720468e-03, -1.42647390514189e-02)  # fmt: skip


def odd_rational(
    x: PrimExpr, limit: float, top: Sequence[float], bottom: Sequence[float]
) -> PrimExpr:
    """x top(x^2) / bottom(x^2), with x limited to where the function has saturated."""
    return let(clamp(x, -limit, limit), lambda y: let(
        y * y, lambda s: y * polynomial(s, top) / polynomial(s, bottom)))  # fmt: skip


def tanh(x: PrimExpr) -> PrimExpr:
    """Hyperbolic tangent; beyond 7.9 it is 1 in float32."""
    return odd_rational(x, 7.90531110763549805, TANH_TOP, TANH_BOTTOM)


def erf(x: PrimExpr) -> PrimExpr:
    """Error function; beyond 4 it is 1 in float32."""
    return odd_rational(x, 4.0, ERF_TOP, ERF_BOTTOM)


def gelu(x: PrimExpr) -> PrimExpr:
    """x / 2 (1 + erf(x / sqrt 2))."""
    return constant(0.5, x) * x * (constant(1.0, x) + erf(x * constant(0.70710678118654752, x)))


def gelu_tanh(x: PrimExpr) -> PrimExpr:
    """x / 2 (1 + tanh u) = x sigmoid(2u), which loses no digits for negative x."""
    twice = constant(1.5957691216057308, x) * (x + constant(0.044715, x) * x * x * x)
    return x * sigmoid(twice)


# Cephes' sinf and cosf, on |r| <= pi / 4.
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def quarter_turns(x: PrimExpr, ahead: int) -> PrimExpr:
    """sin(x + ahead pi / 2). The argument is reduced in float64: the error is below 1e-8 for
    |x| < 1e8, where float32 itself no longer resolves a period."""
    wide = convert(x, "float64")

    def turned(r: PrimExpr, quadrant: PrimExpr) -> PrimExpr:
        square = r * r
        sine = polynomial(square, SIN) * square * r + r
        cosine = (polynomial(square, COS) * square * square
                  - constant(0.5, r) * square + constant(1.0, r))  # fmt: skip
        value = tirx.Select(
            tirx.EQ(quadrant & constant(1, quadrant), constant(0, quadrant)), sine, cosine
        )

        positive = tirx.EQ(quadrant & constant(2, quadrant), constant(0, quadrant))
        return let(value, lambda v: tirx.Select(positive, v, -v))

    def reduced(n: PrimExpr) -> PrimExpr:
        remainder = convert(wide - n * constant(1.57079632679489662, n), "float32")
        quadrant = convert(n, "int32") + tirx.const(ahead, vector_type("int32", lanes_of(n)))
        return let(remainder, lambda r: let(quadrant, lambda q: turned(r, q)))

    return let(tirx.nearbyint(wide * constant(0.63661977236758134, wide)), reduced)


def maximum(a: PrimExpr, b: PrimExpr) -> PrimExpr:
    """The larger value, NaN where either is."""
    return tirx.Select(tirx.NE(a, a), a, tirx.Select(a > b, a, b))


def minimum(a: PrimExpr, b: PrimExpr) -> PrimExpr:
    """The smaller value, NaN where either is."""
    return tirx.Select(tirx.NE(a, a), a, tirx.Select(a < b, a, b))


def relu(x: PrimExpr) -> PrimExpr:
    """max(x, 0)."""
    return tirx.Select(x < constant(0, x), constant(0, x), x)


FLOAT_FUNCTIONS: dict[str, Callable[[PrimExpr], PrimExpr]] = {
    "reciprocal": lambda x: constant(1.0, x) / x,
    "sqrt": tirx.sqrt,
    "rsqrt": lambda x: constant(1.0, x) / tirx.sqrt(x),
    "exp": exp,
    "log": tirx.log,
    "sin": lambda x: quarter_turns(x, 0),
    "cos": lambda x: quarter_turns(x, 1),
    "tanh": tanh,
    "sigmoid": sigmoid,
    "erf": erf,
    "floor": tirx.floor,
    "silu": lambda x: x * sigmoid(x),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
"""Functions of a float32 value."""

SIGN_FUNCTIONS: dict[str, Callable[[PrimExpr], PrimExpr]] = {
    "abs": tirx.abs, "neg": lambda x: -x, "relu": relu,
}  # fmt: skip
"""Functions that integers have too."""

DOUBLE_FUNCTIONS: dict[str, Callable[[PrimExpr], PrimExpr]] = {
    "exp": tirx.exp, "sin": tirx.sin, "cos": tirx.cos, "tanh": tirx.tanh, "erf": tirx.erf,
    "sigmoid": lambda x: constant(1.0, x) / (constant(1.0, x) + tirx.exp(-x)),
    "silu": lambda x: x / (constant(1.0, x) + tirx.exp(-x)),
}  # fmt: skip
"""What float64 takes from libm instead."""


def unary(kind: str, x: PrimExpr) -> PrimExpr:
    """Apply a function of one value in the value's own type."""
    element = element_type(x)
    if kind == "not":
        return tirx.Not(convert(x, "bool"))
    if kind in SIGN_FUNCTIONS and element not in ("float16", "bfloat16"):
        return let(x, SIGN_FUNCTIONS[kind])
    if element == "float64":
        return let(x, DOUBLE_FUNCTIONS.get(kind) or FLOAT_FUNCTIONS[kind])
    result = element if element in ("float16", "bfloat16") else "float32"
    function = SIGN_FUNCTIONS.get(kind) or FLOAT_FUNCTIONS[kind]
    return convert(let(convert(x, "float32"), function), result)


def power(a: PrimExpr, b: PrimExpr) -> PrimExpr:
    """a^b: small constant powers as products, everything else by libm."""
    exponent = b.value if isinstance(b, tirx.Broadcast) else b
    known = float(exponent.value) if isinstance(exponent, tirx.FloatImm | tirx.IntImm) else None
    if known == 2.0:
        return let(a, lambda x: x * x)
    if known == 3.0:
        return let(a, lambda x: x * x * x)
    if known == 0.5:
        return tirx.sqrt(a)
    if element_type(a) in ("float32", "float64"):
        return tirx.pow(a, b)
    return convert(tirx.pow(convert(a, "float64"), convert(b, "float64")), element_type(a))


def floor_divide(a: PrimExpr, b: PrimExpr) -> PrimExpr:
    """Divide and round down."""
    return tirx.floor(a / b) if element_type(a).startswith("float") else tirx.floordiv(a, b)


ARITHMETIC: dict[str, Callable[[PrimExpr, PrimExpr], PrimExpr]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b, "floordiv": floor_divide, "pow": power,
    "min": minimum, "max": maximum,
    "eq": tirx.EQ, "ne": tirx.NE, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


LOGIC = {"add": "or", "max": "or", "mul": "and", "min": "and"}
"""What arithmetic means for two booleans."""


def widest(*values: PrimExpr) -> str:
    """Promote element types (ranks are unknown here: the caller casts to the node's dtype)."""
    names = [element_type(v) for v in values]
    if {"float16", "bfloat16"} <= set(names):
        return "float32"
    return max(names, key=RANKS.index)


def binary(kind: str, a: PrimExpr, b: PrimExpr) -> PrimExpr:
    """Apply a function of two values of equal lanes."""
    if kind in ("and", "or"):
        combine = tirx.And if kind == "and" else tirx.Or
        return combine(convert(a, "bool"), convert(b, "bool"))
    wide = widest(a, b)
    if kind == "div" and not wide.startswith(("float", "bfloat")):
        wide = "float32"
    if wide == "bool" and kind in LOGIC:
        return binary(LOGIC[kind], a, b)
    if wide == "bool":
        return convert(binary(kind, convert(a, "int32"), convert(b, "int32")), "bool")
    computed = "float32" if wide in ("float16", "bfloat16") else wide
    a, b = convert(a, computed), convert(b, computed)
    result = let(a, lambda x: let(b, lambda y: ARITHMETIC[kind](x, y)))
    return result if kind in COMPARISONS else convert(result, wide)


def render(op: Op, operands: Sequence[PrimExpr], lanes: int) -> PrimExpr:
    """Render an element-wise op of the IR; scalars among the operands are spread over the lanes.

    The element type of the result follows torch's promotion without regard to ranks.
    """
    values = [spread(value, lanes) for value in operands]
    match op:
        case Unary(kind):
            return unary(kind, values[0])
        case Binary(kind) if kind in BINARY:
            return binary(kind, values[0], values[1])
        case Where():
            wide = widest(values[1], values[2])
            return tirx.Select(values[0], convert(values[1], wide), convert(values[2], wide))
        case Cast(dtype):
            return convert(values[0], TVM_NAMES[dtype])
        case GatedActivation(kind):
            return binary("mul", unary(kind, values[0]), values[1])
    raise TypeError(f"{op} is not computed element by element")


ELEMENTWISE = (Unary, Binary, Where, Cast, GatedActivation)
"""The ops that `render` knows."""
