"""Compute equal values once."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from qc.ir import ops
from qc.ir.graph import Graph, map_nodes
from qc.ir.node import Node
from qc.ir.rewrite import with_inputs

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
        stored = [(name, identity_of_tensor(t)) for name, t in op.weight.arrays().items()]
        return (str(op.weight.format), node.type, tuple(stored))
    exact = repr(op) if isinstance(op, ops.Scalar | ops.Full | ops.Torch) else None  # 1 is not 1.0
    return (op, exact, node.type, tuple(id(i) for i in node.inputs))


def identity_of_tensor(tensor: Tensor) -> object:
    """Identify a small tensor by its values, a large one by its memory."""
    shape = (tuple(tensor.shape), tensor.dtype)
    if tensor.numel() <= COMPARED_ELEMENTS:
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return (*shape, hashlib.sha256(raw).digest())
    return (*shape, tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride())


def draws_random(overload: str) -> bool:
    """Say whether two equal calls give different values."""
    namespace, packet, name = overload.split(".")
    function = getattr(getattr(getattr(torch.ops, namespace), packet), name)
    return torch.Tag.nondeterministic_seeded in function.tags
