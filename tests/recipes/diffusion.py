"""A small diffusion transformer of `diffusers`, taught for a moment, with outliers of its own and
planted ones."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CLASSES, STEPS, CHANNELS = 10, 1000, 4
PLANTED = (7, 70, 133, 200)
"""Channels that are planted, one in every group of 64."""


@dataclass(frozen=True)
class Shape:
    """Two blocks of `heads` heads of 64 channels, on images of `side` x `side`, a token for each
    2 x 2."""

    heads: int = 4
    side: int = 16


WHOLE = Shape()
SMALL = Shape(2, 8)
"""For Triton's interpreter, which runs one program after another."""


def images(classes: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Draw waves with the direction and length of their class, f32[n, channels, side, side]."""
    axis = torch.linspace(0, 6.28, side)
    angle = classes.view(-1, 1, 1) * 0.6
    across = axis.view(1, 1, -1) * angle.cos() + axis.view(1, -1, 1) * angle.sin()
    phase = 6.28 * torch.rand(len(classes), CHANNELS, 1, 1, generator=generator)
    return torch.sin((1 + classes.view(-1, 1, 1, 1) % 3) * across.unsqueeze(1) + phase)


def noised(count: int, seed: int, shape: Shape = WHOLE) -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs of the model, and the noise in them that it shall predict."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, CLASSES, (count,), generator=generator)
    times = torch.randint(0, STEPS, (count,), generator=generator)
    noise = torch.randn(count, CHANNELS, shape.side, shape.side, generator=generator)
    kept = torch.cos(times / STEPS * 1.57).view(-1, 1, 1, 1)
    mixed = kept * images(classes, shape.side, generator) + (1 - kept.square()).sqrt() * noise
    return {"hidden_states": mixed, "timestep": times, "class_labels": classes}, noise


@functools.cache
@torch.enable_grad()
def taught(shape: Shape = WHOLE, steps: int = 60) -> Any:
    """Return a transformer of two blocks after some steps of Adam."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=shape.heads, attention_head_dim=64, num_layers=2, patch_size=2,
        in_channels=CHANNELS, out_channels=CHANNELS, sample_size=shape.side,
        num_embeds_ada_norm=CLASSES,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        inputs, noise = noised(16, step, shape)
        loss = (model(**inputs).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def planted(shape: Shape = WHOLE, size: float = 40.0) -> Any:
    """Return the same function with a few channels `size` times as large in front of queries, keys,
    values and the feed-forward: what modulates the norms makes them, weights take them back."""
    import copy

    model = copy.deepcopy(taught(shape))
    width = model.config.num_attention_heads * model.config.attention_head_dim
    for block in model.transformer_blocks:
        attention, into = block.attn1, block.ff.net[0].proj
        readers = ((0, (attention.to_q, attention.to_k, attention.to_v)), (3, (into,)))
        for part, linears in readers:
            for channel in (c for c in PLANTED if c < width):
                shift, scale = part * width + channel, (part + 1) * width + channel
                for row in (shift, scale):
                    block.norm1.linear.weight[row] *= size
                    block.norm1.linear.bias[row] *= size
                block.norm1.linear.bias[scale] += size - 1  # the norm's factor is 1 + scale
                for linear in linears:
                    linear.weight[:, channel] /= size
    return model
