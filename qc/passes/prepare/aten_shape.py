"""ATen calls that only move elements: views, slices, joins, and indexing that is one of these."""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import torch

from qc.ir import ops
from qc.ir.node import Node
from qc.ir.types import Dim, TupleType, as_dim
from qc.passes.prepare.aten_call import Builder, Call


def reshape(call: Call) -> Node:
    """`view(x, [batch, -1, 4]) --> reshape(x)`"""
    return call.reshape(call.tensor("self"), call.type.shape)


def expand(call: Call) -> Node:
    """`expand(x, [batch, -1]) --> expand(x)`"""
    return call.make(ops.Expand(call.type.shape), call.tensor("self"))


def permute(call: Call) -> Node:
    """`permute(x, [0, 2, 1]) --> permute(x)`"""
    return call.make(ops.Permute(tuple(call.axis_of(a) for a in call["dims"])), call.tensor("self"))


def transpose(call: Call, first: int | None = None, second: int | None = None) -> Node:
    """`transpose(x, 1, 2) --> permute(x, [0, 2, 1, 3])`"""
    x = call.tensor("self")
    if x.tensor.rank < 2:
        return x
    a = call.axis_of(call["dim0"] if first is None else first)
    b = call.axis_of(call["dim1"] if second is None else second)
    order = list(range(x.tensor.rank))
    order[a], order[b] = order[b], order[a]
    return call.make(ops.Permute(tuple(order)), x)


def einsum(call: Call) -> Node | None:
    """`einsum("nhwpqc->nchpwq", [x]) --> permute(x, [0, 5, 1, 3, 2, 4])`, where axes only move."""
    operands = call.tensors("tensors")
    read, _, written = call["equation"].replace(" ", "").partition("->")
    moves = len(operands) == 1 and len(set(read)) == len(read) and sorted(read) == sorted(written)
    if not moves or "." in read:
        return None
    return call.make(ops.Permute(tuple(read.index(axis) for axis in written)), operands[0])


def slice_axis(call: Call) -> Node | None:
    """`slice(x, 1, 0, 9223372036854775807) --> slice(x, axis=1, 0:seq)`"""
    x, axis = call.tensor("self"), call.axis()
    size, step = x.tensor.shape[axis], call["step"]
    start = from_front(call["start"] or 0, size)
    length = call.type.shape[axis]
    if step == 1:
        return call.make(ops.Slice(axis, start, as_dim(start + length)), x)
    if not (isinstance(size, int) and isinstance(start, int)):
        return None
    stop = size if call["end"] is None else min(from_front(call["end"], size), size)
    return call.make(ops.Slice(axis, start, stop, step), x)


def from_front(index: Dim, size: Dim) -> Dim:
    """Count an index from the front."""
    if not isinstance(index, int):
        return index
    if isinstance(size, int):
        return max(0, min(size, index + size if index < 0 else index))
    return as_dim(size + index) if index < 0 else index


def narrow(call: Call) -> Node:
    """`narrow(x, 1, start, length) --> slice(x, axis=1, start:start + length)`"""
    x, axis = call.tensor("self"), call.axis()
    start = from_front(call["start"], x.tensor.shape[axis])
    return call.make(ops.Slice(axis, start, as_dim(start + call.type.shape[axis])), x)


def select(call: Call) -> Node | None:
    """`select(x, 1, 0) --> reshape(slice(x, axis=1, 0:1))`"""
    if not isinstance(call["index"], int):
        return None
    x, axis = call.tensor("self"), call.axis()
    return take(call, x, axis, from_front(call["index"], x.tensor.shape[axis]))


def take(call: Call, x: Node, axis: int, index: Dim) -> Node:
    """Slice one element of an axis and drop the axis."""
    one = call.make(ops.Slice(axis, index, as_dim(index + 1)), x)
    shape = x.tensor.shape
    return call.reshape(one, (*shape[:axis], *shape[axis + 1 :]))


def split(call: Call) -> list[Node]:
    """`split(x, 64, -1) --> slice(x, axis=2, 0:64), slice(x, axis=2, 64:128)`"""
    x, axis = call.tensor("self"), call.axis()
    assert isinstance(call.node.type, TupleType)
    lengths = [item.shape[axis] for item in call.node.type.items]
    ends = [as_dim(end) for end in accumulate(lengths)]
    return [call.make(ops.Slice(axis, as_dim(end - length), end), x)
            for end, length in zip(ends, lengths, strict=True)]  # fmt: skip


def unbind(call: Call) -> list[Node]:
    """`unbind(x, 0) --> reshape(slice(x, axis=0, 0:1)), ...`"""
    x, axis = call.tensor("self"), call.axis()
    size = x.tensor.shape[axis]
    assert isinstance(size, int)
    return [take(call, x, axis, index) for index in range(size)]


def concat(call: Call) -> Node:
    """`cat([a, b], -1) --> concat(a, b)`"""
    parts = [call.cast(part, call.type.dtype) for part in call.tensors("tensors")]
    parts = [part for part in parts if part.tensor.shape != (0,)]  # torch skips these
    axis = call.axis_of(call["dim"], parts[0])
    return parts[0] if len(parts) == 1 else call.make(ops.Concat(axis), *parts)


def stack(call: Call) -> Node:
    """`stack([a, b], 1) --> concat(reshape(a), reshape(b))`"""
    parts = call.tensors("tensors")
    axis = call["dim"] % call.type.rank
    shape = (*call.type.shape[:axis], 1, *call.type.shape[axis + 1 :])
    return call.make(ops.Concat(axis), *(call.reshape(part, shape) for part in parts))


def repeat(call: Call) -> Node:
    """`repeat(x, [1, 3]) --> reshape(expand(reshape(x)))`"""
    x, repeats = call.tensor("self"), tuple(call["repeats"])
    shape = (1,) * (len(repeats) - x.tensor.rank) + x.tensor.shape
    apart = call.reshape(x, tuple(d for size in shape for d in (1, size)))
    pairs = zip(repeats, shape, strict=True)
    repeated = call.make(ops.Expand(tuple(as_dim(d) for pair in pairs for d in pair)), apart)
    return call.reshape(repeated, call.type.shape)


def repeat_each(call: Call) -> Node | None:
    """`repeat_interleave(x, 3, 1) --> reshape(expand(reshape(x)))`"""
    x = call.tensor("self")
    if call["dim"] is None or call["output_size"] is not None:
        return None
    shape, after = x.tensor.shape, call.axis() + 1
    apart = call.reshape(x, (*shape[:after], 1, *shape[after:]))
    wide = ops.Expand((*shape[:after], as_dim(call["repeats"]), *shape[after:]))
    return call.reshape(call.make(wide, apart), call.type.shape)


def difference(call: Call) -> Node | None:
    """`diff(x, 1, -1, prepend) --> sub(slice(concat(prepend, x), 1:), slice(..., :-1))`"""
    if call["n"] != 1 or call.type.dtype == torch.bool:
        return None
    axis = call.axis()
    parts = [*call.optional("prepend"), call.tensor("self"), *call.optional("append")]
    joined = parts[0] if len(parts) == 1 else call.make(ops.Concat(axis), *parts)
    size = joined.tensor.shape[axis]
    later = call.make(ops.Slice(axis, 1, size), joined)
    earlier = call.make(ops.Slice(axis, 0, as_dim(size - 1)), joined)
    return call.make(ops.Binary("sub"), later, earlier)


def index(call: Call) -> Node | None:
    """`x[arange(batch)[:, None], arange(seq)[None, :]] --> reshape(permute(x))`: every element
    is read once, in order. `x[arange(seq)] --> slice(x, axis=0, 0:seq)`."""
    x, indices = call.tensor("self"), call["indices"]
    if any(each is None for each in indices):
        return None
    ranges = [counted_axis(call.as_node(each)) for each in indices]
    if len(ranges) != x.tensor.rank or None in ranges:
        return None
    places = []
    for axis, found in enumerate(ranges):
        assert found is not None
        place, start, length = found
        if (start, length) != (0, x.tensor.shape[axis]):
            x = call.make(ops.Slice(axis, start, as_dim(start + length)), x)
        places.append(place)
    if len(set(places)) != len(places):
        return None
    order = tuple(sorted(range(len(places)), key=places.__getitem__))
    ordered = x if order == tuple(range(len(order))) else call.make(ops.Permute(order), x)
    return call.reshape(ordered, call.type.shape)


def counted_axis(node: Node) -> tuple[int, Dim, Dim] | None:
    """Recognise an index that counts along one axis: the axis from the back, start and length."""
    shape = node.tensor.shape
    while isinstance(node.op, ops.Reshape):
        node = node.inputs[0]
    if not isinstance(node.op, ops.Arange):
        return None
    long = [axis - len(shape) for axis, size in enumerate(shape) if size != 1]
    return (long[0], node.op.start, node.tensor.shape[0]) if len(long) == 1 else None


def index_select(call: Call) -> Node | None:
    """`index_select(table, 0, ids) --> embedding(ids, table)` for matrices."""
    x, ids = call.tensor("self"), call.tensor("index")
    if x.tensor.rank != 2 or call.axis() != 0 or ids.tensor.rank != 1:
        return None
    return call.make(ops.Embedding(), ids, x)


VIEWS = ("view.default", "_unsafe_view.default", "reshape.default", "unsqueeze.default",
         "squeeze.default", "squeeze.dim", "squeeze.dims", "flatten.using_ints",
         "unflatten.int", "view_as.default", "reshape_as.default")  # fmt: skip

SHAPE: dict[str, Builder] = {
    **{f"aten.{name}": reshape for name in VIEWS},
    **{f"aten.{name}.default": expand for name in ("expand", "expand_as", "broadcast_to")},
    "aten.permute.default": permute,
    "aten.transpose.int": transpose,
    "aten.t.default": partial(transpose, first=0, second=-1),
    "aten.mT.default": partial(transpose, first=-2, second=-1),
    "aten.einsum.default": einsum,
    "aten.slice.Tensor": slice_axis,
    "aten.narrow.default": narrow,
    "aten.select.int": select,
    "aten.cat.default": concat,
    "aten.concat.default": concat,
    "aten.stack.default": stack,
    "aten.repeat.default": repeat,
    "aten.repeat_interleave.self_int": repeat_each,
    "aten.diff.default": difference,
    "aten.index.Tensor": index,
    "aten.index_select.default": index_select,
}

PARTS = {
    "aten.split.Tensor": split,
    "aten.split.sizes": split,
    "aten.split_with_sizes.default": split,
    "aten.chunk.default": split,
    "aten.unbind.int": unbind,
}
"""Calls with several results: the nodes of all of them."""
