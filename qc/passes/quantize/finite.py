"""Values that are not finite, counted without copies of large tensors."""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 1 << 22
"""Elements looked at together; torch makes several arrays of them."""


def count_unfinite(values: Tensor) -> int:
    """Count NaN and infinities."""
    if not values.numel() or all(torch.isfinite(x) for x in torch.aminmax(values)):
        return 0  # the extremes are NaN where any value is
    parts = values.reshape(-1).split(AT_ONCE)
    return sum(part.numel() - int(torch.isfinite(part).sum()) for part in parts)
