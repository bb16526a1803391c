"""Linear kernels: any sum of terms, from the most special way to the one that takes everything."""

from __future__ import annotations

from qc.backends.tvm.kernel import KernelRule
from qc.backends.tvm.linear.rule import linear_rule

linear_rules: tuple[KernelRule, ...] = (linear_rule,)
