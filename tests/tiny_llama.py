"""A tiny llama folder with a tokenizer and a chat template, and artifacts made of it, once a run.

The functions take a folder to work in, `tmp_path_factory.getbasetemp()`: it is the same for every
test file of one process, so that each artifact is compiled once.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qc

TEXT = """The cat sat on the mat and looked at the moon. The moon looked back at the cat.
In the morning the cat sat by the window, and the moon was gone; the sun was there instead.
Überall schläft die Katze, und 1234 Sterne sehen zu.
"""
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
CONTEXT = 128


def llama_folder(base: Path, hidden: int = 56, intermediate: int = 72) -> Path:
    """Write the model: one block, ragged sizes, weights far enough from zero to disagree."""
    folder = base / ("tiny-llama" if hidden == 56 else f"tiny-llama-{hidden}")
    if folder.is_dir():
        return folder
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        bos_token_id=None, eos_token_id=tokenizer.convert_tokens_to_ids("<|end|>"),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of few merges: every text has tokens, and some have several bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT
    return fast


def llama_artifact(base: Path, target: str = "cpu-w4") -> Path:
    """Compile the folder for a target."""
    place = base / f"tiny-llama-{target.replace(':', '-')}.qc"
    if not place.is_dir():
        qc.compile(llama_folder(base), target, output=place)
    return place
