"""Time whole decode steps of models of known shapes with random weights: a program of the GPU
backend, which the runtime replays as one CUDA graph, beside the same model in torch's bfloat16.

No checkpoint is needed: torch.export captures the model without reading its weights, and stored
values are drawn on their way to the GPU.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import qc
from qc.backends.artifact import ArtifactFacts
from qc.backends.triton.artifact import code_of, manifest_of
from qc.backends.triton.compile import compile_launch
from qc.backends.triton.golden import Golden
from qc.backends.triton.kernel import Cubin, Launch
from qc.backends.triton.lower import lower
from qc.backends.triton.rules import GPU_RULES
from qc.ir.target import parse_machine
from qc.passes.pipeline import Context
from qc.passes.plan import plan
from qc.passes.preview import preview
from qc.runtime.artifact import Artifact
from qc.runtime.cuda.executor import TURNS, CudaProgram
from qc.runtime.dtypes import DTYPES
from qc.runtime.manifest import Manifest, Value
from qc.runtime.package import ArtifactWriter
from qc.stages import resolve_recipe

CONTEXT = 512
PAST = 128
"""Tokens in front of those that are timed."""
STEPS = 64


@dataclass(frozen=True)
class Shape:
    """The sizes of a llama."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int

    def config(self) -> Any:
        """Return the configuration that transformers builds it from."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.width, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=self.dim,
            vocab_size=self.vocabulary, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
        )  # fmt: skip


SHAPES = (
    Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49152),
    Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256),
)


# ---------------------------------------------------------------- a program with random weights


def random_artifact(
    shape: Shape, recipe: str, weights: str | None, architecture: int, workers: int
) -> Artifact:
    """Compile a model of a shape for the GPU, without ever computing its weights."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config()).eval()
    captured = qc.trace(with_unread_weights(model, shape))
    canonical = captured.canonicalize()
    machine = parse_machine(f"cuda:sm_{architecture}")
    quantized = preview(resolve_recipe(recipe, weights), canonical.graph).graph
    assert quantized is not None
    lowered = lower(plan(machine).run(quantized, Context(machine)), machine, GPU_RULES)
    compiled = compile_side_by_side(lowered.kernels, architecture, workers)
    folder = Path(tempfile.mkdtemp(prefix="qc-decode-"))
    with ArtifactWriter(folder / "model.qc") as writer:
        code, files = code_of(lowered.kernels, compiled)
        for name, content in files.items():
            writer.add(name, content)
        facts = ArtifactFacts(f"cuda:sm_{architecture}-{recipe}", context_length=CONTEXT)
        writer.finish(manifest_of(lowered, facts, False, code, Golden([], {})))
    manifest = Manifest.parse((folder / "model.qc" / "manifest.json").read_bytes())
    return Artifact(folder, CudaProgram(folder / "model.qc", manifest, random_weights(manifest)))


def with_unread_weights(model: Any, shape: Shape) -> Any:
    """Give a model on the meta device memory that is never written, and its rotary tables."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = model.to_empty(device="cpu")
    model.model.rotary_emb = LlamaRotaryEmbedding(shape.config())
    return model


def compile_side_by_side(
    kernels: dict[str, Launch], architecture: int, workers: int
) -> dict[str, dict[str, Cubin]]:
    """Compile all kernels."""
    items = [(launch, architecture) for launch in kernels.values()]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        cubins = list(pool.map(compile_one, items))
    return {n: {f"sm_{architecture}": c} for n, c in zip(kernels, cubins, strict=True)}


def compile_one(item: tuple[Launch, int]) -> Cubin:
    return compile_launch(*item)


def random_weights(manifest: Manifest) -> dict[str, np.ndarray[Any, Any]]:
    """Draw every stored array: bits for codes, small numbers for factors."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 256, 1 << 26, np.uint8)
    small = (random.standard_normal(1 << 22) / 50).astype(np.float32)
    weights = (value for value in manifest.values if value.kind == "weight")
    return {v.tensor or v.name: drawn(v, bits, small) for v in weights}


def drawn(value: Value, bits: Any, small: Any) -> np.ndarray[Any, Any]:
    """Repeat random values up to the size of an array."""
    shape, dtype = tuple(int(d) for d in value.shape), DTYPES[value.dtype].numpy
    if TURNS in value.name:
        return np.zeros(shape, dtype)
    if value.dtype.startswith("f"):
        return np.resize(small.astype(dtype), shape)
    if value.dtype == "bf16":
        return np.resize((small.view(np.uint32) >> 16).astype(np.uint16), shape)
    count = int(np.prod(shape)) * dtype.itemsize
    return np.resize(bits, count).view(dtype).reshape(shape)


def time_decode(artifact: Artifact, batch: int) -> float:
    """Return the median seconds of a decode step, all in: ids up, logits down."""
    session = artifact.session(batch=batch)
    session.reserve(CONTEXT)
    ids = np.random.default_rng(0).integers(0, 1000, (batch, PAST)).tolist()
    session.prefill(ids if batch > 1 else ids[0])
    taken = []
    for step in range(STEPS + 4):
        token = [step] * batch
        start = time.perf_counter()
        session.advance(token)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[4:])


# ---------------------------------------------------------------- torch in bfloat16


class TorchLlama:
    """The decode step in torch: plain operations, static caches, nothing that a graph cannot
    hold."""

    def __init__(self, shape: Shape, batch: int) -> None:
        self.shape, self.batch = shape, batch
        kv, width, inner = shape.kv_heads * shape.dim, shape.width, shape.inner
        queries = shape.heads * shape.dim
        make = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16) / 50  # noqa: E731
        self.table, self.head = make(shape.vocabulary, width), make(shape.vocabulary, width)
        self.layers = [
            (
                make(width), make(queries + 2 * kv, width), make(width, queries), make(width),
                make(2 * inner, width), make(width, inner),
                torch.zeros(2, batch, shape.kv_heads, CONTEXT, shape.dim, device="cuda",
                            dtype=torch.bfloat16),
            )
            for _ in range(shape.layers)
        ]  # fmt: skip
        self.ids = torch.zeros(batch, dtype=torch.long, device="cuda")
        self.position = torch.full((1,), PAST, dtype=torch.long, device="cuda")
        powers = torch.arange(0, shape.dim, 2, device="cuda") / shape.dim
        angles = torch.arange(CONTEXT, device="cuda")[:, None] * 10000.0 ** -powers[None]
        both = torch.cat([angles, angles], -1)
        self.cos, self.sin = both.cos().bfloat16(), both.sin().bfloat16()
        self.places = torch.arange(CONTEXT, device="cuda")

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """Normalise rows."""
        return functional.rms_norm(x, (self.shape.width,), gain, 1e-5)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate pairs of channels."""
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def step(self) -> Tensor:
        """Return the logits of the next token of every sequence."""
        shape, batch = self.shape, self.batch
        x = self.table[self.ids]
        cos, sin = self.cos[self.position], self.sin[self.position]
        visible = (self.places <= self.position)[None, None, None]
        sizes = (shape.heads, shape.kv_heads, shape.kv_heads)
        for gain, qkv, out, second_gain, up, down, cache in self.layers:
            heads = functional.linear(self.norm(x, gain), qkv).view(batch, -1, shape.dim)
            q, k, v = heads.split(sizes, 1)
            q, k = self.rotated(q, cos, sin), self.rotated(k, cos, sin)
            cache[0].index_copy_(2, self.position, k[:, :, None])
            cache[1].index_copy_(2, self.position, v[:, :, None])
            found = functional.scaled_dot_product_attention(
                q[:, :, None], cache[0], cache[1], attn_mask=visible, enable_gqa=True
            )
            x = x + functional.linear(found.reshape(batch, -1), out)
            gate, value = functional.linear(self.norm(x, second_gain), up).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * value, down)
        return functional.linear(x, self.head)


def time_eager(step: Callable[[], Any]) -> float:
    """Return the median seconds of a call."""
    for _ in range(3):
        step()
    taken = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def time_captured(step: Callable[[], Any]) -> float:
    """Return the median seconds of a call that is replayed as a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return time_eager(graph.replay)


def torch_rows(shape: Shape, batch: int, compiled: bool) -> Iterator[tuple[str, float]]:
    """Yield how long torch takes for a step, in several ways."""
    with torch.no_grad():
        model = TorchLlama(shape, batch)
        yield "torch bf16, eager", time_eager(model.step)
        yield "torch bf16, CUDA graph", time_captured(model.step)
        if compiled:
            step = torch.compile(model.step, fullgraph=True)
            yield "torch.compile bf16, CUDA graph", time_captured(step)
