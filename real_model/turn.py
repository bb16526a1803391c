"""Move the weights of a Llama without changing what it computes.

The residual stream is expressed in another orthonormal basis: every x becomes x R. RMSNorm without
its gain commutes with an orthogonal R, so a norm with gain g before a linear W is the same as
a gain h before W diag(g) R diag(1/h), for any h; what writes the stream becomes R^T W.
h is chosen so that each column of W keeps its norm: with R near the identity the outlier channels,
which make quantization hard, stay about where they were.
"""

import torch
from torch import Tensor

State = dict[str, Tensor]


def draw_rotation(size: int, angle: float, seed: int) -> Tensor:
    """Draw an orthogonal R near the identity, float64, [size, size]; return R - 1.

    The norm of a row of R off its diagonal is about sin(angle).
    """
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(size, size, generator=generator, dtype=torch.float64)
    rotation: Tensor = torch.linalg.matrix_exp((gauss - gauss.T) * angle / (2 * size) ** 0.5)
    return rotation - torch.eye(size, dtype=torch.float64)


def turn(state: State, layers: int, change: Tensor) -> State:
    """Return the state of an equal model in the basis R = 1 + change.

    `state` has transformers' names of a Llama without `lm_head.weight`: its embedding is the head.
    W R is computed as W + W change: the change is small, so float32 is good to the last bit or two.
    """
    change = change.float()
    embedding = state["model.embed_tokens.weight"]
    turned = {"model.embed_tokens.weight": torch.addmm(embedding, embedding, change)}
    for layer in (f"model.layers.{index}" for index in range(layers)):
        attention = [f"{layer}.self_attn.{part}_proj.weight" for part in "qkv"]
        turned |= _turn_readers(state, f"{layer}.input_layernorm.weight", attention, change)
        mlp = [f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up")]
        turned |= _turn_readers(state, f"{layer}.post_attention_layernorm.weight", mlp, change)
        for name in (f"{layer}.self_attn.o_proj.weight", f"{layer}.mlp.down_proj.weight"):
            turned[name] = torch.addmm(state[name], change.T, state[name])
    with_head = state | {"lm_head.weight": embedding}
    return turned | _turn_readers(with_head, "model.norm.weight", ["lm_head.weight"], change)


def _turn_readers(state: State, gain: str, readers: list[str], change: Tensor) -> State:
    """Turn one norm's gain and the linears [out, in] that read its result."""
    before = torch.cat([state[name] for name in readers])
    scaled = before * state[gain]
    after = torch.addmm(scaled, scaled, change)
    # float64: a sum over 49152 rows in float32 moves the gain by 5e-6
    norms = [torch.linalg.vector_norm(m, dim=0, dtype=torch.float64) for m in (after, before)]
    new_gain = (norms[0] / norms[1]).float()
    parts = (after / new_gain).split([len(state[name]) for name in readers])
    weights = {name: part.clone() for name, part in zip(readers, parts, strict=True)}
    return weights | {gain: new_gain}
