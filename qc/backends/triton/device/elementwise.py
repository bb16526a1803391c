"""Functions of one element: float32 values come in and go out, whatever they are stored as."""

import triton
import triton.language as tl

from qc.backends.triton.device.constants import HALF_SQRT, TANH_CUBE, TANH_LINEAR

# ---------------------------------------------------------------- of one value


@triton.jit
def abs_(x):
    return tl.abs(x)


@triton.jit
def neg(x):
    return -x


@triton.jit
def reciprocal(x):
    return 1.0 / x


@triton.jit
def not_(x):
    return x == 0


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def sin(x):
    return tl.sin(x)


@triton.jit
def cos(x):
    return tl.cos(x)


@triton.jit
def erf(x):
    return tl.erf(x)


@triton.jit
def floor(x):
    return tl.floor(x)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """1 - 2 / (exp(2 |x|) + 1), with the sign of x: exp never meets its own inverse."""
    magnitude = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def relu(x):
    return tl.maximum(x, 0)


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def gelu(x):
    """x Phi(x). Hendrycks and Gimpel 2016."""
    return 0.5 * x * (1.0 + tl.erf(x * HALF_SQRT))


@triton.jit
def gelu_tanh(x):
    return x * (0.5 + 0.5 * tanh(x * TANH_LINEAR * (x * x * TANH_CUBE + 1.0)))


# ---------------------------------------------------------------- of two values


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def sub(a, b):
    return a - b


@triton.jit
def mul(a, b):
    return a * b


@triton.jit
def div(a, b):
    return a / b


@triton.jit
def floordiv(a, b):
    """floor(a / b): integers round down, too, where the machine's division cuts off."""
    if a.dtype.is_floating():
        return tl.floor(a / b)
    else:
        quotient = a // b
        return quotient - ((quotient * b != a) & ((a < 0) != (b < 0))).to(quotient.dtype)


@triton.jit
def pow_(a, b):
    """a^b; a negative a takes whole powers, others give NaN."""
    power = tl.exp2(b * tl.log2(tl.abs(a)))
    whole = tl.floor(b) == b
    odd = whole & (tl.floor(b * 0.5) * 2.0 != b)
    signed = tl.where(odd & (a < 0), -power, power)
    return tl.where(b == 0, 1.0, tl.where((a < 0) & (whole == 0), float("nan"), signed))


@triton.jit
def min_(a, b):
    return tl.minimum(a, b)


@triton.jit
def max_(a, b):
    return tl.maximum(a, b)


@triton.jit
def and_(a, b):
    return (a != 0) & (b != 0)


@triton.jit
def or_(a, b):
    return (a != 0) | (b != 0)


@triton.jit
def eq(a, b):
    return a == b


@triton.jit
def ne(a, b):
    return a != b


@triton.jit
def lt(a, b):
    return a < b


@triton.jit
def le(a, b):
    return a <= b


@triton.jit
def gt(a, b):
    return a > b


@triton.jit
def ge(a, b):
    return a >= b


# ---------------------------------------------------------------- of several, and of types


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    return x.to(DTYPE)


@triton.jit
def nonzero(x):
    return x != 0


@triton.jit
def constant(VALUE: tl.constexpr, DTYPE: tl.constexpr):
    """A number of a type of its own: a bare literal would take part in type promotion."""
    return tl.full((), VALUE, DTYPE)
