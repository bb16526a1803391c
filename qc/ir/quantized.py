"""A quantized activation: what a `Quantize` node means in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qc.ir.types import ActivationFormat


def split_groups(x: Tensor, group: int | None) -> tuple[Tensor, int]:
    """View the last axis of `x` as [..., groups, group], zero-padded in the last group."""
    size = x.shape[-1]
    group = size if group is None else min(group, size)
    padded = torch.nn.functional.pad(x, (0, -size % group))
    return padded.unflatten(-1, (-1, group)), group


@dataclass(frozen=True)
class QuantizedTensor:
    """Symmetric codes int8[..., channels] and float32 scales [..., groups]."""

    codes: Tensor
    scale: Tensor
    format: ActivationFormat

    def dequantize(self) -> Tensor:
        """Return codes * scale as float32[..., channels]."""
        groups, _ = split_groups(self.codes.float(), self.format.group)
        return (groups * self.scale.unsqueeze(-1)).flatten(-2)[..., : self.codes.shape[-1]]


def quantize_activation(x: Tensor, format: ActivationFormat) -> QuantizedTensor:
    """Round each group of `x` to int codes: scale = absmax / (2^(bits-1) - 1), ties to even."""
    limit = 2 ** (format.bits - 1) - 1
    groups, _ = split_groups(x.float(), format.group)
    largest = groups.abs().amax(-1)
    inverse = torch.where(largest > 0, limit / largest, torch.zeros_like(largest))
    codes = (groups * inverse.unsqueeze(-1)).round().clamp(-limit, limit)
    codes = codes.flatten(-2)[..., : x.shape[-1]].to(torch.int8)
    return QuantizedTensor(codes, largest * (1.0 / limit), format)
