"""Numbers that device functions read."""

import math

import triton.language as tl

HALF_SQRT = tl.constexpr(math.sqrt(0.5))
TANH_LINEAR = tl.constexpr(math.sqrt(2 / math.pi))
TANH_CUBE = tl.constexpr(0.044715)
"""Hendrycks and Gimpel 2016, section 2."""

ROUND = tl.constexpr(1.5 * 2.0**23)
"""A float32 as large as this has no fraction bits: adding and subtracting it rounds to even."""

LOWEST = tl.constexpr(-3.4e38)
"""Below every score, and finite: a row of -inf alone must not give inf - inf."""
