"""Write a Llama-shaped Hugging Face folder as a GGUF file, as llama.cpp's own converter and
quantizer do.

    python -m benchmarks.write_gguf MODEL_FOLDER FILE.gguf Q4_1

Matrices of linears and the embedding are stored in the given type; the head is stored in Q8_0,
which is what llama-quantize falls back to where the rows do not fill a Q6_K block. Norms are
float32. Sources: the GGUF specification; llama.cpp's convert_hf_to_gguf.py for names and the order
of rotated rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open
from torch import Tensor

OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
HEAD_TYPE = GGMLQuantizationType.Q8_0


def main(folder: str, file: str, kind: str) -> None:
    """Write the file."""
    config = json.loads((Path(folder) / "config.json").read_text())
    if config["model_type"] != "llama":
        raise SystemExit(f"only Llama models are written as GGUF here, not {config['model_type']}")
    partial = f"{file}.partial"
    writer = gguf.GGUFWriter(partial, "llama")
    write_facts(writer, config)
    write_tokenizer(writer, Path(folder), config)
    head = "token_embd.weight" if config["tie_word_embeddings"] else "output.weight"
    for name, tensor in tensors_of(Path(folder)):
        stored = HEAD_TYPE if ggml_name(name) == head else GGMLQuantizationType[kind]
        write_tensor(writer, ggml_name(name), arranged(name, tensor, config), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Path(partial).rename(file)


def write_facts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Write the sizes of the model."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    """Write a byte-level BPE tokenizer; ids that it lacks are unused tokens."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    texts = {number: text for text, number in content["model"]["vocab"].items()}
    special = {each["id"]: each["content"] for each in content["added_tokens"]}
    texts |= special
    tokens, types = [], []
    for number in range(config["vocab_size"]):
        tokens.append(texts.get(number, f"[unused{number}]"))
        kind = gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL
        types.append(kind if number in texts else gguf.TokenType.UNUSED)
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of the safetensors files of a folder."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                yield name, file.get_tensor(name)


def ggml_name(name: str) -> str:
    """Translate a tensor's name."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, *parts, kind = name.split(".")
    return f"blk.{layer}.{IN_LAYER['.'.join(parts)]}.{kind}"


def arranged(name: str, tensor: Tensor, config: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return float32 values; rows that are rotated as halves become rotated pairs."""
    values = tensor.to(torch.float32).numpy()
    part = name.split(".")[-2]
    counts = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    if part not in counts:
        return values
    heads = config[counts[part]]
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(values.shape)


def write_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    values: np.ndarray[Any, Any],
    kind: GGMLQuantizationType,
) -> None:
    """Quantize one tensor and add it."""
    if values.ndim < 2:
        writer.add_tensor(name, values)
        return
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


if __name__ == "__main__":
    main(*sys.argv[1:])
