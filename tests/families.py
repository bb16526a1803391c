"""Tiny random models of twelve families, captured once for a whole run of the tests."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from qc.frontends.torch_export import capture
from qc.ir.graph import Graph

VOCABULARY, IMAGE = 128, 32
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
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
    "gpt2": dict(
        n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, **SPECIAL_IDS
    ),
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
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
        "image_size": IMAGE,
        "patch_size": 8,
    },
}
FAMILIES = {**DECODERS, **ENCODERS}


def build(family: str, **sizes: Any) -> Any:
    """Build a model with random weights, norms and biases included."""
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **sizes})
    source: Any = AutoModelForCausalLM if family in DECODERS else AutoModel
    torch.manual_seed(0)
    model = source.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh norms are all ones and biases all zeros, which would hide their mixing up.
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@functools.cache
def model_of(family: str) -> Any:
    """Return the model of a family; tests do not change it."""
    return build(family)


@functools.cache
def captured(family: str) -> Graph:
    """Return the captured graph of a family."""
    return capture(model_of(family))


def inputs(family: str, batch: int, seq: int) -> dict[str, Tensor]:
    """Draw inputs; images have one size whatever `seq` says."""
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE)}
    return {"input_ids": torch.randint(0, VOCABULARY, (batch, seq))}


@torch.no_grad()
def first_output(model: nn.Module, values: dict[str, Tensor]) -> Tensor:
    """Return the model's first output."""
    outputs: Any = model(**values)
    result: Tensor = outputs["logits"] if "logits" in outputs else outputs[0]
    return result
