"""What all workers share: JSON lines in, JSON lines out. Standard library only.

A worker runs in the environment of the program that it measures, so it is run by its path. It
prints one line when it is ready, and answers each request by one line:

    {"do": "generate", "prompts": [text, ...], "tokens": n}
        -> {"seconds": s, "first_token_seconds": s, "tokens": made a prompt, "prompt_tokens": n}
    {"do": "surprise", "windows": [[id, ...], ...]}   -> {"nats": sum, "tokens": predicted}
    {"do": "memory"}                                  -> {"peak_bytes": n}

What a worker cannot do, it answers by {"error": reason}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


def serve(**actions: Callable[..., Answer]) -> None:
    """Answer requests until standard input ends."""
    lines = os.fdopen(os.dup(1), "w")  # libraries print to standard output too
    os.dup2(2, 1)

    def write(answer: Answer) -> None:
        lines.write(json.dumps(answer) + "\n")
        lines.flush()

    actions["memory"] = memory
    write({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        action = actions.get(request.pop("do"))
        try:
            write({"error": "not supported"} if action is None else action(**request))
        except Exception as error:  # noqa: BLE001 - whatever the peer raises is its answer
            write({"error": f"{type(error).__name__}: {error}"})


def memory() -> Answer:
    """Read the peak resident memory of this process, mapped files included (Linux)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return {"peak_bytes": 1024 * int(line.split()[1])}


def nats_of(logits: Any, ids: list[int]) -> float:
    """Sum -log p of each id but the first; `logits` is [tokens, vocabulary] of numpy."""
    import numpy as np

    own = np.asarray(logits[: len(ids) - 1], np.float32)
    shifted = own - own.max(-1, keepdims=True)
    chosen = shifted[np.arange(len(own)), np.asarray(ids[1:])]
    return float((np.log(np.exp(shifted).sum(-1)) - chosen).sum(dtype=np.float64))
