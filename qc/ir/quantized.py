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
    """Symmetric codes [..., channels], int8 or the bytes of e4m3, and float32 scales
    [..., groups]."""

    codes: Tensor
    scale: Tensor
    format: ActivationFormat

    @property
    def shape(self) -> torch.Size:
        """The shape of the values."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.codes.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The type of the values."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.codes.device

    def dequantize(self) -> Tensor:
        """Return codes * scale as float32[..., channels]."""
        groups, _ = split_groups(code_values(self.codes), self.format.group)
        return (groups * self.scale.unsqueeze(-1)).flatten(-2)[..., : self.codes.shape[-1]]


def code_values(codes: Tensor) -> Tensor:
    """Return what codes stand for, without their scales."""
    return (codes.view(torch.float8_e4m3fn) if codes.dtype == torch.uint8 else codes).float()


def quantize_activation(x: Tensor, format: ActivationFormat) -> QuantizedTensor:
    """Round each group of `x` to codes: scale = absmax / the largest code, ties to even."""
    limit = format.limit
    groups, _ = split_groups(x.float(), format.group)
    largest = groups.abs().amax(-1)
    inverse = torch.where(largest > 0, limit / largest, torch.zeros_like(largest))
    scaled = (groups * inverse.unsqueeze(-1)).clamp(-limit, limit)
    scaled = scaled.flatten(-2)[..., : x.shape[-1]]
    if format.kind == "e4m3":
        codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = scaled.round().to(torch.int8)
    return QuantizedTensor(codes, largest * (1.0 / limit), format)
