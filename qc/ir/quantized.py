"""A quantized activation: what a `Quantize` node means in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qc.ir.types import ActivationFormat
from qc.ir.weights.floating import FloatingFormat, value_table
from qc.ir.weights.packing import pack_codes, unpack_codes

E2M1 = FloatingFormat(2, 1, scaling="none")
LARGEST_SCALE = 448.0
"""The largest float of e4m3, in which scales of e2m1 are stored."""


def split_groups(x: Tensor, group: int | None) -> tuple[Tensor, int]:
    """View the last axis of `x` as [..., groups, group], zero-padded in the last group."""
    size = x.shape[-1]
    group = size if group is None else min(group, size)
    padded = torch.nn.functional.pad(x, (0, -size % group))
    return padded.unflatten(-1, (-1, group)), group


@dataclass(frozen=True)
class QuantizedTensor:
    """Symmetric codes [..., channels], int8 or the bytes of e4m3, and float32 scales
    [..., groups].

    With codes of e2m1, two lie in a byte, the first in its low half; scales are bytes of e4m3, and
    `factor`, float32 [..., 1], multiplies them.
    """

    codes: Tensor
    scale: Tensor
    format: ActivationFormat
    factor: Tensor | None = None

    @property
    def arrays(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        found = {"codes": self.codes, "scale": self.scale}
        return found if self.factor is None else {**found, "factor": self.factor}

    @property
    def shape(self) -> torch.Size:
        """The shape of the values."""
        *rows, last = self.codes.shape
        return torch.Size((*rows, 2 * last)) if self.format.kind == "e2m1" else self.codes.shape

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
        groups, _ = split_groups(code_values(self.codes, self.format), self.format.group)
        scale = self.scale
        if self.factor is not None:
            scale = scale.view(torch.float8_e4m3fn).float() * self.factor
        return (groups * scale.unsqueeze(-1)).flatten(-2)[..., : self.shape[-1]]


def code_values(codes: Tensor, format: ActivationFormat) -> Tensor:
    """Return what codes stand for, without their scales."""
    match format.kind:
        case "e4m3":
            return codes.view(torch.float8_e4m3fn).float()
        case "e2m1":
            rows = unpack_codes(codes.flatten(0, -2), 4, 2 * codes.shape[-1])
            table = value_table(E2M1).to(codes.device)
            return table[rows.long()].view(*codes.shape[:-1], -1)
    return codes.float()


def quantize_activation(x: Tensor, format: ActivationFormat) -> QuantizedTensor:
    """Round each group of `x` to codes: scale = absmax / the largest code, ties to even."""
    limit = format.limit
    groups, _ = split_groups(x.float(), format.group)
    largest = groups.abs().amax(-1)
    if format.kind == "e2m1":
        return quantize_to_e2m1(groups, largest, format)
    inverse = torch.where(largest > 0, limit / largest, torch.zeros_like(largest))
    scaled = (groups * inverse.unsqueeze(-1)).clamp(-limit, limit)
    scaled = scaled.flatten(-2)[..., : x.shape[-1]]
    if format.kind == "e4m3":
        codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = scaled.round().to(torch.int8)
    return QuantizedTensor(codes, largest * (1.0 / limit), format)


def quantize_to_e2m1(groups: Tensor, largest: Tensor, format: ActivationFormat) -> QuantizedTensor:
    """Round groups [..., groups, channels] with these largest values to e2m1.

    factor = absmax of the token / (448 6), scale = e4m3(absmax of the group / (6 factor)): the
    largest group has the largest scale. "Pretraining Large Language Models with NVFP4" (NVIDIA
    2025), section 2, with a token in place of the tensor.
    """
    token = largest.amax(-1, keepdim=True)
    inverse = torch.where(token > 0, LARGEST_SCALE / token, torch.zeros_like(token))
    scale = (largest * inverse).clamp(max=LARGEST_SCALE).to(torch.float8_e4m3fn)
    factor = token * (1.0 / (LARGEST_SCALE * format.limit))
    whole = scale.float() * factor
    inverse = torch.where(whole > 0, 1.0 / whole, torch.zeros_like(whole))
    scaled = (groups * inverse.unsqueeze(-1)).clamp(-format.limit, format.limit).flatten(-2)
    codes = pack_codes(E2M1.round(scaled.flatten(0, -2)), 4).view(*scaled.shape[:-1], -1)
    return QuantizedTensor(codes, scale.view(torch.uint8), format, factor)
