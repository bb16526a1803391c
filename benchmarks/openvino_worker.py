"""Generate with OpenVINO GenAI in an environment of its own; talk JSON lines with the benchmark.

    python openvino_worker.py MODEL_FOLDER THREADS      (run by benchmarks/generation.py)

Each input line {"prompt": text, "tokens": n} is answered by {"seconds": s, "tokens": made}: greedy,
everything included, as a user would time it.
"""

from __future__ import annotations

import json
import sys
import time

import openvino_genai  # type: ignore[import-not-found]  # installed in the peer's environment only


def main() -> None:
    """Answer requests until standard input ends."""
    folder, threads = sys.argv[1], int(sys.argv[2])
    start = time.perf_counter()
    pipeline = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)
    print(json.dumps({"load_seconds": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = request["tokens"]
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        start = time.perf_counter()
        result = pipeline.generate([request["prompt"]], config)
        seconds = time.perf_counter() - start
        metrics = result.perf_metrics
        made = metrics.get_num_generated_tokens()
        answer = {
            "seconds": seconds,
            "tokens": made,
            "prompt_tokens": metrics.get_num_input_tokens(),
            "first_token_seconds": metrics.get_ttft().mean / 1e3,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
