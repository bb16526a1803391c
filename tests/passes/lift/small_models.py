"""Tiny random models of the families that lifting is held to; sizes are odd enough to matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
GROUPED = dict(SIZES, num_key_value_heads=2)
WINDOW = 8
GEMMA = dict(GROUPED, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16)
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": dict(GROUPED, head_dim=16),
    "mistral": dict(GROUPED, sliding_window=WINDOW),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": dict(GROUPED, **SPECIAL_IDS),
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64, **SPECIAL_IDS),
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 64,
    },
    "gpt_neox": SIZES,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "vit": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    },
}
FAMILIES = {**DECODERS, **ENCODERS}


def build(family: str) -> nn.Module:
    """Build a model with random weights, norms and biases included."""
    config = AutoConfig.for_model(family, **FAMILIES[family])
    source: Any = AutoModelForCausalLM if family in DECODERS else AutoModel
    model: nn.Module = source.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh norms are all ones and biases all zeros, which would hide their mixing up.
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model
