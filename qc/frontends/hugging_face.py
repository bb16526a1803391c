"""Hugging Face folders and names -> graphs, the weights memory-mapped where they lie.

The architecture is built without touching the memory of its parameters, exported, and the
exported graph takes its tensors straight from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qc.errors import ModelError, UnsupportedError, nearest
from qc.frontends.captured import Captured, describe
from qc.frontends.checkpoint import map_tensors, read_json, weight_files
from qc.frontends.torch_export import Stored, capture, named_tensors
from qc.ir.weights.mapped import MappedTensor

DOWNLOADED = ("*.json", "*.safetensors", "*.jinja")


def open_folder_or_name(source: str | Path) -> Captured:
    """Capture the model in a folder, or the one of that name on the hub (or in its cache)."""
    if Path(source).is_dir():
        return open_folder(Path(source))
    if Path(source).exists():
        raise ModelError(f"{source} is a file; a model is a folder, a hub name or a .gguf file")
    return open_folder(fetch(str(source)))


def fetch(name: str) -> Path:
    """Return the local folder of a hub model, from the cache or downloaded."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError as error:
        raise ModelError(f"there is no folder {name}, and it is no hub name either") from error
    except OSError:
        pass  # not in the cache
    try:
        return Path(snapshot_download(name, allow_patterns=list(DOWNLOADED)))
    except (OSError, ValueError, RuntimeError) as error:  # the many faces of "no connection"
        raise ModelError(
            f"{name} is neither a folder nor in the local cache, and could not be downloaded "
            f"({type(error).__name__})"
        ) from error


def open_folder(folder: Path) -> Captured:
    """Capture the model in a folder with config.json and safetensors."""
    with quiet():
        config = read_config(folder)
        tensors = map_tensors(weight_files(folder))
        check_depth(config, len(tensors), folder)
        model = build_untouched(config)
        stored = match_names(model, tensors)
        if stored is None:
            model, stored = load(folder, type(model)), {}
        fill_buffers(model, tensors)
        model.generation_config = read_generation_config(folder) or model.generation_config
        tokenizer = folder if (folder / "tokenizer.json").is_file() else None
        return describe(capture(model, stored=stored), model, tokenizer)


# ---------------------------------------------------------------- the architecture


def read_config(folder: Path) -> Any:
    """Read and check config.json."""
    content = read_json(folder / "config.json")
    kind, known = str(content.get("model_type")), transformers.CONFIG_MAPPING
    if kind not in known:
        if content.get("auto_map"):
            raise UnsupportedError(f"{folder} brings its own code, which qc does not run")
        close = nearest(kind, list(known.keys()))
        raise ModelError(f"{folder / 'config.json'} has the unknown model_type {kind!r}{close}")
    if content.get("quantization_config"):
        method = content["quantization_config"].get("quant_method", "an unknown method")
        raise UnsupportedError(f"{folder} is quantized already (by {method}); give the original")
    try:
        config = known[kind].from_dict(content)
    except Exception as error:
        raise ModelError(f"{folder / 'config.json'} is no valid configuration: {error}") from error
    config.dtype = torch.float32
    return config


def architecture_of(config: Any) -> Any:
    """Return the class that config.json names, or the language model of its family."""
    for name in config.architectures or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for family in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if type(config) in family:
            return family[type(config)]
    raise UnsupportedError(f"transformers has no model for the configuration {config.model_type}")


def check_depth(config: Any, tensors: int, source: Path) -> None:
    """Refuse a configuration of more layers than there are stored tensors, before building it."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > tensors:
        raise ModelError(f"{source} announces {layers} layers, but holds {tensors} tensors")


class SkipRandomValues(TorchDispatchMode):
    """Leave tensors as they are where initialisation would draw random numbers."""

    SKIPPED = frozenset({torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self.SKIPPED else func(*args, **(kwargs or {}))


def build_untouched(config: Any) -> Any:
    """Build the architecture in float32; large parameters stay virtual memory."""
    architecture = architecture_of(config)
    try:
        with SkipRandomValues():  # type: ignore[no-untyped-call]
            return architecture(config).eval()
    except Exception as error:
        raise ModelError(
            f"{architecture.__name__} cannot be built from config.json: {error}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting what qc reports itself."""
    messages = transformers.utils.logging
    verbosity, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(verbosity)
        if bars:
            messages.enable_progress_bar()


# ---------------------------------------------------------------- the weights


def match_names(model: nn.Module, tensors: Mapping[str, Stored]) -> dict[str, Stored] | None:
    """Return the stored tensor of each parameter, by every name of it; None where names or
    shapes do not match one to one, so that transformers has to translate."""
    aliases: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    stored: dict[str, Stored] = {}
    for names in aliases.values():
        found = next((tensors[name] for name in names if name in tensors), None)
        if found is None or tuple(found.shape) != tuple(parameters[names[0]].shape):
            return None
        if not found.dtype.is_floating_point:
            return None
        stored.update(dict.fromkeys(names, found))
    return stored


def fill_buffers(model: nn.Module, tensors: Mapping[str, MappedTensor]) -> None:
    """Copy the buffers that the checkpoint holds."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, buffer in named_tensors(model).items():
        found = tensors.get(name)
        if found is not None and name not in parameters and found.shape == tuple(buffer.shape):
            buffer.copy_(found.open())


def load(folder: Path, architecture: Any) -> Any:
    """Let transformers load a checkpoint whose names differ from the model's."""
    try:
        model, report = architecture.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:
        raise ModelError(f"transformers cannot load {folder}: {first_line(error)}") from error
    if report["missing_keys"]:
        missing = min(report["missing_keys"])
        raise ModelError(f"{folder} lacks weights of the model, such as {missing}")
    return model.eval()


def read_generation_config(folder: Path) -> Any:
    """Read generation_config.json, if there is one."""
    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return transformers.GenerationConfig.from_dict(read_json(folder / "generation_config.json"))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder / 'generation_config.json'} is not valid: {error}") from error


def first_line(error: Exception) -> str:
    """Return the first line of a message."""
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))
