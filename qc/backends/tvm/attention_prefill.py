"""Attention of many queries, in blocks with an online softmax (Dao et al. 2022, "FlashAttention").

Everything is transposed: lanes run over query rows (the query heads of one key head, for some
consecutive positions), so that the maximum and the sum over keys need no work across lanes, and
keys and values are read one number at a time, broadcast: in place where they are float32, else from
a copy of some of them, for widening a single number takes as long as four products of vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tvm import tirx
from tvm.tirx.script import builder as T

from qc.backends.tvm.append import row_pieces
from qc.backends.tvm.attention import LOWEST, Problem
from qc.backends.tvm.attention_decode import capped
from qc.backends.tvm.function import integer, pieces, run_on_all_threads, span, store
from qc.backends.tvm.vector_math import bind, constant, convert, exp_of_nonpositive, spread
from qc.ir.node import Node

PrimExpr = Any
ReadOne = Callable[[PrimExpr, PrimExpr], PrimExpr]
"""(key, counted from the first of some, channel) -> a float32."""

KEYS = 64
"""Keys between two corrections of the running maximum."""

ROWS = 48
"""Query rows at a time, at least: three vectors of AVX512, or two tiles of three AVX2 vectors."""

# A tile of 3 vectors x 4 broadcast numbers: 12 accumulators of the 16 registers of AVX2.
TILE_VECTORS, TILE_NUMBERS = 3, 4


@dataclass(frozen=True)
class Block:
    """Some query positions of one key head, and the scratch of the thread that computes them."""

    problem: Problem
    batch: PrimExpr
    head: PrimExpr
    first_query: PrimExpr
    queries: Any
    scores: Any
    values: Any
    maxima: Any
    sums: Any
    scales: Any
    positions: Any
    wide: Any
    """Keys, then values, of some positions as float32[KEYS, channels]."""

    @property
    def rows(self) -> int:
        """Query rows, with padding up to whole vectors."""
        lanes = self.problem.lanes
        return -(-positions_per_block(self.problem) * self.problem.group // lanes) * lanes


def positions_per_block(problem: Problem) -> int:
    """Return how many query positions fill a block."""
    return max(1, ROWS // problem.group)


def emit_prefill(problem: Problem) -> None:
    """Write the parallel loop over key heads and blocks of queries."""
    per_block = positions_per_block(problem)
    blocks = bind(tirx.truncdiv(problem.seq + integer(per_block - 1), integer(per_block)))
    heads = bind(problem.batch * integer(problem.kv_heads))

    def one_block(i: PrimExpr) -> None:
        # Later queries see more keys: taking blocks from both ends in turn gives every thread,
        # which takes consecutive i, the same work.
        turn, which = bind(tirx.truncdiv(i, heads)), bind(tirx.truncmod(i, heads))
        half = bind(tirx.truncdiv(turn, integer(2)))
        even = tirx.EQ(tirx.truncmod(turn, integer(2)), integer(0))
        number = bind(tirx.Select(even, half, blocks - integer(1) - half))
        batch = bind(tirx.truncdiv(which, integer(problem.kv_heads)))
        head = bind(tirx.truncmod(which, integer(problem.kv_heads)))
        emit_block(problem, batch, head, bind(number * integer(per_block)))

    run_on_all_threads(heads * blocks, one_block)


def allocate(problem: Problem, batch: PrimExpr, head: PrimExpr, first_query: PrimExpr) -> Block:
    """Allocate the scratch of one block."""
    lanes, rows = problem.lanes, positions_per_block(problem) * problem.group
    rows = -(-rows // lanes) * lanes

    def scratch(size: int, dtype: str = "float32") -> Any:
        return T.alloc_buffer((size,), dtype)

    return Block(
        problem, batch, head, first_query,
        queries=scratch(problem.dim * rows), scores=scratch(KEYS * rows),
        values=scratch(problem.dim_v * rows), maxima=scratch(rows), sums=scratch(rows),
        scales=scratch(rows), positions=scratch(rows, "int32"),
        wide=scratch(KEYS * max(problem.dim, problem.dim_v)),
    )  # fmt: skip


def emit_block(
    problem: Problem, batch: PrimExpr, head: PrimExpr, first_query: PrimExpr
) -> None:  # fmt: skip
    """Attend from one block of queries to all keys that one of them sees."""
    block = allocate(problem, batch, head, first_query)
    per_block = positions_per_block(problem)
    last = bind(tirx.min(first_query + integer(per_block), problem.seq) - integer(1))
    start_block(block, last)
    low = bind(problem.visible_from(problem.offset + first_query))
    high = bind(problem.visible_to(problem.offset + last))
    count = tirx.truncdiv(high - low + integer(KEYS - 1), integer(KEYS))
    with T.serial(integer(0), tirx.max(count, integer(0))) as i:
        first = bind(low + i * integer(KEYS))
        length = bind(tirx.min(high - first, integer(KEYS)))
        emit_scores(block, widened(block, problem.k, first, length), length)
        hide(block, first, length, last)
        with T.serial(integer(0), integer(block.rows // problem.lanes)) as vector:
            emit_softmax(block, vector * integer(problem.lanes), length)
        emit_values(block, widened(block, problem.v, first, length), length)
    finish_block(block, last)


def row_of(block: Block, row: PrimExpr, last: PrimExpr) -> tuple[PrimExpr, PrimExpr]:
    """Return the query (not beyond `last`) and the head of a row."""
    group = integer(block.problem.group)
    query = tirx.min(block.first_query + tirx.truncdiv(row, group), last)
    return bind(query), bind(block.head * group + tirx.truncmod(row, group))


def start_block(block: Block, last: PrimExpr) -> None:
    """Transpose the queries; no key has been seen."""
    problem, rows = block.problem, block.rows
    with T.serial(integer(0), integer(rows)) as row:
        query, head = row_of(block, row, last)
        read, rotary = problem.query(block.batch, query, head)
        for offset, width in row_pieces(problem.dim, rotary, problem.lanes):
            at = span(integer(offset * rows) + row, width, stride=rows)
            store(block.queries, at, read(offset, width))
        store(block.positions, row, tirx.Cast("int32", problem.offset + query))
        store(block.maxima, row, tirx.const(LOWEST, "float32"))
        store(block.sums, row, tirx.const(0.0, "float32"))
    zero = spread(tirx.const(0.0, "float32"), problem.lanes)
    with T.serial(integer(0), integer(problem.dim_v * rows // problem.lanes)) as i:
        store(block.values, span(i * integer(problem.lanes), problem.lanes), zero)


def widened(block: Block, node: Node, first: PrimExpr, length: PrimExpr) -> ReadOne:
    """Return how to read `length` keys or values from position `first` on, as float32."""
    problem = block.problem
    if node.tensor.dtype == torch.float32:
        return lambda j, channel: problem.row(node, block.batch, first + j, block.head)(channel, 1)
    size = int(node.tensor.shape[3])
    with T.serial(integer(0), length) as j:
        read = problem.row(node, block.batch, first + j, block.head)
        for offset, width in pieces(size, problem.lanes):
            store(block.wide, span(j * integer(size) + integer(offset), width), read(offset, width))
    return lambda j, channel: block.wide[j * integer(size) + channel]


def vector_tiles(block: Block) -> list[list[int]]:
    """Group the vectors of a block's rows into tiles: offsets of their first rows."""
    offsets = list(range(0, block.rows, block.problem.lanes))
    return [offsets[i : i + TILE_VECTORS] for i in range(0, len(offsets), TILE_VECTORS)]


def emit_scores(block: Block, keys: ReadOne, length: PrimExpr) -> None:
    """scores[j, row] = key j times query row, four keys at a time."""
    tiles = tirx.truncdiv(length, integer(TILE_NUMBERS))
    with T.serial(integer(0), tiles) as tile:
        start = bind(tile * integer(TILE_NUMBERS))
        for offsets in vector_tiles(block):
            emit_score_tile(block, keys, start, TILE_NUMBERS, offsets)
    with T.serial(tiles * integer(TILE_NUMBERS), length) as start:
        for offsets in vector_tiles(block):
            emit_score_tile(block, keys, start, 1, offsets)


def emit_score_tile(
    block: Block, read: ReadOne, start: PrimExpr, keys: int, offsets: list[int]
) -> None:
    """Multiply some keys with some vectors of query rows."""
    problem, lanes, rows = block.problem, block.problem.lanes, block.rows
    sums = T.alloc_buffer((keys * len(offsets) * lanes,), "float32")
    places = [
        (key, offset, span((key * len(offsets) + i) * lanes, lanes))
        for key in range(keys)
        for i, offset in enumerate(offsets)
    ]
    zero = spread(tirx.const(0.0, "float32"), lanes)
    for _, _, at in places:
        store(sums, at, zero)
    with T.serial(integer(0), integer(problem.dim)) as channel:
        queries = {o: bind(block.queries[span(channel * integer(rows) + integer(o), lanes)])
                   for o in offsets}  # fmt: skip
        numbers = [bind(read(start + integer(key), channel)) for key in range(keys)]
        for key, offset, at in places:
            store(sums, at, sums[at] + spread(numbers[key], lanes) * queries[offset])
    for key, offset, at in places:
        place = span((start + integer(key)) * integer(rows) + integer(offset), lanes)
        store(block.scores, place, capped(problem, bind(sums[at])))


def hide(block: Block, first: PrimExpr, length: PrimExpr, last: PrimExpr) -> None:
    """Apply the mask operand; hide keys that a query must not see, where there are any."""
    problem, rows = block.problem, integer(block.rows)
    if problem.mask is not None:
        with T.serial(integer(0), integer(block.rows)) as row:
            query, head = row_of(block, row, last)
            with T.serial(integer(0), length) as j:
                at = j * rows + row
                score = block.scores[at]
                store(block.scores, at, problem.masked(score, block.batch, head, query, first + j))
    conditions = []
    if problem.op.causal:
        conditions.append(first + length - integer(1) > problem.offset + block.first_query)
    if problem.op.window is not None:
        conditions.append(first <= problem.offset + last - integer(problem.op.window))
    if not conditions:
        return
    some = conditions[0] if len(conditions) == 1 else tirx.Or(*conditions)
    with T.If(some), T.Then(), T.serial(integer(0), length) as j:
        hide_key(block, j, tirx.Cast("int32", first + j))


def hide_key(block: Block, j: PrimExpr, key: PrimExpr) -> None:
    """Hide the key at position `key` from the rows that must not see it."""
    problem, lanes = block.problem, block.problem.lanes
    with T.serial(integer(0), integer(block.rows // lanes)) as i:
        position = block.positions[span(i * integer(lanes), lanes)]
        at = span(j * integer(block.rows) + i * integer(lanes), lanes)
        score = block.scores[at]
        lowest = constant(LOWEST, score)
        if problem.op.causal:
            score = tirx.Select(spread(key, lanes) <= position, score, lowest)
        if problem.op.window is not None:
            oldest = position - constant(problem.op.window, position)
            score = tirx.Select(spread(key, lanes) > oldest, score, lowest)
        store(block.scores, at, score)


def emit_softmax(block: Block, row: PrimExpr, length: PrimExpr) -> None:
    """Turn the scores of one vector of rows into weights; correct the running state."""
    lanes = block.problem.lanes
    here = span(row, lanes)

    def at(j: PrimExpr) -> PrimExpr:
        return span(j * integer(block.rows) + row, lanes)

    state = T.alloc_buffer((2 * lanes,), "float32")
    largest, total = span(0, lanes), span(lanes, lanes)
    before = bind(block.maxima[here])
    store(state, largest, before)
    with T.serial(integer(0), length) as j:
        store(state, largest, tirx.max(state[largest], block.scores[at(j)]))
    maximum = bind(state[largest])
    scale = bind(exp_of_nonpositive(before - maximum))
    store(state, total, block.sums[here] * scale)
    with T.serial(integer(0), length) as j:
        weight = bind(exp_of_nonpositive(block.scores[at(j)] - maximum))
        store(block.scores, at(j), weight)
        store(state, total, state[total] + weight)
    store(block.maxima, here, maximum)
    store(block.scales, here, scale)
    store(block.sums, here, state[total])


def emit_values(block: Block, values: ReadOne, length: PrimExpr) -> None:
    """values[d, row] = values[d, row] scale[row] + sum over j of value[j, d] weight[j, row]."""
    whole = block.problem.dim_v // TILE_NUMBERS
    with T.serial(integer(0), integer(whole)) as tile:
        start = bind(tile * integer(TILE_NUMBERS))
        for offsets in vector_tiles(block):
            emit_value_tile(block, values, length, start, TILE_NUMBERS, offsets)
    for channel in range(whole * TILE_NUMBERS, block.problem.dim_v):
        for offsets in vector_tiles(block):
            emit_value_tile(block, values, length, integer(channel), 1, offsets)


def emit_value_tile(
    block: Block, read: ReadOne, length: PrimExpr, start: PrimExpr, channels: int,
    offsets: list[int],
) -> None:  # fmt: skip
    """Add the weighted values of some channels for some vectors of query rows."""
    lanes, rows = block.problem.lanes, block.rows
    sums = T.alloc_buffer((channels * len(offsets) * lanes,), "float32")
    places = [
        (
            channel,
            offset,
            span((channel * len(offsets) + i) * lanes, lanes),
            span((start + integer(channel)) * integer(rows) + integer(offset), lanes),
        )
        for channel in range(channels)
        for i, offset in enumerate(offsets)
    ]
    for _, offset, at, kept in places:
        store(sums, at, block.values[kept] * block.scales[span(offset, lanes)])
    with T.serial(integer(0), length) as j:
        weights = {o: bind(block.scores[span(j * integer(rows) + integer(o), lanes)])
                   for o in offsets}  # fmt: skip
        numbers = [bind(read(j, start + integer(channel))) for channel in range(channels)]
        for channel, offset, at, _ in places:
            store(sums, at, sums[at] + spread(numbers[channel], lanes) * weights[offset])
    for _, _, at, kept in places:
        store(block.values, kept, sums[at])


def finish_block(block: Block, last: PrimExpr) -> None:
    """Divide by the sums and write the rows that are not padding."""
    problem, rows = block.problem, block.rows
    count = (last - block.first_query + integer(1)) * integer(problem.group)
    with T.serial(integer(0), count) as row:
        query, head = row_of(block, row, last)
        inverse = bind(tirx.const(1.0, "float32") / block.sums[row])
        token = block.batch * problem.seq + query
        base = bind((token * integer(problem.heads) + head) * integer(problem.dim_v))
        for offset, width in pieces(problem.dim_v, problem.lanes):
            value = block.values[span(integer(offset * rows) + row, width, stride=rows)]
            merged = convert(value * spread(inverse, width), problem.dtype)
            store(problem.result, span(base + integer(offset), width), merged)
