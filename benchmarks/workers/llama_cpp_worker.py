"""Measure llama.cpp: llama_cpp_worker.py FILE.gguf THREADS (requests: see serving.py)."""

from __future__ import annotations

import itertools
import sys
import time

from llama_cpp import Llama  # type: ignore[import-not-found]  # in the peer's environment only
from serving import Answer, nats_of, serve

CONTEXT = 4096
"""Positions that the cache has room for: the longest prompt of the benchmark and its answer."""


def main() -> None:
    """Answer requests."""
    path, threads = sys.argv[1], int(sys.argv[2])
    options = {"n_threads": threads, "n_threads_batch": threads, "verbose": False}
    model = Llama(path, n_ctx=CONTEXT, **options)

    def generate(prompts: list[str], tokens: int) -> Answer:
        if len(prompts) > 1:
            return {"error": "llama-cpp-python generates one sequence at a time"}
        model.reset()  # without it, what the last prompt shares with this one is not computed
        start = time.perf_counter()
        ids = model.tokenize(prompts[0].encode(), add_bos=False)
        stream = model.generate(ids, top_k=1, temp=0.0)
        made = [next(stream)]
        first = time.perf_counter() - start
        made += itertools.islice(stream, tokens - 1)
        model.detokenize(made)
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds, "first_token_seconds": first,
            "tokens": tokens, "prompt_tokens": len(ids),
        }  # fmt: skip

    def surprise(windows: list[list[int]]) -> Answer:
        size = max(map(len, windows))
        all_logits = Llama(path, n_ctx=size, logits_all=True, **options)
        nats = 0.0
        for ids in windows:
            all_logits.reset()
            all_logits.eval(ids)
            nats += nats_of(all_logits.scores, ids)
        return {"nats": nats, "tokens": sum(len(ids) - 1 for ids in windows)}

    serve(generate=generate, surprise=surprise)


if __name__ == "__main__":
    main()
