"""The linears that a transform changes, and how one comes to read another input."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from qc.ir import ops
from qc.ir.device import CPU, computing_on, here
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.weights.dense import dense_weight

LEAST_BITS = 16
"""Weights below are quantized already, and a change would round them again."""


def targeted(graph: Graph, targets: str) -> Iterator[Node]:
    """Yield the linears of a floating-point input and a stored weight of 16 bits or more in whose
    module path the regular expression `targets` is found."""
    pattern = re.compile(targets)
    for node in graph.nodes:
        if not isinstance(node.op, ops.Linear) or not pattern.search(node.origin.module):
            continue
        x, parameter = node.inputs[0], node.inputs[1].op
        if x.tensor.format is not None or not isinstance(parameter, ops.Parameter):
            continue
        if parameter.weight.bits_per_element >= LEAST_BITS:
            yield node


def values_of(linear: Node) -> Tensor:
    """Return the weight of a linear, float32[out, in], on the device that computes."""
    parameter = linear.inputs[1].op
    assert isinstance(parameter, ops.Parameter)
    place = here()
    with computing_on(CPU):  # where weights are stored
        return parameter.weight.dense().float().to(place)


def parameter_name(linear: Node) -> str:
    """Return the name of the weight of a linear."""
    parameter = linear.inputs[1].op
    assert isinstance(parameter, ops.Parameter)
    return parameter.weight.name


def storing(parameter: Node, values: Tensor) -> Node:
    """Return a parameter of the same name with other values, in float32: a 16-bit dtype would
    round them."""
    assert isinstance(parameter.op, ops.Parameter)
    weight = dense_weight(parameter.op.weight.name, values.float().contiguous())
    return make(ops.Parameter(weight), origin=parameter.origin)


def storing_as(parameter: Node, values: Tensor) -> Node:
    """Return a parameter of the same name and dtype with other values."""
    assert isinstance(parameter.op, ops.Parameter)
    weight = parameter.op.weight
    changed = dense_weight(weight.name, values.to(weight.dtype).contiguous())
    return make(ops.Parameter(changed), origin=parameter.origin)


def reading(linear: Node, x: Node, weight: Node, name: str) -> Node:
    """Return a linear like this one of another input and weight; `name` is noted as its origin."""
    origin = linear.origin.touched_by(name)
    return make(linear.op, x, weight, *linear.inputs[2:], origin=origin)
