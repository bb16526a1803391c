"""Bodies that are local to a row: norms, softmax, rotations, quantization and what is element by
element around them, over a last axis of known size.

A row is walked a few times: once for every statistic (a sum of squares, a maximum), and once to
write the result. What is expensive to recompute is kept in a scratch row in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from qc.backends.region import RESULT, Region
from qc.backends.tvm.append import is_cache
from qc.backends.tvm.function import (
    SUM_LANES,
    Function,
    build,
    for_each,
    integer,
    known_product,
    pieces,
    product,
    span,
    store,
    tree_reduce,
    walk,
)
from qc.backends.tvm.hadamard import rotate
from qc.backends.tvm.kernel import Kernel, KernelRule
from qc.backends.tvm.vector_math import (
    ELEMENTWISE,
    TVM_NAMES,
    bind,
    constant,
    convert,
    exp_of_nonpositive,
    render,
    spread,
)
from qc.ir import ops
from qc.ir.node import Node
from qc.ir.op import Op
from qc.ir.types import Dim

PrimExpr = Any
Term = Callable[[PrimExpr, int], PrimExpr]
"""(channel, width) -> that many float32 values."""

STATISTICS = (ops.RMSNorm, ops.LayerNorm, ops.Softmax, ops.Reduce)
ROW_OPS = (*ELEMENTWISE, *STATISTICS, ops.Hadamard, ops.Quantize, ops.Input, ops.Scalar)

COMBINE: dict[str, Callable[[PrimExpr, PrimExpr], PrimExpr]] = {
    "sum": lambda a, b: a + b, "mean": lambda a, b: a + b, "max": tirx.max, "min": tirx.min,
}  # fmt: skip
NEUTRAL = {"sum": 0.0, "mean": 0.0, "max": float("-inf"), "min": float("inf")}


def reduce_span(kind: str, start: PrimExpr, size: int, lanes: int, term: Term) -> PrimExpr:
    """Combine `size` terms from channel `start` on to one float32.

    Four vectors are combined at a time, for an addition takes four cycles. The order of a sum is
    the same on every machine; a maximum has none.
    """
    if kind in ("sum", "mean"):
        lanes = SUM_LANES
    combine, neutral = COMBINE[kind], tirx.const(NEUTRAL[kind], "float32")
    ways = 4 if size >= 4 * lanes else 1
    vectors = size // (ways * lanes)
    result = neutral
    if vectors:
        partial = T.alloc_buffer((ways * lanes,), "float32")
        for way in range(ways):
            store(partial, span(way * lanes, lanes), spread(neutral, lanes))
        with T.serial(integer(0), integer(vectors)) as i:
            for way in range(ways):
                at = span(way * lanes, lanes)
                channel = start + (i * integer(ways) + integer(way)) * integer(lanes)
                store(partial, at, combine(partial[at], term(channel, lanes)))
        vector = partial[span(0, lanes)]
        for way in range(1, ways):
            vector = combine(vector, partial[span(way * lanes, lanes)])
        result = tree_reduce(vector, lanes, combine)
    done = vectors * ways * lanes
    for offset, width in pieces(size - done, lanes):
        rest = tree_reduce(term(start + integer(done + offset), width), width, combine)
        result = combine(result, rest)
    return bind(result)


@dataclass
class Row:
    """One row being written: the statistics and scratch rows that exist so far."""

    function: Function
    number: PrimExpr
    size: int
    statistics: dict[Node, tuple[PrimExpr, ...]] = field(default_factory=dict)
    kept: dict[Node, Any] = field(default_factory=dict)

    def value(self, node: Node, channel: PrimExpr, width: int) -> PrimExpr:
        """Return `width` values of the row of `node` in its dtype."""
        return self.values(node, channel, width, {})

    def values(
        self, node: Node, channel: PrimExpr, width: int, seen: dict[Node, PrimExpr]
    ) -> PrimExpr:
        """Return values, each node's computed once (`seen`)."""
        if node in self.kept:
            kept = self.kept[node][span(channel, width)]
            return convert(kept, TVM_NAMES[node.tensor.dtype])
        if node not in seen:
            computed = self.compute(node, channel, width, seen)
            shared = len(self.function.region.body.users[node]) > 1
            seen[node] = bind(computed) if shared else computed
        return seen[node]

    def compute(
        self, node: Node, channel: PrimExpr, width: int, seen: dict[Node, PrimExpr]
    ) -> PrimExpr:
        """Write the computation of some values of one node."""
        name = TVM_NAMES[node.tensor.dtype]
        if isinstance(node.op, ops.Input):
            return self.load(node, channel, width)
        if isinstance(node.op, ops.Scalar):
            return tirx.const(node.op.value, name)
        operands = [self.values(i, channel, width, seen) for i in node.inputs]
        if isinstance(node.op, ELEMENTWISE):
            lanes = width if node.tensor.shape else 1
            return convert(render(node.op, operands, lanes), name)
        if isinstance(node.op, ops.Reduce):
            return convert(self.statistics[node][0], name)
        spread_statistics = [spread(s, width) for s in self.statistics[node]]
        values = [convert(spread(v, width), "float32") for v in operands]
        return convert(normalised(node.op, values, spread_statistics), name)

    def load(self, node: Node, channel: PrimExpr, width: int) -> PrimExpr:
        """Read an input: a row of its own, one row for all, one value a row, or one number."""
        shape, buffer = node.tensor.shape, self.function.buffers[node]
        if shape == ():
            return convert(buffer[integer(0)], TVM_NAMES[node.tensor.dtype])
        rowless = len(shape) == 1
        if shape[-1] == 1 and self.size != 1:
            loaded = buffer[integer(0) if rowless else self.number]
        else:
            base = integer(0) if rowless else self.number * integer(self.size)
            loaded = buffer[span(base + channel, width)]
        return convert(loaded, TVM_NAMES[node.tensor.dtype])

    def measure(self, node: Node) -> None:
        """Compute the statistics of a node over the row, keeping its operand where it is dear."""
        source = node.inputs[0]
        if is_dear(source) and source not in self.kept:
            self.keep(source)

        def term(channel: PrimExpr, width: int) -> PrimExpr:
            return convert(spread(self.value(source, channel, width), width), "float32")

        self.statistics[node] = STATISTICS_OF[type(node.op)](self, node, term)

    def keep(self, node: Node) -> None:
        """Compute a whole row of `node` into scratch."""
        row = T.alloc_buffer((self.size,), TVM_NAMES[node.tensor.dtype])

        def body(channel: PrimExpr, width: int) -> None:
            store(row, span(channel, width), spread(self.value(node, channel, width), width))

        walk(integer(0), self.size, self.function.lanes, body)
        self.kept[node] = row

    def rotate(self, node: Node) -> None:
        """Compute the whole row of a rotation, in float32."""
        source, factor = node.inputs

        def term(channel: PrimExpr, width: int) -> PrimExpr:
            return convert(spread(self.value(source, channel, width), width), "float32")

        self.kept[node] = rotate(self.function, node, term, self.function.buffers[factor])

    def reduce(self, kind: str, term: Term) -> PrimExpr:
        """Combine the terms of the whole row."""
        return reduce_span(kind, integer(0), self.size, self.function.lanes, term)

    def mean(self, term: Term) -> PrimExpr:
        """Average the terms of the row."""
        return bind(self.reduce("sum", term) * tirx.const(1.0 / self.size, "float32"))


def rms_statistics(row: Row, node: Node, x: Term) -> tuple[PrimExpr, ...]:
    """1 / sqrt(mean(x^2) + eps)."""

    def square(channel: PrimExpr, width: int) -> PrimExpr:
        value = bind(x(channel, width))
        return value * value

    assert isinstance(node.op, ops.RMSNorm)
    return (inverse_root(row.mean(square), node.op.eps),)


def layer_statistics(row: Row, node: Node, x: Term) -> tuple[PrimExpr, ...]:
    """The mean and 1 / sqrt(variance + eps), in two walks: subtracting squares cancels."""
    mean = row.mean(x)

    def deviation(channel: PrimExpr, width: int) -> PrimExpr:
        value = bind(x(channel, width) - spread(mean, width))
        return value * value

    assert isinstance(node.op, ops.LayerNorm)
    return mean, inverse_root(row.mean(deviation), node.op.eps)


def softmax_statistics(row: Row, node: Node, x: Term) -> tuple[PrimExpr, ...]:
    """The maximum and 1 / sum(exp(x - maximum))."""
    largest = row.reduce("max", x)
    # A row of -inf alone would give inf - inf.
    largest = bind(tirx.max(largest, tirx.const(-3.4e38, "float32")))
    total = row.reduce("sum", lambda c, w: exp_of_nonpositive(x(c, w) - spread(largest, w)))
    return largest, bind(tirx.const(1.0, "float32") / total)


def reduce_statistics(row: Row, node: Node, x: Term) -> tuple[PrimExpr, ...]:
    """The sum, mean, maximum or minimum."""
    assert isinstance(node.op, ops.Reduce)
    if node.op.kind == "mean":
        return (row.mean(x),)
    return (row.reduce(node.op.kind, x),)


STATISTICS_OF: dict[type[Op], Callable[[Row, Node, Term], tuple[PrimExpr, ...]]] = {
    ops.RMSNorm: rms_statistics,
    ops.LayerNorm: layer_statistics,
    ops.Softmax: softmax_statistics,
    ops.Reduce: reduce_statistics,
}


def inverse_root(mean: PrimExpr, eps: float) -> PrimExpr:
    """1 / sqrt(mean + eps)."""
    one = tirx.const(1.0, "float32")
    return bind(one / tirx.sqrt(mean + tirx.const(eps, "float32")))


def normalised(op: Op, values: list[PrimExpr], statistics: list[PrimExpr]) -> PrimExpr:
    """Apply the statistics of a row to some of its values."""
    match op:
        case ops.RMSNorm():
            return values[0] * statistics[0] * values[1]
        case ops.LayerNorm():
            return (values[0] - statistics[0]) * statistics[1] * values[1] + values[2]
        case ops.Softmax():
            return exp_of_nonpositive(values[0] - statistics[0]) * statistics[1]
    raise TypeError(f"{op} has no statistics")


CHEAP = ("add", "sub", "mul", "neg", "abs", "relu", "max", "min")


def is_dear(node: Node) -> bool:
    """Say whether computing a value again costs more than reading it from scratch."""
    if isinstance(node.op, ops.Input | ops.Scalar | ops.Reduce | ops.Hadamard):
        return False  # the row of a rotation is always kept
    dear_op = not (
        isinstance(node.op, ops.RMSNorm | ops.LayerNorm | ops.Cast)
        or (isinstance(node.op, ops.Unary | ops.Binary) and node.op.kind in CHEAP)
    )
    return dear_op or any(is_dear(i) for i in node.inputs)


def rows_of(region: Region) -> tuple[tuple[Dim, ...], int] | None:
    """Return the leading axes and the known last axis over which a body is local to rows."""
    root = region.root
    source = root.inputs[0] if root.inputs else root
    whole = source if isinstance(root.op, ops.Reduce) else root
    if not whole.tensor.shape or not isinstance(whole.tensor.shape[-1], int):
        return None
    shape, size = whole.tensor.shape, whole.tensor.shape[-1]
    whole_row = (*STATISTICS, ops.Hadamard, ops.Quantize)
    if not any(isinstance(n.op, whole_row) for n in region.body.nodes):
        return None
    if any(is_cache(operand) for operand in region.operands) or size < 1:
        return None
    factors = factors_of(region)
    fits = all(is_local(n, shape, root) for n in region.body.nodes if n not in factors)
    given = all(isinstance(factor.op, ops.Input) for factor in factors)
    return (shape[:-1], size) if fits and given else None


def factors_of(region: Region) -> set[Node]:
    """Return the factors of the rotations of a body that nothing else in it reads."""
    return {
        node.inputs[1]
        for node in region.body.nodes
        if isinstance(node.op, ops.Hadamard)
        and all(
            isinstance(user.op, ops.Hadamard) and user.inputs[0] is not node.inputs[1]
            for user in region.body.users[node.inputs[1]]
        )
    }


def is_local(node: Node, shape: tuple[Dim, ...], root: Node) -> bool:
    """Say whether row r of `node` depends on row r of its inputs alone."""
    type, op = node.tensor, node.op
    if isinstance(op, ops.Quantize) and (node is not root or op.format.kind != "int"):
        return False
    if not isinstance(op, ROW_OPS):
        return False
    if (not type.is_float and type.shape == shape) or (type.format and node is not root):
        return False
    last = len(shape) - 1
    if isinstance(op, ops.Softmax) and (op.axis != last or type.shape != shape):
        return False
    if isinstance(op, ops.Reduce):
        whole = op.axes == (last,) and node.inputs[0].tensor.shape == shape
        return whole and (op.keepdim or node is root)
    if isinstance(op, ops.RMSNorm | ops.LayerNorm) and node.inputs[0].tensor.shape != shape:
        return False
    if isinstance(op, ops.Hadamard) and type.shape != shape:
        return False
    return type.shape in (shape, shape[-1:], (*shape[:-1], 1), ())


def rows(region: Region) -> Kernel | None:
    """A body that is local to rows."""
    found = rows_of(region)
    if found is None:
        return None
    leading, size = found

    def emit(function: Function) -> None:
        function.declare_inputs()
        write = result_writer(function, size, leading)
        known = known_product(leading)
        extent = function.dim(product(leading)) if known is None else known

        def one_row(number: PrimExpr) -> None:
            row = Row(function, number, size)
            for node in region.body.nodes:
                if isinstance(node.op, STATISTICS):
                    row.measure(node)
                elif isinstance(node.op, ops.Hadamard):
                    row.rotate(node)
            write(row)

        products = sum(int(factor.tensor.shape[0]) for factor in factors_of(region))
        for_each(extent, (4 + products) * size, one_row)

    return build("rows", region, emit)


def result_writer(
    function: Function, size: int, leading: tuple[Dim, ...]
) -> Callable[[Row], None]:  # fmt: skip
    """Declare the result and return what writes one row of it."""
    root = function.region.root
    if isinstance(root.op, ops.Quantize):
        return quantized_writer(function, size, leading)
    result = function.declare_result()
    name = TVM_NAMES[root.tensor.dtype]

    def write_row(row: Row) -> None:
        if isinstance(root.op, ops.Reduce):
            store(result, row.number, convert(row.statistics[root][0], name))
            return
        base = row.number * integer(size)

        def body(channel: PrimExpr, width: int) -> None:
            value = spread(row.value(root, channel, width), width)
            store(result, span(base + channel, width), value)

        walk(integer(0), size, function.lanes, body)

    return write_row


def quantized_writer(
    function: Function, size: int, leading: tuple[Dim, ...]
) -> Callable[[Row], None]:  # fmt: skip
    """Declare codes, scale and total, and return what writes one row of them."""
    root = function.region.root
    assert isinstance(root.op, ops.Quantize)
    source, limit = root.inputs[0], int(root.op.format.limit)
    group = min(root.op.format.group or size, size)
    groups = -(-size // group)
    codes = function.declare(RESULT, "codes", "int8", (product((*leading, size)),))
    scale = function.declare(RESULT, "scale", "float32", (product((*leading, groups)),))
    total = function.declare(RESULT, "total", "float32", (product((*leading, groups)),))

    def write_group(row: Row, number: PrimExpr, length: int, x: Term) -> None:
        start, lanes = bind(number * integer(group)), function.lanes
        largest = reduce_span("max", start, length, lanes, lambda c, w: tirx.abs(x(c, w)))
        inverse = bind(
            tirx.Select(largest > constant(0, largest), constant(limit, largest) / largest,
                        constant(0, largest))
        )  # fmt: skip

        def rounded(channel: PrimExpr, width: int) -> PrimExpr:
            code = bind(tirx.nearbyint(x(channel, width) * spread(inverse, width)))
            at = span(row.number * integer(size) + channel, width)
            store(codes, at, convert(code, "int8"))
            return code

        codes_sum = reduce_span("sum", start, length, lanes, rounded)
        step = bind(largest * tirx.const(1.0 / limit, "float32"))
        at = row.number * integer(groups) + number
        store(scale, at, step)
        store(total, at, step * codes_sum)

    def write_row(row: Row) -> None:
        if is_dear(source) and source not in row.kept:
            row.keep(source)

        def x(channel: PrimExpr, width: int) -> PrimExpr:
            return convert(spread(row.value(source, channel, width), width), "float32")

        whole = size // group
        if whole == 1:
            write_group(row, integer(0), group, x)
        else:
            with T.serial(integer(0), integer(whole)) as number:
                write_group(row, number, group, x)
        if size % group:
            write_group(row, integer(whole), size % group, x)

    return write_row


row_rules: tuple[KernelRule, ...] = (rows,)
