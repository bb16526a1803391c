"""Finished weights on disk, so that a killed compilation goes on where it was.

One safetensors file a group of linears, written beside its place and renamed: a file is there whole
or not at all. The folder says of what compilation it is a part; another one is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qc.errors import ArtifactError
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.ops import Parameter
from qc.ir.types import DTYPE_NAMES, DTYPES_BY_NAME
from qc.ir.weights.notation import parse_weights
from qc.ir.weights.weight import Weight
from qc.passes.calibration.coverage import Coverage

FINGERPRINT = "fingerprint.json"
VERSION = 2
"""Raised by every change that gives other bits for the same fingerprint."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder of finished weights; `resume` says whether what is there may be used."""

    folder: Path
    resume: bool = False

    def opened(self, name: str, facts: Mapping[str, str]) -> Checkpoint:
        """Return the part of one pass, empty unless it is resumed; ArtifactError where what lies
        there is of another compilation."""
        place = self.folder / name
        written = {"version": str(VERSION), **facts}
        known = read_fingerprint(place)
        if not self.resume or known is None:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            replace_file(place / FINGERPRINT, json.dumps(written, indent=1).encode())
        elif known != written:
            wrong = next(k for k in {**known, **written} if known.get(k) != written.get(k))
            raise ArtifactError(
                f"cannot resume from {place}: it was begun with another {wrong} "
                f"({known.get(wrong)}, now {written.get(wrong)}); compile as before, "
                "or without --resume to begin anew"
            )
        return Checkpoint(place, self.resume)

    def read(
        self, parameters: Sequence[Node], coverage: dict[str, Coverage]
    ) -> dict[Node, Weight] | None:
        """Return the weights of a group, and note what they saw; None where it is not finished."""
        file = self.file(parameters)
        if not file.is_file():
            return None
        arrays = load_file(file)
        about = json.loads(bytes(arrays.pop("about").tolist()))
        found: dict[Node, Weight] = {}
        for number, (parameter, facts) in enumerate(zip(parameters, about, strict=True)):
            shape = tuple(facts["shape"])
            terms = tuple(
                format.term(shape, inside(arrays, f"{number}.{i}."))
                for i, format in enumerate(parse_weights(facts["format"]).terms)
            )
            dtype = DTYPES_BY_NAME[facts["dtype"]]
            found[parameter] = Weight(facts["name"], shape, terms, dtype)
            coverage[facts["name"]] = Coverage(facts["tokens"], facts["error"])
        return found

    def write(
        self,
        parameters: Sequence[Node],
        weights: Mapping[Node, Weight],
        coverage: Mapping[str, Coverage],
    ) -> None:
        """Keep the weights of a finished group."""
        about: list[dict[str, object]] = []
        arrays: dict[str, torch.Tensor] = {}
        for number, parameter in enumerate(parameters):
            weight = weights[parameter]
            seen = coverage[weight.name]
            about.append({
                "name": weight.name, "shape": list(weight.shape), "format": str(weight.format),
                "dtype": DTYPE_NAMES[weight.dtype],
                "tokens": seen.tokens, "error": seen.error,
            })  # fmt: skip
            arrays |= {f"{number}.{k}": a.contiguous() for k, a in weight.arrays().items()}
        text = json.dumps(about).encode()
        arrays["about"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        unfinished = self.file(parameters).with_suffix(".unfinished")
        save_file(arrays, unfinished)
        put_in_place(unfinished, self.file(parameters))

    def file(self, parameters: Sequence[Node]) -> Path:
        """Return where a group lies."""
        names = "\n".join(name_of(p) for p in parameters)
        return (
            self.folder / f"{hashlib.blake2b(names.encode(), digest_size=12).hexdigest()}.weights"
        )

    def remove(self) -> None:
        """Forget everything: the artifact is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def inside(arrays: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the arrays whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}


def name_of(parameter: Node) -> str:
    """Return the name of a stored tensor."""
    assert isinstance(parameter.op, Parameter)
    return parameter.op.weight.name


def read_fingerprint(place: Path) -> dict[str, str] | None:
    """Return what a folder says it is of; None where it says nothing."""
    try:
        known: dict[str, str] = json.loads((place / FINGERPRINT).read_text())
    except (OSError, ValueError):
        return None
    return known


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(content)
    put_in_place(unfinished, path)


def put_in_place(unfinished: Path, path: Path) -> None:
    """Rename a file when all of it is on disk."""
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def digest_graph(graph: Graph) -> str:
    """Return a fingerprint of a graph: its printed form and every stored byte."""
    found = hashlib.blake2b(str(graph).encode(), digest_size=16)
    for parameter in graph.parameters:
        assert isinstance(parameter.op, Parameter)
        for name, array in parameter.op.weight.arrays().items():
            found.update(name.encode())
            found.update(bytes_of(array))
    return found.hexdigest()


def digest_tensors(tensors: Sequence[torch.Tensor]) -> str:
    """Return a fingerprint of tensors."""
    found = hashlib.blake2b(digest_size=16)
    for each in tensors:
        found.update(str(tuple(each.shape)).encode())
        found.update(bytes_of(each))
    return found.hexdigest()


def bytes_of(array: torch.Tensor) -> memoryview:
    """Return the bytes of an array, without a copy where it is contiguous."""
    return array.contiguous().view(-1).view(torch.uint8).numpy().data
