"""How stored arrays are laid out for kernels."""

from __future__ import annotations

import torch

from qc.backends.tvm.linear.plan import BLOCK, ArrayLayout
from qc.ir.weights.weight import ArraySpec


def test_bytes_of_one_row_are_joined_whatever_its_stride() -> None:
    """A view of one row counts as contiguous and keeps the stride of what it was cut from."""
    row = torch.tensor([[1, 2, 3]], dtype=torch.uint8)[:, :2]
    assert row.is_contiguous()
    assert row.stride(0) == 3
    layout = ArrayLayout(ArraySpec((1, 2), torch.uint8), row_axis=0, unit=16)
    words = layout.repack(row)
    assert words.shape == layout.shape == (1, 1, BLOCK)
    assert words.flatten().tolist() == [0x0201] + [0] * (BLOCK - 1)
