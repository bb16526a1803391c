"""All kernel rules of the GPU backend, in the order in which they are asked."""

from __future__ import annotations

from qc.backends.triton.append import append_rules
from qc.backends.triton.attention import attention_rules
from qc.backends.triton.convolution import convolution_rules
from qc.backends.triton.elements import element_rules
from qc.backends.triton.kernel import KernelRule
from qc.backends.triton.linear.rule import linear_rule
from qc.backends.triton.rows import row_rules

GPU_RULES: tuple[KernelRule, ...] = (
    linear_rule,
    *attention_rules,
    *append_rules,
    *convolution_rules,
    *row_rules,
    *element_rules,
)
