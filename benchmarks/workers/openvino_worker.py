"""Measure OpenVINO GenAI: openvino_worker.py MODEL_FOLDER THREADS (requests: see serving.py)."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import openvino_genai  # type: ignore[import-not-found]  # installed in the peer's environment only
from serving import Answer, nats_of, serve


def main() -> None:
    """Answer requests."""
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=threads)

    def generate(prompts: list[str], tokens: int) -> Answer:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        start = time.perf_counter()
        result = pipeline.generate(prompts, config)
        seconds = time.perf_counter() - start
        metrics = result.perf_metrics
        return {
            "seconds": seconds, "first_token_seconds": metrics.get_ttft().mean / 1e3,
            "tokens": tokens,
            "prompt_tokens": metrics.get_num_input_tokens() // len(prompts),
        }  # fmt: skip

    def surprise(windows: list[list[int]]) -> Answer:
        import openvino  # type: ignore[import-not-found]

        core = openvino.Core()
        model = core.compile_model(
            folder / "openvino_model.xml", "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        request, nats = model.create_infer_request(), 0.0
        names = {name for port in model.inputs for name in port.get_names()}
        for ids in windows:
            request.reset_state()
            inputs = {
                "input_ids": np.array([ids], np.int64),
                "attention_mask": np.ones((1, len(ids)), np.int64),
                "position_ids": np.arange(len(ids), dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            found = request.infer({name: a for name, a in inputs.items() if name in names})
            nats += nats_of(found[model.output("logits")][0], ids)
        return {"nats": nats, "tokens": sum(len(ids) - 1 for ids in windows)}

    serve(generate=generate, surprise=surprise)


if __name__ == "__main__":
    main()
