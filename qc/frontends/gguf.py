"""GGUF files -> graphs: the file is read by `gguf_file`, its names and numbers are translated by
transformers, which knows each architecture's conventions."""

from __future__ import annotations

import functools
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils as translation

from qc.errors import ModelError
from qc.frontends.captured import Captured, describe
from qc.frontends.gguf_file import GgufFile, read_gguf
from qc.frontends.hugging_face import (
    build_untouched,
    check_depth,
    first_line,
    match_names,
    quiet,
)
from qc.frontends.torch_export import capture


def open_gguf(path: Path) -> Captured:
    """Capture the model in a GGUF file; its weights become float32."""
    content = read_gguf(path)
    with quiet(), reading(content):
        config = config_of(path, content)
        model = build_untouched(config)
        stored = match_names(model, dequantize(path, model))
        if stored is None:
            raise ModelError(f"{path} lacks weights that its architecture {config.model_type} has")
        tokenizer = write_tokenizer(path, content)
        captured = describe(capture(model, stored=stored), model, tokenizer)
        if tokenizer is not None:
            weakref.finalize(captured, shutil.rmtree, tokenizer, ignore_errors=True)
        return captured


@contextmanager
def reading(content: GgufFile) -> Iterator[None]:
    """Let transformers, which opens the file again for each of its questions, find `content`.

    The reader of the gguf package takes ten seconds each time and checks less. The table of
    names, which transformers makes again for every module, is made once.
    """
    with (
        replaced(gguf, "GGUFReader", lambda path: content),
        replaced(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        replaced(translation, "tqdm", lambda tensors, **options: tensors),
    ):
        yield


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Put `value` in the place of a module's attribute for a while."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def config_of(path: Path, content: GgufFile) -> Any:
    """Translate the configuration."""
    if "general.architecture" not in content.fields:
        raise ModelError(f"{path} does not say what architecture it has")
    try:
        values = translation.load_gguf_checkpoint(str(path))["config"]
        config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except Exception as error:
        raise ModelError(f"{path} holds no model that can be read: {first_line(error)}") from error
    check_depth(config, len(content.tensors), path)
    config.dtype = torch.float32
    return config


def dequantize(path: Path, model: Any) -> dict[str, torch.Tensor]:
    """Return the weights by the names that `model` gives them."""
    try:
        parsed = translation.load_gguf_checkpoint(
            str(path), return_tensors=True, model_to_load=model, torch_dtype=torch.float32
        )
    except Exception as error:
        raise ModelError(f"the weights of {path} cannot be read: {first_line(error)}") from error
    tensors: dict[str, torch.Tensor] = parsed["tensors"]
    return tensors


def write_tokenizer(path: Path, content: GgufFile) -> Path | None:
    """Write tokenizer.json and the chat template into a new folder, if the file has them."""
    if "tokenizer.ggml.tokens" not in content.fields:
        return None
    folder = Path(tempfile.mkdtemp(prefix="qc-tokenizer-"))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        shutil.rmtree(folder)
        raise ModelError(f"the tokenizer of {path} cannot be read: {first_line(error)}") from error
    return folder
