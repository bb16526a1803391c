"""Compute equal values once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph, map_nodes
from qc.ir.node import Node
from qc.ir.rewrite import with_inputs
from qc.ir.weights.mapped import memory_of, place_of

COMPARED_ELEMENTS = 4096
"""Up to this size stored tensors are equal when their values are; larger ones when they are the
same memory, so that no weight matrix is read."""


def share(graph: Graph) -> Graph:
    """Make one node of all that apply the same op to the same operands."""
    first: dict[object, Node] = {}

    def transform(node: Node, inputs: tuple[Node, ...]) -> Node:
        current = with_inputs(node, inputs)
        key = identity_of(current)
        return current if key is None else first.setdefault(key, current)

    return map_nodes(graph, transform)


def identity_of(node: Node) -> object | None:
    """Return a key that nodes of equal value share; None for a value that is its own."""
    op = node.op
    if isinstance(op, ops.Input) or (isinstance(op, ops.Torch) and draws_random(op.overload)):
        return None
    if isinstance(op, ops.Parameter):
        stored = [
            (name, identity_of_array(term.stored, name))
            for term in op.weight.terms
            for name in term.stored
        ]
        return (str(op.weight.format), node.type, tuple(stored))
    exact = repr(op) if isinstance(op, ops.Scalar | ops.Full | ops.Torch) else None  # 1 is not 1.0
    return (op, exact, node.type, tuple(id(i) for i in node.inputs))


def identity_of_array(arrays: Mapping[str, Tensor], name: str) -> object:
    """Identify a small array by its values, a large one by its memory."""
    place = place_of(arrays, name)
    if prod(place.shape) > COMPARED_ELEMENTS:
        return memory_of(place)
    raw = arrays[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return (tuple(place.shape), place.dtype, hashlib.sha256(raw).digest())


def draws_random(overload: str) -> bool:
    """Say whether two equal calls give different values."""
    namespace, packet, name = overload.split(".")
    function = getattr(getattr(getattr(torch.ops, namespace), packet), name)
    return torch.Tag.nondeterministic_seeded in function.tags
