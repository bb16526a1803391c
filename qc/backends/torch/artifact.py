"""Write and read artifacts of the reference backend: graph.json beside the stored arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qc.backends.artifact import (
    ArtifactFacts,
    Progress,
    dim_text,
    generation_facts,
    tokenizer_files,
)
from qc.backends.torch.executor import TorchProgram, as_array, cache_names, held_as
from qc.errors import ArtifactError
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.serialize import graph_from_json, graph_to_json
from qc.ir.types import DTYPE_NAMES, Dim
from qc.runtime.artifact import Artifact, open_artifact, read_manifest
from qc.runtime.expression import parse_expression
from qc.runtime.manifest import (
    CONTEXT,
    TORCH,
    WEIGHTS,
    Generate,
    Kind,
    Manifest,
    TargetFacts,
    Value,
)
from qc.runtime.package import ArtifactWriter
from qc.runtime.safetensors_file import SafetensorsFile, TensorSource
from qc.runtime.strict_json import parse_object

GRAPH = "graph.json"


# ---------------------------------------------------------------- writing


def write_torch_artifact(
    graph: Graph, facts: ArtifactFacts, path: Path, progress: Progress
) -> None:
    """Write a quantized graph as it is; nothing is left at `path` where a step fails."""
    with ArtifactWriter(path) as writer:
        content, arrays = graph_to_json(graph)
        writer.add(GRAPH, json.dumps(content, ensure_ascii=False, allow_nan=False).encode())
        writer.add_weights(dict(tensor_sources(arrays, progress)))
        tokenizer = tokenizer_files(facts.tokenizer)
        for name, each in tokenizer.items():
            writer.add(name, each)
        for name, text in facts.texts.items():
            writer.add(name, text.encode())
        writer.finish(manifest_of(graph, facts, bool(tokenizer)))


def tensor_sources(
    arrays: Mapping[str, Tensor], progress: Progress
) -> Iterator[tuple[str, TensorSource]]:
    """Promise every stored array."""
    for number, (name, tensor) in enumerate(arrays.items()):

        def load(tensor: Tensor = tensor, number: int = number) -> Any:
            progress("write weights", number / len(arrays))
            return as_array(tensor.detach().cpu().contiguous())

        yield name, TensorSource(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), load)


def manifest_of(graph: Graph, facts: ArtifactFacts, has_tokenizer: bool) -> Manifest:
    """Describe a graph as the native executor's manifests describe a program."""
    caches = cache_names(graph)
    inputs = [label_of(node) for node in graph.inputs if label_of(node) not in caches]
    outputs = [name for name in graph.output_names if name not in caches.values()]
    generate = generation_facts(inputs, outputs, facts.eos, facts.bos, len(caches))
    values = values_of(graph, generate, facts.context_length)
    texts = {dim for value in values for dim in value.shape}
    symbols = {symbol for text in texts for symbol in parse_expression(text).symbols}
    uninterpreted = [
        {"op": node.op.overload, "origin": node.origin.module}
        for node in graph.nodes
        if isinstance(node.op, ops.Torch)
    ]
    return Manifest(
        target=TargetFacts(facts.name, "any"),
        symbols=tuple(sorted(symbols)),
        values=values,
        steps=(),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        context_length=facts.context_length,
        generate=generate,
        report={**facts.report, "on_torch": uninterpreted},
        tokenizer=has_tokenizer,
        executor=TORCH,
    )


def values_of(
    graph: Graph, generate: Generate | None, context_length: int | None
) -> tuple[Value, ...]:
    """Declare what goes in, stays and comes out. A model that cannot generate, or whose context
    has no known length, keeps no state: each call starts with empty caches."""
    caches = cache_names(graph)
    values: list[Value] = []
    for node in graph.inputs:
        label, shape = label_of(node), node.tensor.shape
        if label not in caches:
            values.append(value_of(label, node, shape, "input", table_rows(graph, node)))
        elif generate is not None and context_length is not None:
            room = (dim_text(shape[0]), CONTEXT, *map(dim_text, shape[2:]))
            values.append(Value(label, DTYPE_NAMES[node.tensor.dtype], room, "state"))
    for name, node in zip(graph.output_names, graph.outputs, strict=True):
        if name not in caches.values():
            values.append(value_of(name, node, node.tensor.shape, "output"))
    return tuple(values)


def value_of(
    name: str, node: Node, shape: tuple[Dim, ...], kind: Kind, below: int | None = None
) -> Value:
    """Declare one value."""
    dims = tuple(dim_text(dim) for dim in shape)
    return Value(name, DTYPE_NAMES[node.tensor.dtype], dims, kind, below=below)


def label_of(node: Node) -> str:
    """Return the label of an input."""
    assert isinstance(node.op, ops.Input)
    return node.op.label


def table_rows(graph: Graph, ids: Node) -> int | None:
    """Return the bound below which ids must stay: the rows of the smallest table they index."""
    tables = [
        user.inputs[1].tensor.shape[0]
        for user in graph.users[ids]
        if isinstance(user.op, ops.Embedding) and user.inputs[0] is ids
    ]
    return min((rows for rows in tables if isinstance(rows, int)), default=None)


# ---------------------------------------------------------------- reading


def load_torch_artifact(path: Path, *, verify: bool = False, temporary: bool = False) -> Artifact:
    """Load an artifact of this backend. Raises ArtifactError."""
    return open_artifact(
        path, read_manifest(path), open_program, verify=verify, temporary=temporary
    )


def open_program(folder: Path, manifest: Manifest) -> TorchProgram:
    """Read the graph and map its arrays."""
    return TorchProgram(manifest, read_graph(folder, manifest))


def read_graph(folder: Path, manifest: Manifest) -> Graph:
    """Read the graph and map its arrays; the manifest must be the graph's."""
    for name in (GRAPH, WEIGHTS):
        if name not in manifest.files:
            raise ArtifactError(f"the manifest lists no {name}, which the model needs")
    content = parse_object((folder / GRAPH).read_bytes(), GRAPH)
    graph = graph_from_json(content, stored_tensors(folder / WEIGHTS))
    if manifest.values != values_of(graph, manifest.generate, manifest.context_length):
        raise ArtifactError(f"{folder}: the manifest does not describe the model of {GRAPH}")
    return graph


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file; nothing is read before it is used."""
    file = SafetensorsFile(path)
    tensors = {name: torch.from_numpy(array) for name, array in file.items()}
    for name, entry in file.entries.items():
        if entry.dtype.name == "bf16":
            tensors[name] = held_as(tensors[name], torch.bfloat16)
    return tensors
