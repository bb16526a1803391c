"""Attention."""

from __future__ import annotations

from qc.backends.tvm.kernel import KernelRule

attention_rules: tuple[KernelRule, ...] = ()
