"""Weights of a folder: memory-mapped safetensors, one file or several with an index. No pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qc.errors import ModelError
from qc.ir.weights.mapped import MappedTensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ModelError where the file is missing or is none."""
    if not path.is_file():
        raise ModelError(f"{path.parent} has no {path.name}, so it is no Hugging Face model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a folder; ModelError where one is missing."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return sharded_files(folder)
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        raise ModelError(
            f"{folder} has its weights in pickle files, which can run any code when they are "
            "read; convert them to safetensors (save_pretrained does)"
        )
    raise ModelError(f"{folder} has no weights: expected {SINGLE} or {INDEX}")


def sharded_files(folder: Path) -> list[Path]:
    """List the files that the index names."""
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{folder / INDEX} has no weight_map")
    files = []
    for name in sorted({str(shard) for shard in shards.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{folder / INDEX} names {name!r}, which is no safetensors file here")
        if not (folder / name).is_file():
            raise ModelError(f"{folder} lacks the shard {name} that its index names")
        files.append(folder / name)
    return files


TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Element types by their names in safetensors headers."""


def map_tensors(files: list[Path]) -> dict[str, MappedTensor]:
    """Find all tensors of safetensors files; nothing is read yet."""
    tensors: dict[str, MappedTensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                opened.keys()  # the library checks the whole header when it opens the file
            tensors |= places_in(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path} is no intact safetensors file: {error}") from error
    return tensors


def places_in(path: Path) -> dict[str, MappedTensor]:
    """Return where the tensors of an intact file lie."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - open as long as a tensor refers to it
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    unknown = {record["dtype"] for record in header.values()} - TYPES.keys()
    if unknown:
        raise ModelError(f"{path} holds tensors of {min(unknown)}, which qc does not read")
    return {
        name: MappedTensor(
            file,
            8 + length + record["data_offsets"][0],
            tuple(record["shape"]),
            TYPES[record["dtype"]],
        )
        for name, record in header.items()
    }
