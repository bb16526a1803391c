"""Measure ONNX Runtime GenAI: onnxruntime_worker.py MODEL_FOLDER THREADS (see serving.py)."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai  # type: ignore[import-not-found]  # in the peer's environment only
from serving import Answer, nats_of, serve


def main() -> None:
    """Answer requests; the model's files are read through a copy of links."""
    with tempfile.TemporaryDirectory() as copy:
        link(Path(sys.argv[1]), Path(copy), int(sys.argv[2]))
        measure(onnxruntime_genai.Model(copy))


def measure(model: object) -> None:
    """Answer requests with a model."""
    tokenizer = onnxruntime_genai.Tokenizer(model)

    def start_of(rows: list[list[int]], length: int) -> object:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(
            max_length=length, min_length=length, batch_size=len(rows), do_sample=False
        )
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(np.array(rows, np.int32))
        return generator

    def generate(prompts: list[str], tokens: int) -> Answer:
        start = time.perf_counter()
        rows = [list(tokenizer.encode(prompt)) for prompt in prompts]
        generator = start_of(rows, len(rows[0]) + tokens)
        generator.generate_next_token()
        first = time.perf_counter() - start
        for _ in range(tokens - 1):
            generator.generate_next_token()
        for row in range(len(rows)):
            tokenizer.decode(generator.get_sequence(row))
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds, "first_token_seconds": first,
            "tokens": tokens, "prompt_tokens": len(rows[0]),
        }  # fmt: skip

    def surprise(windows: list[list[int]]) -> Answer:
        nats = 0.0
        for ids in windows:
            nats += nats_of(start_of([ids], len(ids) + 1).get_output("logits")[0], ids)
        return {"nats": nats, "tokens": sum(len(ids) - 1 for ids in windows)}

    serve(generate=generate, surprise=surprise)


def link(folder: Path, copy: Path, threads: int) -> None:
    """Link a model's files, with the number of threads, which only a file of it can say."""
    config = json.loads((folder / "genai_config.json").read_text())
    options = config["model"]["decoder"].setdefault("session_options", {})
    options["intra_op_num_threads"] = threads
    for path in folder.iterdir():
        if path.name != "genai_config.json":
            (copy / path.name).symlink_to(path.absolute())
    (copy / "genai_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
