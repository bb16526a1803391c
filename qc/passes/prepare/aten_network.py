"""ATen calls that are whole layers: products, norms, embeddings, convolutions, attention."""

from __future__ import annotations

import math
from functools import partial

import torch

from qc.ir import ops
from qc.ir.node import Node, make
from qc.ir.weights.dense import dense_term, dense_weight
from qc.ir.weights.weight import Weight
from qc.passes.prepare.aten_call import Builder, Call
from qc.passes.prepare.aten_elementwise import number


def linear(call: Call) -> Node:
    """`linear(x, %w, bias) --> linear(x, %w, bias)`; a computed weight makes it a product."""
    x = call.tensor("input")
    return times_matrix(call, x, call.tensor("weight"), call.optional("bias"))


def times_matrix(call: Call, x: Node, weight: Node, bias: list[Node]) -> Node:
    """Build x W^T + bias for W [out, in]: a linear where W is stored, a product elsewhere."""
    stored = stored_matrix(weight)
    if stored is not None and x.tensor.rank:
        return call.make(ops.Linear(), x, stored, *bias)
    turned = call.make(ops.Permute((1, 0)), weight)
    result = product(call, x, turned)
    return call.make(ops.Binary("add"), result, *bias) if bias else result


def stored_matrix(node: Node) -> Node | None:
    """Return the parameter that `node` is, or is the transpose of (stored as a view of it)."""
    if isinstance(node.op, ops.Parameter):
        return node
    if not (isinstance(node.op, ops.Permute) and node.op.order == (1, 0)):
        return None
    source = node.inputs[0].op
    if not isinstance(source, ops.Parameter):
        return None
    weight = source.weight
    if weight.bits_per_element < 16:  # only what was captured can be a view of itself
        return None
    turned = Weight(
        weight.name, weight.shape[::-1], (dense_term(weight.dense().t()),), weight.dtype
    )
    return make(ops.Parameter(turned))


def transposed(call: Call, node: Node) -> Node:
    """Swap the axes of a matrix; of a transposed one, take the swap back."""
    if isinstance(node.op, ops.Permute) and node.op.order == (1, 0):
        return node.inputs[0]
    return call.make(ops.Permute((1, 0)), node)


def matmul(call: Call, first: str = "self", second: str = "other") -> Node:
    """`matmul(x, permute(%w)) --> linear(x, %w)`, otherwise `--> matmul(x, y)`"""
    return matrix_product(call, call.tensor(first), call.tensor(second))


def matrix_product(call: Call, a: Node, b: Node) -> Node:
    """Multiply as torch.matmul does; by a stored matrix: a linear."""
    if b.tensor.rank == 2:
        turned = transposed(call, b)
        if stored_matrix(turned) is not None:
            return times_matrix(call, a, turned, [])
    return product(call, a, b)


def product(call: Call, a: Node, b: Node) -> Node:
    """Multiply with `MatMul`; vectors become matrices for it. Outer products, as rotary tables of
    older transformers, have no sums: `Binary`."""
    left = a if a.tensor.rank > 1 else call.reshape(a, (1, *a.tensor.shape))
    right = b if b.tensor.rank > 1 else call.reshape(b, (*b.tensor.shape, 1))
    outer = left.tensor.shape[-1] == right.tensor.shape[-2] == 1
    result = call.make(ops.Binary("mul") if outer else ops.MatMul(), left, right)
    shape = list(result.tensor.shape)
    if a.tensor.rank == 1:
        del shape[-2]
    if b.tensor.rank == 1:
        del shape[-1]
    return call.reshape(result, tuple(shape))


def addmm(call: Call, first: str = "mat1", second: str = "mat2") -> Node:
    """`addmm(bias, x, %w) --> linear(x, permute(%w), bias)`, otherwise a product and a sum."""
    bias, x, matrix = call.tensor("self"), call.tensor(first), call.tensor(second)
    plain = call["alpha"] == 1 and call["beta"] == 1
    if plain and matrix.tensor.rank == 2 and bias.tensor.shape == matrix.tensor.shape[1:]:
        turned = transposed(call, matrix)
        if stored_matrix(turned) is not None:
            return times_matrix(call, x, turned, [bias])
    result = scaled(call, matrix_product(call, x, matrix), call["alpha"])
    if call["beta"] == 0:
        return result
    return call.make(ops.Binary("add"), scaled(call, bias, call["beta"]), result)


def scaled(call: Call, x: Node, factor: float) -> Node:
    """Multiply by a number unless it is 1."""
    if factor == 1:
        return x
    return call.make(ops.Binary("mul"), x, call.make(number(factor, x.tensor.dtype)))


def constant_vector(value: float, like: Node) -> Node:
    """Make a stored vector of equal values over the last axis of `like`."""
    size = like.tensor.shape[-1]
    assert isinstance(size, int)
    name = "ones" if value else "zeros"
    return make(ops.Parameter(dense_weight(name, torch.full((size,), value))))


def layer_norm(call: Call) -> Node | None:
    """`layer_norm(x, [64], gain, bias) --> layer_norm(x, gain, bias)`"""
    x = call.tensor("input")
    if len(call["normalized_shape"]) != 1:
        return None
    gain = call.tensor("weight") if call.has("weight") else constant_vector(1.0, x)
    bias = call.tensor("bias") if call.has("bias") else constant_vector(0.0, x)
    return call.make(ops.LayerNorm(call["eps"]), x, gain, bias)


def rms_norm(call: Call) -> Node | None:
    """`rms_norm(x, [64], gain) --> rms_norm(x, gain)`"""
    x = call.tensor("input")
    if len(call["normalized_shape"]) != 1:
        return None
    gain = call.tensor("weight") if call.has("weight") else constant_vector(1.0, x)
    eps = torch.finfo(x.tensor.dtype).eps if call["eps"] is None else call["eps"]
    return call.make(ops.RMSNorm(eps), x, gain)


def embedding(call: Call) -> Node:
    """`embedding(table, ids) --> embedding(ids, table)`"""
    return call.make(ops.Embedding(), call.tensor("indices"), call.tensor("weight"))


def conv2d(call: Call) -> Node:
    """`conv2d(x, %w, bias, stride) --> conv2d(x, %w, bias)`"""
    stride, padding, dilation = (pair(call[n]) for n in ("stride", "padding", "dilation"))
    op = ops.Conv2d(stride, padding, dilation, call["groups"])
    return call.make(op, call.tensor("input"), call.tensor("weight"), *call.optional("bias"))


def pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Repeat a single size for both axes."""
    return (sizes[0], sizes[-1])


def attention(call: Call) -> Node | None:
    """`scaled_dot_product_attention(q, k, v, mask) --> permute(attention(permute(q), ...))`

    The IR counts a query's position from the end of the keys, torch from their start: `causal`
    means the same only where there are as many queries as keys.
    """
    q, k, v = (call.tensor(name) for name in ("query", "key", "value"))
    if call["dropout_p"] != 0 or not q.tensor.rank == k.tensor.rank == v.tensor.rank == 4:
        return None
    if q.tensor.shape[1] != k.tensor.shape[1] and not call["enable_gqa"]:
        return None
    if call["is_causal"] and q.tensor.shape[2] != k.tensor.shape[2]:
        return None
    size = q.tensor.shape[3]
    assert isinstance(size, int)
    scale = 1 / math.sqrt(size) if call["scale"] is None else float(call["scale"])
    turned = [call.make(ops.Permute((0, 2, 1, 3)), x) for x in (q, k, v)]
    op = ops.Attention(scale, causal=call["is_causal"])
    attended = call.make(op, *turned, *call.optional("attn_mask"))
    return call.make(ops.Permute((0, 2, 1, 3)), attended)


NETWORK: dict[str, Builder] = {
    "aten.linear.default": linear,
    "aten.matmul.default": matmul,
    "aten.mm.default": partial(matmul, second="mat2"),
    "aten.bmm.default": partial(matmul, second="mat2"),
    "aten.addmm.default": addmm,
    "aten.baddbmm.default": partial(addmm, first="batch1", second="batch2"),
    "aten.layer_norm.default": layer_norm,
    "aten.rms_norm.default": rms_norm,
    "aten.embedding.default": embedding,
    "aten.conv2d.default": conv2d,
    "aten.scaled_dot_product_attention.default": attention,
}
