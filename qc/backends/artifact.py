"""Put a compiled program together with everything an artifact holds beside its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qc.ir.target import Target
from qc.ir.types import Dim, dim_name
from qc.runtime.manifest import Generate

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class ArtifactFacts:
    """What an artifact says of itself besides its program."""

    name: str
    eos: tuple[int, ...] = ()
    bos: int | None = None
    context_length: int | None = None
    tokenizer: Path | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)


def generation_facts(
    inputs: list[str], outputs: list[str], eos: tuple[int, ...], bos: int | None, states: int
) -> Generate | None:
    """Return how to generate with a model that keeps caches and gives logits; None otherwise."""
    if not states or len(inputs) != 1 or "logits" not in outputs:
        return None
    return Generate(tokens=inputs[0], logits="logits", eos=eos, bos=bos)


def tokenizer_files(folder: Path | None) -> dict[str, bytes]:
    """Read the tokenizer of a model, where it has a tokenizer.json."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return {}
    present = (name for name in TOKENIZER_FILES if (folder / name).is_file())
    return {name: (folder / name).read_bytes() for name in present}


def required_features(target: Target) -> tuple[str, ...]:
    """Return what the CPU must have, spelled as the system spells it."""
    spelled = {"sse3": "pni"}
    return tuple(sorted(spelled.get(f, f) for f in target.features))


def dim_text(dim: Dim) -> int | str:
    """Write a dimension for the manifest."""
    return dim if isinstance(dim, int) else dim_name(dim)
