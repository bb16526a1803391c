"""Attention over plain values or KV caches.

Few queries: the positions are split over programs, each for the query heads that share a key head,
so that keys and values are read once; a second launch merges the parts. Many queries: a block of
them a program. How many there are decides at run time, where their number is a symbol.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from qc.backends.region import Region
from qc.backends.triton.append import codes_of, declare, inner_nodes, rope_of
from qc.backends.triton.glue import NAMES, Glue, Text, power_of_two
from qc.backends.triton.kernel import Call, Cells, KernelRule, Launch, Scratch, Variant
from qc.backends.triton.storage import declare_result, half_dtype, is_cache
from qc.ir import ops
from qc.ir.node import Node
from qc.ir.types import Dim, element_count, symbol

FEW = 8
"""Queries up to which positions are split: a block of queries would be mostly padding."""
LEAST_ROWS = 16
"""Rows and channels of the smallest tile that the matrix units multiply."""
BLOCK_ROWS = 64
POSITIONS = 64
"""Positions of a tile: with 64 channels, 8 KiB of keys are on the way at a time."""
MOST_PARTS = 64
MORE_WARPS = 8
"""Of programs whose tiles would not stay in the registers of four: those of a mask, mostly."""
MEASURED = "sm_90"
UNITS = {"int8": 1.0, "e4m3": 256.0}
"""What the values that device functions make of codes are to be multiplied with."""


@dataclass(frozen=True)
class Problem:
    """One attention and its sizes."""

    region: Region

    @property
    def op(self) -> ops.Attention:
        op = self.region.root.op
        assert isinstance(op, ops.Attention)
        return op

    @cached_property
    def q(self) -> Node:
        """The queries before their rotation."""
        source = self.region.root.inputs[0]
        rotation = rope_of(source)
        return rotation[0] if rotation else source

    @property
    def mask(self) -> Node | None:
        return self.region.root.inputs[3] if len(self.region.root.inputs) == 4 else None

    @property
    def batch(self) -> Dim:
        return self.q.tensor.shape[0]

    @property
    def seq(self) -> Dim:
        return self.q.tensor.shape[1]

    @property
    def total(self) -> Dim:
        return self.region.root.inputs[1].tensor.shape[1]

    @property
    def room(self) -> Dim:
        """How many positions the buffers of keys and values have."""
        k = self.region.root.inputs[1]
        operand = self.region.operands[self.region.body.inputs.index(k)]
        return symbol("context") if is_cache(operand) else self.total

    @property
    def heads(self) -> int:
        return int(self.q.tensor.shape[2])

    @property
    def kv_heads(self) -> int:
        return int(self.region.root.inputs[1].tensor.shape[2])

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def dim(self) -> int:
        return int(self.q.tensor.shape[3])

    @property
    def dim_v(self) -> int:
        return int(self.region.root.tensor.shape[3])

    @property
    def measured(self) -> bool:
        """Say whether four warps keep what they decode in registers: with caches of codes, not on
        the architectures before sm_90, where ptxas gives 96 registers and spills 8 bytes."""
        gpu, keys = self.region.target.gpu, self.region.root.inputs[1]
        return keys.tensor.format is None or gpu is None or MEASURED in gpu.architectures

    @property
    def parts(self) -> int:
        """Into how many parts the positions of a key head are split: as many as fill the GPU."""
        gpu = self.region.target.gpu
        assert gpu is not None
        wanted = max(1, min(MOST_PARTS, gpu.multiprocessors // self.kv_heads))
        return 1 << (wanted.bit_length() - 1)


def padded(size: int) -> int:
    """Return the channels of a tile."""
    return max(LEAST_ROWS, power_of_two(size))


class Writer:
    """Writes what the two kernels share: queries, masks, the loop over positions."""

    def __init__(self, problem: Problem, rule: str) -> None:
        self.problem = problem
        self.glue = Glue(rule)
        region = problem.region
        self.scales: dict[Node, str] = {}
        self.pointers = {}
        for number, n in enumerate(region.body.inputs):
            format = n.tensor.format
            if format is None:
                self.pointers[n] = declare(self.glue, region, n)
            else:
                found = codes_of(self.glue, number, n, format)
                self.pointers[n], self.scales[n] = found

    def queries(self, number: str, head: str, exists: str) -> str:
        """Write the loading of rows of queries."""
        problem, glue = self.problem, self.glue
        dtype = Text(NAMES[half_dtype(problem.region.target)])
        sizes = problem.heads, problem.dim, padded(problem.dim), dtype
        rotation = rope_of(problem.region.root.inputs[0])
        q = self.pointers[problem.q]
        if rotation is None:
            return glue.call("attention.queries", q, number, head, exists, *sizes)
        _, cos, sin = rotation
        batches, _, rotary = cos.tensor.shape
        return glue.call(
            "attention.rotated_queries", q, self.pointers[cos], self.pointers[sin], number, head,
            exists, glue.size(problem.seq), glue.size(batches), *sizes, rotary,
        )  # fmt: skip

    def masking(self) -> tuple[str, str, list[str]]:
        """Return the pointer, the function and the strides of the mask."""
        mask, glue = self.problem.mask, self.glue
        if mask is None:
            return self.pointers[self.problem.region.root.inputs[1]], "no_mask", ["0"] * 4
        shape = (1,) * (4 - mask.tensor.rank) + mask.tensor.shape
        strides = [
            "0" if dim == 1 else glue.size(element_count(shape[axis + 1 :]))
            for axis, dim in enumerate(shape)
        ]
        kind = "boolean_mask" if mask.tensor.dtype == torch.bool else "additive_mask"
        return self.pointers[mask], kind, strides

    def attend(
        self, rows: str, batch: str, head: str, kv_head: str, token: str, exists: str,
        start: str, stop: str,
    ) -> list[str]:  # fmt: skip
        """Write the loop over positions; return weighted values, largest scores, sums."""
        problem, glue = self.problem, self.glue
        _, k, v, *_ = problem.region.root.inputs
        mask, masking, strides = self.masking()
        sizes = (glue.size(problem.seq), glue.size(problem.total), glue.size(problem.room))
        shape = (problem.kv_heads, problem.dim, problem.dim_v)
        tile = (padded(problem.dim), padded(problem.dim_v), POSITIONS)
        op, format = problem.op, k.tensor.format
        scales = [self.scales.get(n, self.pointers[n]) for n in (k, v)]
        decoding = glue.named("codes.plain" if format is None else f"codes.from_{format.code}")
        unit = 0.0 if format is None else UNITS[format.code]
        return glue.calls(
            3, "attention.attend", rows, self.pointers[k], self.pointers[v], *scales, decoding,
            mask, Text(f"attention.{masking}"), batch, head, kv_head, token, exists, *sizes, start,
            stop,
            *strides, *shape, *tile, op.scale, op.causal, op.window or 0, op.softcap or 0.0, unit,
        )  # fmt: skip


def decode(problem: Problem) -> tuple[Launch, ...]:
    """Write the launch over all parts, and the one that merges them."""
    writer = Writer(problem, "attention_parts")
    glue, op, parts = writer.glue, problem.op, problem.parts
    rows = padded(problem.group)
    part, kv_head, number = (glue.call(f"attention.{axis}") for axis in AXES)
    seq, total = glue.size(problem.seq), glue.size(problem.total)
    batch = glue.call("attention.batch_of", number, seq)
    token = glue.call("attention.token_of", number, seq)
    head = glue.call("attention.group_heads", kv_head, problem.group, rows)
    exists = glue.call("attention.group_rows", problem.group, rows)
    queries = writer.queries(number, head, exists)
    low = glue.call("attention.low", token, seq, total, op.window or 0)
    high = glue.call("attention.high", token, seq, total, op.causal)
    cut = (part, low, high, parts, POSITIONS)
    start, stop = glue.call("attention.part_start", *cut), glue.call("attention.part_stop", *cut)
    found = writer.attend(queries, batch, head, kv_head, token, exists, start, stop)
    tokens = element_count((problem.batch, problem.seq))
    kept = (tokens, problem.heads, parts)
    partial = Scratch("partial", torch.float32, (*kept, problem.dim_v))
    sums = Scratch("sums", torch.float32, (*kept, 2))
    glue.do(
        "attention.store_part", glue.pointer(partial, torch.float32),
        glue.pointer(sums, torch.float32), *found, number, kv_head, part, problem.kv_heads, parts,
        problem.group, problem.dim_v, rows, padded(problem.dim_v),
    )  # fmt: skip
    warps = 4 if problem.measured else MORE_WARPS
    launch = glue.launch((Cells(parts), Cells(problem.kv_heads), Cells(tokens)), warps, 2)
    return launch, merge(problem, partial, sums)


AXES = ("first", "second", "third")


def merge(problem: Problem, partial: Scratch, sums: Scratch) -> Launch:
    """Write the launch that merges the parts of each query head."""
    glue = Glue("attention_merge")
    read = [glue.pointer(each, torch.float32) for each in (partial, sums)]
    result = declare_result(glue, problem.region)
    row = glue.call("attention.first")
    glue.do(
        "attention.merge", result, *read, row, problem.parts, problem.dim_v, padded(problem.dim_v)
    )  # fmt: skip
    rows = element_count((problem.batch, problem.seq, problem.heads))
    return glue.launch((Cells(rows),), 2)


def prefill(problem: Problem) -> tuple[Launch, ...]:
    """Write the launch over blocks of queries."""
    writer = Writer(problem, "attention_blocks")
    glue, op = writer.glue, problem.op
    block, head, batch = (glue.call(f"attention.{axis}") for axis in AXES)
    seq, total = glue.size(problem.seq), glue.size(problem.total)
    token = glue.call("attention.block_tokens", block, BLOCK_ROWS)
    exists = glue.call("attention.below", token, seq)
    number = glue.call("attention.row", batch, seq, token)
    kv_head = glue.call("attention.batch_of", head, problem.group)
    queries = writer.queries(number, head, exists)
    start = glue.call(
        "attention.block_start", block, seq, total, BLOCK_ROWS, op.window or 0, POSITIONS
    )  # fmt: skip
    stop = glue.call("attention.block_stop", block, seq, total, BLOCK_ROWS, op.causal)
    values, _, sums = writer.attend(queries, batch, head, kv_head, token, exists, start, stop)
    result = declare_result(glue, problem.region)
    shape = (problem.heads, problem.dim_v, padded(problem.dim_v))
    glue.do("attention.store_block", result, values, sums, number, head, exists, *shape)
    grid = (Cells(problem.seq, BLOCK_ROWS), Cells(problem.heads), Cells(problem.batch))
    return (glue.launch(grid, 4 if problem.mask is None else MORE_WARPS, 2),)


def is_attention(region: Region) -> bool:
    """Say whether a body is what these kernels compute."""
    root = region.root
    if not isinstance(root.op, ops.Attention):
        return False
    q, k, v, *mask = root.inputs
    leaves = all(isinstance(n.op, ops.Input) for n in (k, v, *mask))
    plain = isinstance(q.op, ops.Input) or rope_of(q) is not None
    extents = (*q.tensor.shape[2:], *k.tensor.shape[2:], *v.tensor.shape[2:])
    caches = {n for n, o in zip(region.body.inputs, region.operands, strict=True) if is_cache(o)}
    both = caches in (set(), {k, v})  # one number of positions that there is room for
    formats = {k.tensor.format, v.tensor.format}
    known = len(formats) == 1 and all(
        f is None or (f.group is None and f.code in UNITS and caches) for f in formats
    )
    inner = len(inner_nodes(region)) == 1 + (rope_of(q) is not None)
    return (
        leaves and plain and inner and both and known and all(isinstance(e, int) for e in extents)
    )


def attention(region: Region) -> Call | None:
    """An attention, its queries rotated first or not."""
    if not is_attention(region):
        return None
    problem = Problem(region)
    few, many = Variant(FEW, decode(problem)), Variant(None, prefill(problem))
    if isinstance(problem.seq, int):
        return Call(problem.seq, (Variant(None, (few if problem.seq <= FEW else many).launches),))
    return Call(problem.seq, (few, many))


attention_rules: tuple[KernelRule, ...] = (attention,)
