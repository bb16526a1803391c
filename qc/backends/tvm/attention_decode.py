"""Attention of few queries to many positions: one query position at a time.

The positions are split over the threads; every part keeps its own maximum, sum and weighted
values, and the parts are merged at the end (Dao et al. 2023, "Flash-Decoding"). The query heads
that share a key head are processed together, so that keys and values are read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from qc.backends.tvm.append import Read, row_pieces
from qc.backends.tvm.attention import LOWEST, Problem
from qc.backends.tvm.function import (
    SUM_LANES,
    integer,
    pieces,
    run_on_all_threads,
    run_serially,
    span,
    store,
    tree_reduce,
)
from qc.backends.tvm.linear.vectors import multiply_add, prefetch
from qc.backends.tvm.vector_math import bind, constant, convert, exp_of_nonpositive, spread, tanh
from qc.ir.node import Node
from qc.ir.target import Target

PrimExpr = Any

BLOCK = 64
"""Positions between two corrections of the running maximum."""

# Multiply-adds that one core does while another wakes up.
SERIAL_BELOW = 1 << 17

CACHE_LINE = 64

# Accumulators that stay in the 16 vector registers of AVX2, with room for operands.
ACCUMULATORS = 12


def parts_per_head(kv_heads: int) -> int:
    """Return into how many parts the positions of a key head are split: at least eight pieces of
    work in all, and as many for each of two or four threads."""
    return next(n for n in range(1, 9) if (n * kv_heads >= 8 and n * kv_heads % 4 == 0) or n == 8)


@dataclass(frozen=True)
class Part:
    """One part of the positions of one key head, for one query."""

    problem: Problem
    batch: PrimExpr
    seq: PrimExpr
    head: PrimExpr
    partial: Any
    base: PrimExpr
    """Where this part starts in `partial`: values [group, dim_v], maxima [group], sums [group]."""

    def at(self, row: PrimExpr, offset: PrimExpr | int, width: int) -> PrimExpr:
        """Index the weighted values of one query head."""
        return span(self.base + row * integer(self.problem.dim_v) + integer(offset), width)

    def maximum(self, row: PrimExpr) -> PrimExpr:
        """Index the running maximum of one query head."""
        return self.base + integer(self.problem.group * self.problem.dim_v) + row

    def total(self, row: PrimExpr) -> PrimExpr:
        """Index the running sum of one query head."""
        return self.maximum(row) + integer(self.problem.group)


def part_size(problem: Problem) -> int:
    """Return the floats that one part keeps."""
    return problem.group * (problem.dim_v + 2)


def emit_decode(problem: Problem) -> None:
    """Write the loop over all parts, then the merge."""
    parts = parts_per_head(problem.kv_heads)
    rows = problem.batch * problem.seq * integer(problem.kv_heads)
    count = bind(rows * integer(parts))
    partial = T.alloc_buffer((count * integer(part_size(problem)),), "float32")

    def one_part(i: PrimExpr) -> None:
        number = tirx.truncmod(i, integer(parts))
        row = bind(tirx.truncdiv(i, integer(parts)))
        head = bind(tirx.truncmod(row, integer(problem.kv_heads)))
        token = bind(tirx.truncdiv(row, integer(problem.kv_heads)))
        batch = bind(tirx.truncdiv(token, problem.seq))
        seq = bind(tirx.truncmod(token, problem.seq))
        base = bind(i * integer(part_size(problem)))
        emit_part(Part(problem, batch, seq, head, partial, base), number, parts)

    work = rows * problem.total * integer(problem.group * (problem.dim + problem.dim_v))
    with T.If(work >= integer(SERIAL_BELOW)):
        with T.Then():
            run_on_all_threads(count, one_part)
        with T.Else():
            run_serially(count, one_part)
    emit_merge(problem, partial, rows, parts)


def emit_part(part: Part, number: PrimExpr, parts: int) -> None:
    """Attend to one part of the visible positions, in blocks."""
    problem = part.problem
    group, dim, dim_v = problem.group, problem.dim, problem.dim_v
    query = bind(problem.offset + part.seq)
    low, high = bind(problem.visible_from(query)), bind(problem.visible_to(query))
    chunk = bind(tirx.truncdiv(high - low + integer(parts - 1), integer(parts)))
    start = bind(low + number * chunk)
    stop = bind(tirx.min(start + chunk, high))

    queries = T.alloc_buffer((group * dim,), "float32")
    scores = T.alloc_buffer((group * BLOCK,), "float32")
    scales = T.alloc_buffer((group,), "float32")
    with T.serial(integer(0), integer(group)) as row:
        read, rotary = problem.query(
            part.batch, part.seq, part.head * integer(group) + row
        )  # fmt: skip
        for offset, width in row_pieces(dim, rotary, problem.lanes):
            store(queries, span(row * integer(dim) + integer(offset), width), read(offset, width))
        for offset, width in pieces(dim_v, problem.lanes):
            zero = spread(tirx.const(0.0, "float32"), width)
            store(part.partial, part.at(row, offset, width), zero)
        store(part.partial, part.maximum(row), tirx.const(LOWEST, "float32"))
        store(part.partial, part.total(row), tirx.const(0.0, "float32"))

    blocks = tirx.truncdiv(stop - start + integer(BLOCK - 1), integer(BLOCK))
    with T.serial(integer(0), tirx.max(blocks, integer(0))) as block:
        first = bind(start + block * integer(BLOCK))
        length = bind(tirx.min(stop - first, integer(BLOCK)))
        emit_scores(part, queries, scores, first, length)
        with T.serial(integer(0), integer(group)) as row:
            emit_softmax(part, scores, scales, row, length)
        emit_values(part, scores, scales, first, length)


def emit_scores(
    part: Part, queries: Any, scores: Any, first: PrimExpr, length: PrimExpr
) -> None:  # fmt: skip
    """scores[row, j] = query of head `row` times key `first` + j."""
    problem, target = part.problem, part.problem.function.region.target
    with T.serial(integer(0), length) as j:
        ask_for(part, problem.v, first + j)
        key = problem.row(problem.k, part.batch, first + j, part.head)
        cut = list(pieces(problem.dim, SUM_LANES))
        vectors = [bind(key(offset, width)) for offset, width in cut]
        with T.unroll(integer(0), integer(problem.group)) as row:
            product = dot(queries, row * integer(problem.dim), vectors, cut, target)
            store(scores, row * integer(BLOCK) + j, product)
    if problem.mask is None and problem.op.softcap is None:
        return
    with T.serial(integer(0), integer(problem.group)) as row, T.serial(integer(0), length) as j:
        at = row * integer(BLOCK) + j
        score = capped(problem, scores[at])
        if problem.mask is not None:
            head = part.head * integer(problem.group) + row
            score = problem.masked(score, part.batch, head, part.seq, first + j)
        store(scores, at, score)


def ask_for(part: Part, node: Node, position: PrimExpr) -> None:
    """Ask for the row of a cache that the next loop over positions reads: values while scores are
    computed, the next keys while values are added. Memory then works beside the core."""
    buffer = part.problem.function.buffers[node]
    if len(buffer.shape) != 4:
        return
    line = CACHE_LINE // node.tensor.dtype.itemsize
    for channel in range(0, int(node.tensor.shape[3]), line):
        at = part.batch, position, part.head, integer(channel)
        prefetch(T.address_of(buffer[at]))


def capped(problem: Problem, score: PrimExpr) -> PrimExpr:
    """softcap tanh(score / softcap), where the attention has one."""
    cap = problem.op.softcap
    if cap is None:
        return score
    return tanh(score * constant(1.0 / cap, score)) * constant(cap, score)


def dot(
    queries: Any,
    base: PrimExpr,
    vectors: list[PrimExpr],
    cut: list[tuple[int, int]],
    target: Target,
) -> PrimExpr:
    """Multiply a query row with a key held in `vectors`."""
    sums: dict[int, PrimExpr] = {}
    for vector, (offset, width) in zip(vectors, cut, strict=True):
        query = queries[span(base + integer(offset), width)]
        before = sums.get(width)
        sums[width] = (
            query * vector if before is None else multiply_add(query, vector, before, target)
        )
    parts = [tree_reduce(total, width, lambda a, b: a + b) for width, total in sums.items()]
    result = parts[0]
    for other in parts[1:]:
        result = result + other
    return result


def emit_softmax(
    part: Part, scores: Any, scales: Any, row: PrimExpr, length: PrimExpr
) -> None:  # fmt: skip
    """Turn a block of scores into weights; correct the running maximum and sum."""
    lanes, partial = SUM_LANES, part.partial
    state = T.alloc_buffer((2 * lanes,), "float32")
    highest, total = span(0, lanes), span(lanes, lanes)
    lowest = spread(tirx.const(LOWEST, "float32"), lanes)
    zero = spread(tirx.const(0.0, "float32"), lanes)

    def chosen(i: PrimExpr, value: PrimExpr, otherwise: PrimExpr) -> PrimExpr:
        present = span(i * integer(lanes), lanes) < spread(length, lanes)
        return tirx.Select(present, value, otherwise)

    def at(i: PrimExpr) -> PrimExpr:
        return span(row * integer(BLOCK) + i * integer(lanes), lanes)

    store(state, highest, lowest)
    with T.serial(integer(0), integer(BLOCK // lanes)) as i:
        store(state, highest, tirx.max(state[highest], chosen(i, scores[at(i)], lowest)))
    before = bind(partial[part.maximum(row)])
    largest = bind(tirx.max(tree_reduce(state[highest], lanes, tirx.max), before))
    store(state, total, zero)
    with T.serial(integer(0), integer(BLOCK // lanes)) as i:
        power = exp_of_nonpositive(scores[at(i)] - spread(largest, lanes))
        power = bind(chosen(i, power, zero))
        store(scores, at(i), power)
        store(state, total, state[total] + power)
    scale = bind(exp_of_nonpositive(before - largest))
    added = tree_reduce(state[total], lanes, lambda a, b: a + b)
    store(scales, row, scale)
    store(partial, part.maximum(row), largest)
    store(partial, part.total(row), partial[part.total(row)] * scale + added)


def emit_values(
    part: Part, scores: Any, scales: Any, first: PrimExpr, length: PrimExpr
) -> None:  # fmt: skip
    """Add the weighted values of a block, a tile of heads and channels at a time."""
    problem = part.problem
    cut = list(pieces(problem.dim_v, problem.lanes))
    height = min(problem.group, 4)
    width = ACCUMULATORS // height
    for row in range(0, problem.group, height):
        rows = list(range(row, min(row + height, problem.group)))
        for at in range(0, len(cut), width):
            emit_value_tile(part, scores, scales, rows, cut[at : at + width], first, length)


def emit_value_tile(
    part: Part,
    scores: Any,
    scales: Any,
    rows: list[int],
    cut: list[tuple[int, int]],
    first: PrimExpr,
    length: PrimExpr,
) -> None:
    """Add weights[row, j] times value j for some heads and some channels."""
    problem, partial = part.problem, part.partial
    size = sum(width for _, width in cut)
    sums = T.alloc_buffer((len(rows) * size,), "float32")

    def tile() -> Any:
        for i, row in enumerate(rows):
            for offset, width in cut:
                at = span(i * size + offset - cut[0][0], width)
                yield row, offset, width, at

    for row, offset, width, at in tile():
        value = partial[part.at(integer(row), offset, width)]
        store(sums, at, value * spread(scales[integer(row)], width))
    with T.serial(integer(0), length) as j:
        if rows[0] == 0 and cut[0][0] == 0:
            ask_for(part, problem.k, first + j + integer(BLOCK))
        read: Read = problem.row(problem.v, part.batch, first + j, part.head)
        vectors = {offset: bind(read(offset, width)) for offset, width in cut}
        weights = {row: bind(scores[integer(row * BLOCK) + j]) for row in rows}
        for row, offset, width, at in tile():
            store(sums, at, sums[at] + spread(weights[row], width) * vectors[offset])
    for row, offset, width, at in tile():
        store(partial, part.at(integer(row), offset, width), sums[at])


def emit_merge(problem: Problem, partial: Any, rows: PrimExpr, parts: int) -> None:
    """Combine the parts of each query head and write the result."""
    group, dim_v, size = problem.group, problem.dim_v, part_size(problem)
    target = problem.function.region.target

    def one_row(i: PrimExpr) -> None:
        base = bind(i * integer(parts * size))
        with T.serial(integer(0), integer(group)) as row:
            places = [
                Part(problem, i, i, i, partial, base + integer(n * size)) for n in range(parts)
            ]
            maxima = [bind(partial[place.maximum(row)]) for place in places]
            largest = maxima[0]
            for maximum in maxima[1:]:
                largest = tirx.max(largest, maximum)
            largest = bind(largest)
            scales = [bind(exp_of_nonpositive(m - largest)) for m in maxima]
            total = partial[places[0].total(row)] * scales[0]
            for place, scale in zip(places[1:], scales[1:], strict=True):
                total = multiply_add(partial[place.total(row)], scale, total, target)
            inverse = bind(tirx.const(1.0, "float32") / total)
            for offset, width in pieces(dim_v, problem.lanes):
                kept = [partial[place.at(row, offset, width)] for place in places]
                spreads = [spread(scale, width) for scale in scales]
                value = kept[0] * spreads[0]
                for more, scale in zip(kept[1:], spreads[1:], strict=True):
                    value = multiply_add(more, scale, value, target)
                at = (i * integer(group) + row) * integer(dim_v) + integer(offset)
                merged = convert(value * spread(inverse, width), problem.dtype)
                store(problem.result, span(at, width), merged)

    run_serially(rows, one_row)
