"""Write models of the shapes of larger ones, with random weights, as sharded bfloat16 safetensors.

    python -m benchmarks.shapes 1b build/shapes/llama-1b TOKENIZER_FOLDER
    python -m benchmarks.shapes 7b build/shapes/llama-7b TOKENIZER_FOLDER      (13.5 GB)

TOKENIZER_FOLDER is any model whose tokenizer.json is copied, so that the model can be prompted.
Values are drawn from a normal distribution of deviation 0.02, norms are 1: fast or slow, small or
large is the same as with trained weights; what comes out is not language.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 1 << 30
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {  # of Llama 3.2 1B
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "7b": {  # of Llama 2 7B
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
        "vocab_size": 32000, "tie_word_embeddings": False,
    },
}  # fmt: skip
CONSTANT = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
}  # fmt: skip


def main(shape: str, folder: str, tokenizer: str) -> None:
    """Write a model."""
    config = {**CONSTANT, **SHAPES[shape]}
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        if (Path(tokenizer) / name).exists():
            shutil.copy(Path(tokenizer) / name, place / name)
    write_shards(place, config)
    (place / "config.json").write_text(json.dumps(config, indent=1))


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of all tensors."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{at}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def write_shards(place: Path, config: dict[str, Any]) -> None:
    """Write all tensors, about a gigabyte a file, and the index."""
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, Tensor]] = [{}]
    where: dict[str, str] = {}
    total = 0
    for name, shape in tensor_shapes(config):
        if sum(t.nbytes for t in shards[-1].values()) > SHARD_BYTES:
            save(place, len(shards), shards[-1])
            shards[-1] = {}
            shards.append({})
        values = torch.ones(shape)
        if len(shape) > 1:
            values.normal_(0.0, 0.02, generator=generator)
        shards[-1][name] = values.to(torch.bfloat16)
        where[name] = shard_name(len(shards))
        total += shards[-1][name].nbytes
    save(place, len(shards), shards[-1])
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (place / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def shard_name(number: int) -> str:
    """Name a file."""
    return f"model-{number:05d}.safetensors"


def save(place: Path, number: int, tensors: dict[str, Tensor]) -> None:
    """Write one file."""
    print(f"{place / shard_name(number)}: {len(tensors)} tensors", file=sys.stderr, flush=True)
    save_file(tensors, place / shard_name(number), metadata={"format": "pt"})


if __name__ == "__main__":
    main(*sys.argv[1:])
