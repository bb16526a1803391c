"""Model sources -> graphs: one file per source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qc.errors import ModelError
from qc.frontends.captured import Captured, describe
from qc.frontends.torch_export import capture

Example = Sequence[Any] | Mapping[str, Any] | None


def open_model(source: nn.Module | str | Path, example: Example = None) -> Captured:
    """Capture a model: a module, a Hugging Face folder or name, or a `.gguf` file.

    `example` gives inputs for a module that is not from transformers. ModelError says in one
    sentence what is wrong with a source, before any long work.
    """
    if isinstance(source, nn.Module):
        return describe(capture(source, example), source)
    if not isinstance(source, str | Path):
        raise ModelError(f"a model is a module, a folder, a name or a .gguf file, not {source!r}")
    if Path(source).suffix == ".gguf":
        from qc.frontends.gguf import open_gguf  # imports transformers

        return open_gguf(Path(source))
    from qc.frontends.hugging_face import open_folder_or_name  # imports transformers

    return open_folder_or_name(source)
