"""All kernel rules of the CPU backend, in the order in which they are asked."""

from __future__ import annotations

from qc.backends.tvm.append import append_rules
from qc.backends.tvm.attention import attention_rules
from qc.backends.tvm.elementwise import elementwise_rules
from qc.backends.tvm.kernel import KernelRule
from qc.backends.tvm.linear import linear_rules
from qc.backends.tvm.rows import row_rules

CPU_RULES: tuple[KernelRule, ...] = (
    *linear_rules,
    *attention_rules,
    *append_rules,
    *row_rules,
    *elementwise_rules,
)
