"""Linear kernels, from the most special rule to the one that takes every weight format."""

from __future__ import annotations

from qc.backends.tvm.kernel import KernelRule
from qc.backends.tvm.linear.decode import decoded_linear
from qc.backends.tvm.linear.float_dot import float_linear
from qc.backends.tvm.linear.int8_dot import int8_linear

linear_rules: tuple[KernelRule, ...] = (int8_linear, float_linear, decoded_linear)
