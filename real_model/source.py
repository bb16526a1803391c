"""Read SmolLM2 out of its GGUF file: configuration, float32 weights, tokenizer.

transformers can do this too, but parses the file once for each of the three and takes a minute.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

CONTROL_TOKEN = 3  # gguf's token type of the special tokens

# GGUF's names of tensors, and transformers'
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Source:
    """What the file holds, in the terms of transformers' Llama."""

    config: LlamaConfig
    state: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerFast


def read_source(file: Path) -> Source:
    """Read the file once."""
    reader = GGUFReader(file)
    config = _read_config(reader)
    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    state = {}
    for tensor in reader.tensors:
        kind = tensor.name.removesuffix(".weight").split(".")[-1]
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        state[_rename(tensor.name)] = (
            _split_halves(values, heads[kind]) if kind in heads else values
        )
    return Source(config, state, _read_tokenizer(reader))


def _field(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def _read_config(reader: GGUFReader) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _field(reader, "llama.rope.freq_base"),
        },
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=False,
        dtype=torch.float32,
    )


def _rename(name: str) -> str:
    """blk.3.attn_q.weight --> model.layers.3.self_attn.q_proj.weight"""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block:
        return f"model.layers.{block[1]}.{NAMES[block[2]]}.weight"
    return f"{NAMES[name.removesuffix('.weight')]}.weight"


def _split_halves(weight: Tensor, heads: int) -> Tensor:
    """Order each head's rows as transformers' RoPE wants them: GGUF interleaves the two halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns).contiguous()


def _read_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Build the byte-level BPE, equal to the one that transformers makes of this file."""
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    kinds = _field(reader, "tokenizer.ggml.token_type")
    vocabulary = {token: index for index, token in enumerate(tokens)}

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {
        short: _field(reader, f"tokenizer.ggml.{long}_token_id") for short, long in named.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_field(reader, "tokenizer.chat_template"),
        **{f"{short}_token": tokens[index] for short, index in ids.items()},
    )
