"""Linear kernels, from the most special rule to the one that takes every weight format."""

from __future__ import annotations

from qc.backends.tvm.kernel import KernelRule
from qc.backends.tvm.linear.decode import decoded_linear

linear_rules: tuple[KernelRule, ...] = (decoded_linear,)
