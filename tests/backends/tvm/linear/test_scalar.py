"""Without any fast rule, every weight is decoded element by element."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from qc.backends.tvm.linear import rule
from qc.ir.target import CPUS, Target, host_cpu
from qc.ir.types import ActivationFormat
from qc.ir.weights.dense import DenseFormat
from qc.ir.weights.grouped import GroupedFormat
from tests.backends.tvm.linear.cases import Case, worst_error

ODD = (1, 7, 31, 33, 127, 129)
FORMATS = (
    (DenseFormat(torch.float32),),
    (DenseFormat(torch.float16),),
    (DenseFormat(torch.bfloat16),),
    (GroupedFormat(4, 32, "minimum"), GroupedFormat(2, None, "symmetric")),
    *((GroupedFormat(bits, 16, "zero"),) for bits in (2, 3, 5, 8)),
)


def cases() -> list[Case]:
    """Two sizes for every format; sizes, activations and epilogues take turns."""
    found = []
    epilogues = cycle(("", "bias", "residual", "", "gated"))
    activations = (None, ActivationFormat(8, 32), ActivationFormat(8), ActivationFormat(8, 5))
    for i, formats in enumerate(FORMATS):
        for j in (0, 1):
            outer, inner = ODD[i % len(ODD)], ODD[(i + 3 * j + 1) % len(ODD)]
            activation = activations[(i + j) % 4]
            found.append(Case(outer, inner, formats, activation, next(epilogues)))
    return found


@pytest.mark.parametrize("target", [CPUS["x86_64-v2"], host_cpu()], ids=str)
def test_every_format_and_size_is_decoded_and_multiplied(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule, "FAST_RULES", ())
    chosen = cases() if target == host_cpu() else cases()[::4]
    errors = worst_error(rule.linear_rule, chosen, target, rows=(1, 2, 5))
    assert max(errors.values()) < 1e-5, max(errors, key=lambda case: errors[case])


def test_the_option_takes_the_fast_rules_away(pytestconfig: pytest.Config) -> None:
    assert bool(rule.FAST_RULES) != pytestconfig.getoption("--without-fast-rules")
