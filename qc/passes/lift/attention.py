"""Lift attention that is written out, and strip keys and values that are only repeated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node, make
from qc.ir.rewrite import rewrite
from qc.ir.types import broadcast_shapes
from qc.passes.lift.algebra import either_order, factors, permuted, scalar_of, unary
from qc.passes.lift.rope import SWAP_HEADS_AND_POSITIONS
from qc.passes.pipeline import Context, Pass

HIDDEN = -1e30
"""Scores at most this large vanish in a softmax in float32, whatever the others are."""


@dataclass(frozen=True)
class LiftAttention(Pass):
    """Recognise attention over [batch, heads, seq, dim].

        softmax(c * tanh(scale * q @ k^T / c) + mask) @ v  -->  permute(attention(q', k', v', mask))
        attention(q, repeat(k), repeat(v))                 -->  attention(q, k, v)

    The soft cap and the mask may be missing; a mask may also be a `where`. Exact.
    Vaswani et al. 2017, section 3.2.1; soft cap: Gemma Team 2024, section 2; Ainslie et al. 2023.
    """

    name: ClassVar[str] = "lift_attention"

    def run(self, graph: Graph, context: Context) -> Graph:
        return rewrite(graph, RULES, self.name)


@dataclass(frozen=True)
class Scores:
    """What the scores before the softmax are made of; `keys` is [batch, heads, dim, total]."""

    query: Node
    keys: Node
    scale: float
    softcap: float | None = None
    mask: Node | None = None


def lift_attention(node: Node) -> Node | None:
    """softmax(scores) @ v --> permute(attention(permute(q), permute(k), permute(v)))"""
    if not isinstance(node.op, ops.MatMul) or node.tensor.rank != 4:
        return None
    weights, v = node.inputs
    if not isinstance(weights.op, ops.Softmax) or weights.op.axis != 3:
        return None
    found = masked_scores(weights.inputs[0])
    if found is None or not fits(found, v):
        return None
    q, v = (permuted(x, SWAP_HEADS_AND_POSITIONS) for x in (found.query, v))
    k = permuted(found.keys, (0, 3, 1, 2))
    op = ops.Attention(found.scale, softcap=found.softcap)
    mask = [] if found.mask is None else [found.mask]
    attention = make(op, q, k, v, *mask, origin=node.origin)
    return permuted(attention, SWAP_HEADS_AND_POSITIONS)


def fits(scores: Scores, v: Node) -> bool:
    """Say whether queries, keys and values have the same batch and heads, four axes each."""
    q, k, values = scores.query.tensor, scores.keys.tensor, v.tensor
    if not q.rank == k.rank == values.rank == 4 or not q.dtype == k.dtype == values.dtype:
        return False
    return q.shape[:2] == k.shape[:2] == values.shape[:2]


def masked_scores(node: Node) -> Scores | None:
    """Read scores with or without a mask."""
    plain = capped_scores(node)
    if plain is not None:
        return plain
    for scores, mask in candidates(node):
        found = capped_scores(scores)
        if found is not None and keeps_shape(mask, node):
            return Scores(found.query, found.keys, found.scale, found.softcap, mask)
    return None


def candidates(node: Node) -> list[tuple[Node, Node]]:
    """List what may be scores and mask: the sides of a sum, or of a choice."""
    if not isinstance(node.op, ops.Where):
        return list(either_order(node, "add"))
    condition, a, b = node.inputs
    if hides(b):
        return [(a, condition)]
    return [(b, make(ops.Unary("not"), condition))] if hides(a) else []


def hides(node: Node) -> bool:
    """Say whether `node` is a number that makes a score vanish."""
    value = scalar_of(node)
    return value is not None and value <= HIDDEN


def keeps_shape(mask: Node, scores: Node) -> bool:
    """Say whether the mask only broadcasts to the scores."""
    shape = scores.tensor.shape
    return broadcast_shapes(mask.tensor.shape, shape) == shape


def capped_scores(node: Node) -> Scores | None:
    """Read c * tanh(scores / c), or scores without a cap."""
    cap, rest = factors(node)
    capped = unary(rest[0], "tanh") if len(rest) == 1 else None
    if capped is None:
        return scaled_scores(node)
    found = scaled_scores(capped)
    if found is None or cap <= 0:
        return None
    return Scores(found.query, found.keys, found.scale * cap, cap)


def scaled_scores(node: Node) -> Scores | None:
    """Read scale * (q @ k^T)."""
    scale, rest = factors(node)
    if len(rest) != 1 or not isinstance(rest[0].op, ops.MatMul):
        return None
    return Scores(rest[0].inputs[0], rest[0].inputs[1], scale)


# ---------------------------------------------------------------- grouped heads


def strip_repeated_heads(node: Node) -> Node | None:
    """attention(q, repeat(k), repeat(v)) --> attention(q, k, v)"""
    if not isinstance(node.op, ops.Attention):
        return None
    q, k, v, *mask = node.inputs
    single_k, single_v = unrepeated(k), unrepeated(v)
    if single_k is None or single_v is None:
        return None
    if single_k.tensor.shape[:3] != single_v.tensor.shape[:3]:
        return None
    return make(node.op, q, single_k, single_v, *mask, origin=node.origin)


def unrepeated(node: Node) -> Node | None:
    """Return x [batch, total, kv_heads, dim] where `node` repeats each of its heads in place."""
    if isinstance(node.op, ops.Permute) and node.op.order == SWAP_HEADS_AND_POSITIONS:
        x = unrepeated_axis(node.inputs[0], 1)
        return None if x is None else permuted(x, SWAP_HEADS_AND_POSITIONS)
    return unrepeated_axis(node, 2)


def unrepeated_axis(node: Node, axis: int) -> Node | None:
    """Return x where `node` is reshape(expand(reshape(x))) and repeats along `axis`."""
    if not isinstance(node.op, ops.Reshape) or not isinstance(node.inputs[0].op, ops.Expand):
        return None
    expanded = node.inputs[0]
    source = expanded.inputs[0]
    shape, single = expanded.tensor.shape, source.tensor.shape
    if len(shape) != 5 or len(single) != 5 or single[axis + 1] != 1:
        return None
    around = (*single[: axis + 1], *single[axis + 2 :])
    if (*shape[: axis + 1], *shape[axis + 2 :]) != around:
        return None
    heads = shape[axis] * shape[axis + 1]
    if node.tensor.shape != (*around[:axis], heads, *around[axis + 1 :]):
        return None
    if isinstance(source.op, ops.Reshape) and source.inputs[0].tensor.shape == around:
        return source.inputs[0]
    return make(ops.Reshape(around), source)


RULES = (lift_attention, strip_repeated_heads)
