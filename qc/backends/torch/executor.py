"""Run a graph in the reference interpreter, behind the interface of the native executor.

State lives in the same memory as the native executor's: a call reads the first `past` positions
of each cache and writes those that it appended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph, topological_order
from qc.ir.meaning import bind_symbols, evaluate_nodes
from qc.ir.node import Node
from qc.runtime.executor import Binding, Executor, Program
from qc.runtime.expression import parse_expression
from qc.runtime.manifest import KernelStep, Manifest, Step, TorchStep


class TorchProgram(Program):
    """Hold a manifest and the graph that it describes."""

    def __init__(self, manifest: Manifest, graph: Graph) -> None:
        super().__init__(manifest, {}, None)
        self.graph = graph
        self.caches = cache_names(graph)

    @cached_property
    def parameters(self) -> dict[Node, Tensor]:
        """Every weight as the tensor it means: decoded in the first call, then kept."""
        return {node: node.op.meaning(sizes={}) for node in self.graph.parameters}

    def executor(self) -> TorchExecutor:
        return TorchExecutor(self)


class TorchExecutor(Executor):
    """Run a `TorchProgram` with its own state. One call at a time: `lock` is the caller's."""

    program: TorchProgram

    def bind(self, sizes: Mapping[str, int]) -> TorchBinding:
        """Return a call of these sizes."""
        state = self._state.arrays if self._state is not None else []
        return TorchBinding(self.program, sizes, state)


class TorchBinding(Binding):
    """One call of certain sizes: fill `inputs`, run, read `outputs`."""

    def __init__(
        self, program: TorchProgram, sizes: Mapping[str, int], state: Sequence[NDArray[Any]]
    ) -> None:
        # Nothing of the native tables is needed, so the base class is not initialised.
        self._program = program
        self._sizes = {name: size for name, size in sizes.items() if name != "context"}
        self._caches = dict(zip(program.caches, map(torch.from_numpy, state), strict=False))
        self.inputs = {name: self._empty(name) for name in program.manifest.inputs}
        self.outputs: dict[str, NDArray[Any]] = {}

    def _empty(self, name: str) -> NDArray[Any]:
        value = self._program.value(name)
        shape = tuple(parse_expression(dim)(self._sizes) for dim in value.shape)
        return np.zeros(shape, value.element.numpy)

    def run(self, past: int = 0, watch: Callable[[Node, Any], None] | None = None) -> None:
        """Evaluate the graph with `past` tokens in the caches. UnsupportedError where torch
        refuses."""
        graph, values = self._program.graph, self._values(past)
        sizes = bind_symbols(graph.inputs, values, self._sizes)
        known = self._program.parameters
        results = evaluate_nodes(graph.outputs, values, sizes, watch, known)
        named = dict(zip(graph.output_names, results, strict=True))
        for label, cache in self._caches.items():
            present = named[self._program.caches[label]]
            cache[:, past : present.shape[1]] = held_as(present[:, past:], cache.dtype)
        self.outputs = {name: as_array(named[name]) for name in self._program.manifest.outputs}

    def _values(self, past: int) -> dict[str, Tensor]:
        """Return the inputs of the graph: those of the call, and the caches up to `past`."""
        values: dict[str, Tensor] = {}
        for node in self._program.graph.inputs:
            assert isinstance(node.op, ops.Input)
            label, type = node.op.label, node.tensor
            if label in self.inputs:
                values[label] = held_as(torch.from_numpy(self.inputs[label]), type.dtype)
            elif label in self._caches:
                values[label] = held_as(self._caches[label][:, :past], type.dtype)
            else:  # a cache of a model that keeps no state
                shape = (self._sizes.get("batch", 1), 0, *type.shape[2:])
                values[label] = torch.zeros(shape, dtype=type.dtype)
        return values

    @property
    def steps(self) -> Sequence[Step]:
        """One step for each node, in the order in which they are computed."""
        order = topological_order(self._program.graph.outputs, stop=self._program.parameters)
        return [step_of(node) for node in order if node not in self._program.parameters]

    def profile(self, past: int = 0) -> NDArray[np.float64]:
        """Run like `run` and return the seconds that each step took."""
        moments = [perf_counter()]
        self.run(past, lambda node, value: moments.append(perf_counter()))
        return np.diff(np.array(moments))


def step_of(node: Node) -> Step:
    """Describe the computation of a node for profiles."""
    origin = node.origin.module
    if isinstance(node.op, ops.Torch):
        return TorchStep(node.op.overload, (), (), (), {}, origin)
    return KernelStep(node.op.name, (), (), (), origin)


def cache_names(graph: Graph) -> dict[str, str]:
    """Return the caches of a graph: label of the past -> name of the output that it becomes."""
    caches: dict[str, str] = {}
    for name, node in zip(graph.output_names, graph.outputs, strict=True):
        past = node.inputs[0].op if isinstance(node.op, ops.Append) else None
        if isinstance(past, ops.Input):
            caches[past.label] = name
    return caches


def held_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Read the same bits as `dtype`: numpy, which lacks bfloat16, holds it as uint16."""
    return tensor if tensor.dtype == dtype else tensor.contiguous().view(dtype)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor as numpy holds it."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.contiguous().view(torch.uint16)
    array: NDArray[Any] = tensor.numpy()
    return array
