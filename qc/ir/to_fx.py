"""A graph as a torch.fx.GraphModule: for autograd, torch.compile and every tool that reads FX.

Inputs are placeholders by label; a symbol that no input's shape gives (`keep`) is one more, an
int, behind them. Weights stored densely are parameters, copied so that training leaves the graph
as it is; others are buffers with their decoded values. The module returns a dict of its outputs.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache, reduce
from typing import Any

import sympy
from torch import Tensor, fx, nn
from torch.utils._sympy.functions import FloorDiv

from qc.ir import ops
from qc.ir.fused import Fused
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.op import Op
from qc.ir.quantized import QuantizedTensor, quantize_activation
from qc.ir.types import ActivationFormat, Dim
from qc.ir.weights.dense import DenseFormat
from qc.ir.weights.weight import Weight

ARITHMETIC = {sympy.Add: operator.add, sympy.Mul: operator.mul}


def to_fx(graph: Graph) -> fx.GraphModule:
    """Return a module that computes what the graph means."""
    return Translation(graph).module()


class Translation:
    """One run of `to_fx`: the FX graph so far, and what it holds."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.fx = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self.dims: dict[Dim, Any] = {}

    def module(self) -> fx.GraphModule:
        """Translate everything."""
        env: dict[Node, Any] = {}
        for node in self.graph.inputs:
            assert isinstance(node.op, ops.Input)
            env[node] = self.fx.placeholder(identifier(node.op.label))
        self.bind_symbols(env)
        for node in self.graph.nodes:
            if node not in env:
                env[node] = self.translate(node, tuple(env[i] for i in node.inputs))
        pairs = zip(self.graph.output_names, self.graph.outputs, strict=True)
        self.fx.output({name: env[node] for name, node in pairs})
        return fx.GraphModule(self.tensors, self.fx)

    def bind_symbols(self, inputs: dict[Node, Any]) -> None:
        """Read each symbol off a shape that shows it; make the others placeholders."""
        shown: dict[sympy.Symbol, tuple[Any, int]] = {}
        for node, value in inputs.items():
            for axis, dim in enumerate(node.tensor.shape):
                if isinstance(dim, sympy.Symbol):
                    shown.setdefault(dim, (value, axis))
        used = {dim for node in self.graph.nodes for dim in symbols_of(node.op)}
        for dim in sorted(used - shown.keys(), key=str):
            self.dims[dim] = self.fx.placeholder(identifier(str(dim)))
        for dim, place in shown.items():
            if dim in used:
                self.dims[dim] = self.fx.call_method("size", place)

    def translate(self, node: Node, inputs: tuple[Any, ...]) -> Any:
        """Return the FX value of one node."""
        op = node.op
        if isinstance(op, Fused):
            return self.inline(op.body, inputs)
        if isinstance(op, ops.Parameter):
            value = self.parameter(op.weight)
        elif isinstance(op, ops.Item):
            value = self.fx.call_function(operator.getitem, (*inputs, op.index))
        elif isinstance(op, ops.Torch):
            args = tuple(self.fill(each, inputs) for each in op.args)
            kwargs = {name: self.fill(each, inputs) for name, each in op.kwargs}
            value = self.fx.call_function(op.operator, args, kwargs)
        else:
            attributes = {name: self.fill(each, ()) for name, each in attributes_of(op)}
            cls: Any = type(op)  # not type[Op], which the type checker takes to be unhashable
            value = self.fx.call_function(function_of(cls), inputs, attributes)
        value.meta["origin"] = str(node.origin)
        return value

    def inline(self, body: Graph, inputs: tuple[Any, ...]) -> Any:
        """Translate the nodes of a fused body in place."""
        env = dict(zip(body.inputs, inputs, strict=True))
        for node in body.nodes:
            if node not in env:
                env[node] = self.translate(node, tuple(env[i] for i in node.inputs))
        return env[body.outputs[0]]

    def parameter(self, weight: Weight) -> fx.Node:
        """Hold a weight under its name."""
        name, number = weight.name, 1
        while name in self.tensors:
            number += 1
            name = f"{weight.name}_{number}"
        values = weight.dense()
        is_dense = weight.format.terms == (DenseFormat(weight.dtype),)
        trainable = is_dense and values.is_floating_point()
        self.tensors[name] = nn.Parameter(values.clone()) if trainable else values
        return self.fx.create_node("get_attr", name)

    def fill(self, template: Any, inputs: tuple[Any, ...]) -> Any:
        """Put FX values into an attribute or an argument template."""
        if isinstance(template, ops.Operand):
            return inputs[template.index]
        if isinstance(template, tuple | list):
            return tuple(self.fill(each, inputs) for each in template)
        return self.size(template) if isinstance(template, sympy.Expr) else template

    def size(self, dim: Dim) -> Any:
        """Compute a dimension from the symbols, once."""
        if isinstance(dim, int) or dim.is_Integer:
            return int(dim)
        if dim not in self.dims:
            self.dims[dim] = self.compute_size(dim)
        return self.dims[dim]

    def compute_size(self, dim: sympy.Expr) -> fx.Node:
        """Emit the arithmetic of one expression."""
        parts = [self.size(each) for each in dim.args]
        if dim.func in ARITHMETIC:
            join = ARITHMETIC[dim.func]
            joined: fx.Node = reduce(lambda a, b: self.fx.call_function(join, (a, b)), parts)
            return joined
        two_sided = {sympy.Pow: operator.pow, FloorDiv: operator.floordiv}
        return self.fx.call_function(two_sided[dim.func], tuple(parts))


def symbols_of(op: Op) -> Iterator[sympy.Symbol]:
    """Yield the symbols that computing `op` needs."""
    if isinstance(op, Fused):
        for node in op.body.nodes:
            yield from symbols_of(node.op)
    elif not isinstance(op, ops.Input | ops.Parameter):
        held = (op.args, op.kwargs) if isinstance(op, ops.Torch) else dict(attributes_of(op))
        yield from symbols_in(held)


def symbols_in(value: Any) -> Iterator[sympy.Symbol]:
    """Yield the symbols of all dimensions in nested values."""
    if isinstance(value, sympy.Expr):
        yield from value.free_symbols
    elif isinstance(value, tuple | list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from symbols_in(each)


def identifier(label: str) -> str:
    """Make a Python name of a label."""
    return re.sub(r"\W", "_", label)


def attributes_of(op: Op) -> list[tuple[str, Any]]:
    """Return the fields of an op by name; FX knows no dataclasses, so formats are spread."""
    if isinstance(op, ops.Quantize | ops.FakeQuantize):
        return [(each.name, getattr(op.format, each.name)) for each in fields(op.format)]
    return [(each.name, getattr(op, each.name)) for each in fields(op)]


def quantize(x: Tensor, *, bits: int, group: int | None, kind: str) -> QuantizedTensor:
    """Compute what `Quantize` means."""
    return quantize_activation(x, ActivationFormat(bits, group, kind))


def fake_quantize(x: Tensor, *, bits: int, group: int | None, kind: str) -> Tensor:
    """Compute what `FakeQuantize` means."""
    return quantize(x, bits=bits, group=group, kind=kind).dequantize()


@cache
def function_of(cls: Any) -> Callable[..., Any]:
    """Return a function that computes what an op means, under the op's name."""
    if cls is ops.Quantize:
        return quantize
    if cls is ops.FakeQuantize:
        return fake_quantize

    def compute(*values: Any, **attributes: Any) -> Any:
        return cls(**attributes).meaning(*values, sizes={})

    compute.__name__ = compute.__qualname__ = cls.name
    compute.__module__ = "qc.ir.ops"
    return compute
