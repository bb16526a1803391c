"""The launches that choose the next tokens: the best of each block of logits, then one a row."""

from __future__ import annotations

import torch

from qc.backends.triton.glue import Glue, power_of_two
from qc.backends.triton.kernel import Cells, Launch, Scratch
from qc.ir.types import symbol
from qc.runtime.cuda.sampling import BLOCK, SETTINGS

BATCH = symbol("batch")
WARPS = 16
"""Of a row: two logits a thread at a time, and 8 sums of 64 bits for each."""


def sampler_launches(vocabulary: int) -> tuple[Launch, Launch]:
    """Write both launches. Their parameters come in the order of qc/runtime/cuda/sampling.py."""
    blocks = -(-vocabulary // BLOCK)
    logits = Scratch("logits", torch.float32, (BATCH, vocabulary))
    values = Scratch("values", torch.float32, (BATCH, blocks))
    ids = Scratch("ids", torch.int32, (BATCH, blocks))
    settings = Scratch("settings", torch.int32, (BATCH, SETTINGS))
    chosen = Scratch("chosen", torch.int32, (BATCH,))
    first = Glue("best_tokens")
    places = [first.pointer(each, each.dtype) for each in (logits, values, ids)]
    first.do("sampling.largest", *places, vocabulary, BLOCK, blocks)
    second = Glue("next_token")
    places = [second.pointer(each, each.dtype) for each in (logits, values, ids, settings, chosen)]
    second.do("sampling.choose", *places, vocabulary, blocks, power_of_two(blocks))
    return (
        first.launch((Cells(blocks), Cells(BATCH))),
        second.launch((Cells(BATCH),), warps=WARPS),
    )
