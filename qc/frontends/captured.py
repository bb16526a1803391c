"""A captured model: its graph, and what a runtime must know to generate with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qc.ir.graph import Graph

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
"""Where configurations keep the context length, the usual name first."""


@dataclass(frozen=True, eq=False)
class Captured:
    """A graph and the facts beside it; `tokenizer` is a folder with tokenizer.json."""

    graph: Graph
    name: str = "model"
    vocabulary: int | None = None
    context_length: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    tokenizer: Path | None = None


def describe(graph: Graph, model: Any, tokenizer: Path | None = None) -> Captured:
    """Read the facts off the configuration of a transformers model; a plain module has none."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    sources = (getattr(model, "generation_config", None), text)
    return Captured(
        graph,
        name=getattr(config, "model_type", "") or type(model).__name__,
        vocabulary=first_integer([text], ("vocab_size",)),
        context_length=first_integer([text], CONTEXT_FIELDS),
        bos_id=first_integer(sources, ("bos_token_id",)),
        eos_ids=next(filter(None, (token_ids(s, "eos_token_id") for s in sources)), ()),
        tokenizer=tokenizer,
    )


def first_integer(sources: Iterable[Any], fields: Iterable[str]) -> int | None:
    """Return the first integer found under `fields` in `sources`."""
    fields = tuple(fields)
    values = (getattr(source, name, None) for source in sources for name in fields)
    return next((v for v in values if isinstance(v, int)), None)


def token_ids(source: Any, field: str) -> tuple[int, ...]:
    """Return a field that holds one id, several, or none."""
    value = getattr(source, field, None)
    if isinstance(value, int):
        return (value,)
    return tuple(value) if isinstance(value, list | tuple) else ()
