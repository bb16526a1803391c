"""Appending to a KV cache, in place; and rotary position embedding, alone or on the way there."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from qc.backends.region import RESULT, Region
from qc.backends.tvm.function import Function, build, for_each, integer, known_product, pieces, span
from qc.backends.tvm.kernel import Kernel, KernelRule
from qc.backends.tvm.linear.vectors import multiply_add
from qc.backends.tvm.vector_math import TVM_NAMES, bind, convert
from qc.errors import UnsupportedError
from qc.ir import ops
from qc.ir.fused import Fused
from qc.ir.node import Node
from qc.ir.target import Target
from qc.ir.types import Dim, element_count, symbol

PrimExpr = Any
Read = Callable[[int, int], PrimExpr]
"""(offset, width) -> that many float32 values of a row."""


def is_cache(node: Node) -> bool:
    """Say whether a value is a cache that has just been appended to: its buffer is longer than
    the value, `context` positions a batch."""
    op = node.op.body.outputs[0].op if isinstance(node.op, Fused) else node.op
    return isinstance(op, ops.Append)


def cache_shape(node: Node) -> tuple[Dim, ...]:
    """Return the shape of the buffer of a cache."""
    batch, _, heads, dim = node.tensor.shape
    return (batch, symbol("context"), heads, dim)


def inner_nodes(region: Region) -> list[Node]:
    """Return what a body computes."""
    return [n for n in region.body.nodes if not isinstance(n.op, ops.Input)]


def reader(buffer: Any, base: PrimExpr) -> Read:
    """Read a row of a flat buffer as float32."""
    return lambda offset, width: convert(buffer[span(base + integer(offset), width)], "float32")


def rotated(x: Read, cos: Read, sin: Read, rotary: int, target: Target) -> Read:
    """Rotate the first `rotary` channels of a row: channel i with channel i + rotary / 2.

    Pieces that are read must not cross rotary / 2 or rotary.
    """
    half = rotary // 2

    def read(offset: int, width: int) -> PrimExpr:
        if offset >= rotary:
            return x(offset, width)
        turned = x(offset, width) * cos(offset, width)
        if offset < half:
            return multiply_add(-x(offset + half, width), sin(offset, width), turned, target)
        return multiply_add(x(offset - half, width), sin(offset, width), turned, target)

    return read


def row_pieces(size: int, rotary: int, lanes: int) -> list[tuple[int, int]]:
    """Cut a row so that no piece crosses a border of the rotation."""
    half = rotary // 2
    borders = [0, half, rotary, size]
    return [
        (start + offset, width)
        for start, stop in pairwise(borders)
        for offset, width in pieces(stop - start, lanes)
    ]


def rope_of(node: Node) -> tuple[Node, Node, Node] | None:
    """Return x, cos, sin where `node` is a rotation of body inputs that pairs channels evenly."""
    if not isinstance(node.op, ops.Rope):
        return None
    x, cos, sin = node.inputs
    rotary = cos.tensor.shape[2]
    leaves = all(isinstance(i.op, ops.Input) for i in node.inputs)
    if not leaves or not isinstance(rotary, int) or rotary % 2:
        return None
    return x, cos, sin


def row_reader(
    function: Function, node: Node, batch: PrimExpr, seq: PrimExpr, head: PrimExpr
) -> tuple[Read, int]:
    """Return a reader of row (batch, seq, head) of a value [batch, seq, heads, dim], rotated where
    the node is a rotation, and the number of rotated channels."""
    rope = rope_of(node)
    x = node if rope is None else rope[0]
    _, length, heads, dim = (function.dim(d) for d in x.tensor.shape)
    base = bind(((batch * length + seq) * heads + head) * dim)
    plain = reader(function.buffers[x], base)
    if rope is None:
        return plain, 0
    _, cos, sin = rope
    rotary = cos.tensor.shape[2]
    assert isinstance(rotary, int)
    tables = []
    for table in (cos, sin):
        row = seq if table.tensor.shape[0] == 1 else batch * length + seq
        tables.append(reader(function.buffers[table], bind(row * integer(rotary))))
    return rotated(plain, tables[0], tables[1], rotary, function.region.target), rotary


def for_each_row(function: Function, node: Node, body: Callable[..., None]) -> None:
    """Visit every row (batch, seq, head) of a value [batch, seq, heads, dim]."""
    shape = node.tensor.shape
    rows, dim = element_count(shape[:3]), int(shape[3])
    length, heads = function.dim(shape[1]), function.dim(shape[2])

    def row(i: PrimExpr) -> None:
        head = bind(tirx.truncmod(i, heads))
        token = bind(tirx.truncdiv(i, heads))
        body(bind(tirx.truncdiv(token, length)), bind(tirx.truncmod(token, length)), head)

    known = known_product(shape[:3])
    for_each(function.dim(rows) if known is None else known, 4 * dim, row)


def write_rows(
    function: Function, node: Node, target: Any, position: Callable[..., list[PrimExpr]]
) -> None:
    """Copy all rows of `node` to `target` at [*position(batch, seq, head), channel]."""
    dim = int(node.tensor.shape[3])
    element = str(target.dtype)

    def row(batch: PrimExpr, seq: PrimExpr, head: PrimExpr) -> None:
        read, rotary = row_reader(function, node, batch, seq, head)
        *axes, base = position(batch, seq, head)
        for offset, width in row_pieces(dim, rotary, function.lanes):
            value = convert(read(offset, width), element)
            T.buffer_store(target, value, [*axes, span(base + integer(offset), width)])

    for_each_row(function, node, row)


def is_plain_or_rope(node: Node) -> bool:
    """Say whether a value is a body input or a rotation of body inputs."""
    return isinstance(node.op, ops.Input) or rope_of(node) is not None


def append(region: Region) -> Kernel | None:
    """Append(past, new) or Append(past, Rope(new, cos, sin)), into the buffer of past."""
    root = region.root
    if not isinstance(root.op, ops.Append) or len(inner_nodes(region)) > 2:
        return None
    past, new = root.inputs
    if past.tensor.format is not None:
        raise UnsupportedError(
            "keys and values are kept as codes by GPU kernels alone; on CPUs a cache is float16 or "
            "float32"
        )
    if not isinstance(past.op, ops.Input) or not is_plain_or_rope(new):
        return None
    if not isinstance(new.tensor.shape[3], int):
        return None

    def emit(function: Function) -> None:
        for node in region.body.inputs:
            if node is not past:
                function.declare_input(node)
        name = TVM_NAMES[past.tensor.dtype]
        cache = function.declare(RESULT, "values", name, cache_shape(root))
        offset = function.dim(past.tensor.shape[1])
        write_rows(function, new, cache, lambda b, s, h: [b, offset + s, h, integer(0)])

    in_place = region.body.inputs.index(past)
    return build("append", region, emit, more_sizes=("context",), in_place=in_place)


def rope(region: Region) -> Kernel | None:
    """Rope(x, cos, sin) alone."""
    root = region.root
    if not isinstance(root.op, ops.Rope) or rope_of(root) is None:
        return None
    if not isinstance(root.tensor.shape[3], int):
        return None

    def emit(function: Function) -> None:
        function.declare_inputs()
        result = function.declare_result()
        _, length, heads, dim = (function.dim(d) for d in root.tensor.shape)
        write_rows(
            function, root, result,
            lambda b, s, h: [bind(((b * length + s) * heads + h) * dim)],
        )  # fmt: skip

    return build("rope", region, emit)


append_rules: tuple[KernelRule, ...] = (append, rope)
