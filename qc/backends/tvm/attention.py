"""Attention over plain values or KV caches: matching, and the choice between two kernels.

Few queries: `attention_decode`, split over the positions. Many: `attention_prefill`, in blocks of
queries. The length decides at run time where it is a symbol.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from qc.backends.region import Region
from qc.backends.tvm.append import (
    Read,
    cache_shape,
    inner_nodes,
    is_cache,
    is_plain_or_rope,
    reader,
    rope_of,
    row_reader,
)
from qc.backends.tvm.function import Function, build, integer, span
from qc.backends.tvm.kernel import Kernel, KernelRule
from qc.backends.tvm.vector_math import TVM_NAMES, convert, spread
from qc.ir import ops
from qc.ir.node import Node
from qc.ir.types import Dim, as_dim

PrimExpr = Any

# The block kernel computes at least 48 query rows at a time; below this many positions most of
# them would be padding.
LEAST_BLOCK_QUERIES = 8

LOWEST = -3.4028234663852886e38
"""What a hidden score is: finite, for -inf - -inf would be NaN."""


@dataclass(frozen=True)
class Problem:
    """One attention: its operands in the function being written, and its sizes."""

    function: Function
    op: ops.Attention
    q: Node
    k: Node
    v: Node
    mask: Node | None
    result: Any

    @property
    def batch(self) -> PrimExpr:
        return self.function.dim(self.q.tensor.shape[0])

    @property
    def seq(self) -> PrimExpr:
        return self.function.dim(self.q.tensor.shape[1])

    @property
    def total(self) -> PrimExpr:
        return self.function.dim(self.k.tensor.shape[1])

    @property
    def offset(self) -> PrimExpr:
        """The position of the first query."""
        return self.function.dim(as_dim(self.k.tensor.shape[1] - self.q.tensor.shape[1]))

    @property
    def heads(self) -> int:
        return int(self.q.tensor.shape[2])

    @property
    def kv_heads(self) -> int:
        return int(self.k.tensor.shape[2])

    @property
    def group(self) -> int:
        """The query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def dim(self) -> int:
        return int(self.q.tensor.shape[3])

    @property
    def dim_v(self) -> int:
        return int(self.v.tensor.shape[3])

    @property
    def lanes(self) -> int:
        return self.function.lanes

    @property
    def dtype(self) -> str:
        return TVM_NAMES[self.function.region.root.tensor.dtype]

    def row(self, node: Node, batch: PrimExpr, position: PrimExpr, head: PrimExpr) -> Read:
        """Return a reader of one row of keys or values."""
        buffer = self.function.buffers[node]
        if len(buffer.shape) == 4:
            return lambda offset, width: convert(
                buffer[batch, position, head, span(integer(offset), width)], "float32"
            )
        _, total, heads, dim = (self.function.dim(d) for d in node.tensor.shape)
        return reader(buffer, ((batch * total + position) * heads + head) * dim)

    def query(self, batch: PrimExpr, seq: PrimExpr, head: PrimExpr) -> tuple[Read, int]:
        """Return a reader of a query row times the scale, and how many channels it rotates."""
        read, rotary = row_reader(self.function, self.q, batch, seq, head)
        scale = tirx.const(self.op.scale, "float32")
        return lambda offset, width: read(offset, width) * spread(scale, width), rotary

    def visible_from(self, query: PrimExpr) -> PrimExpr:
        """Return the first position that the query at position `query` sees."""
        if self.op.window is None:
            return integer(0)
        return tirx.max(query - integer(self.op.window - 1), integer(0))

    def visible_to(self, query: PrimExpr) -> PrimExpr:
        """Return the position after the last that the query at position `query` sees."""
        return query + integer(1) if self.op.causal else self.total

    def masked(
        self, score: PrimExpr, batch: PrimExpr, head: PrimExpr, query: PrimExpr, key: PrimExpr
    ) -> PrimExpr:
        """Apply the mask operand to one score."""
        assert self.mask is not None
        shape = self.mask.tensor.shape
        index = (batch, head, query, key)[4 - len(shape) :]
        offset = integer(0)
        for dim, coordinate in zip(shape, index, strict=True):
            offset = offset * self.function.dim(dim) + (integer(0) if dim == 1 else coordinate)
        found = self.function.buffers[self.mask][offset]
        if str(found.ty) == "bool":
            return tirx.Select(found, score, tirx.const(LOWEST, "float32"))
        return score + convert(found, "float32")


def attention(region: Region) -> Kernel | None:
    """Attention(q or Rope(q, cos, sin), k, v[, mask])."""
    # The two kernels are built on this file's Problem.
    from qc.backends.tvm.attention_decode import emit_decode
    from qc.backends.tvm.attention_prefill import emit_prefill

    root = region.root
    if not is_attention(region):
        return None
    assert isinstance(root.op, ops.Attention)
    q, k, v, *rest = root.inputs
    has_cache = any(is_cache(operand) for operand in region.operands)

    def emit(function: Function) -> None:
        for node, operand in zip(region.body.inputs, region.operands, strict=True):
            declare(function, node, operand)
        result = function.declare_result()
        assert isinstance(root.op, ops.Attention)
        problem = Problem(function, root.op, q, k, v, rest[0] if rest else None, result)
        length = q.tensor.shape[1]
        choose(length, problem.seq, lambda: emit_decode(problem), lambda: emit_prefill(problem))

    return build("attention", region, emit, more_sizes=("context",) if has_cache else ())


def choose(
    length: Dim, seq: PrimExpr, few: Callable[[], None], many: Callable[[], None]
) -> None:  # fmt: skip
    """Write the kernel for few or for many queries, or both under a condition."""
    if isinstance(length, int):
        (few if length < LEAST_BLOCK_QUERIES else many)()
        return
    with T.If(seq < integer(LEAST_BLOCK_QUERIES)):
        with T.Then():
            few()
        with T.Else():
            many()


def declare(function: Function, node: Node, operand: Node) -> None:
    """Declare one input: a cache with its capacity, everything else flat."""
    if not is_cache(operand):
        function.declare_input(node)
        return
    position = function.region.body.inputs.index(node)
    name = TVM_NAMES[node.tensor.dtype]
    function.buffers[node] = function.declare(position, "values", name, cache_shape(node))


def is_attention(region: Region) -> bool:
    """Say whether a body is what these kernels compute."""
    root = region.root
    if not isinstance(root.op, ops.Attention):
        return False
    q, k, v, *mask = root.inputs
    leaves = all(isinstance(n.op, ops.Input) for n in (k, v, *mask))
    extents = (*q.tensor.shape[2:], *k.tensor.shape[2:], *v.tensor.shape[2:])
    caches = {n for n, o in zip(region.body.inputs, region.operands, strict=True) if is_cache(o)}
    return (
        leaves
        and is_plain_or_rope(q)
        and len(inner_nodes(region)) == 1 + (rope_of(q) is not None)
        and all(isinstance(e, int) for e in extents)
        and caches <= {k, v}
    )


attention_rules: tuple[KernelRule, ...] = (attention,)
