"""Bodies that are local to a row: norms, softmax, rotations, quantization and what is element by
element around them, over a last axis of known size. Each program holds one row in registers, or a
piece of one. A rotation has a launch of its own, for its blocks are tiles and not rows; so has what
is before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from qc.backends.region import RESULT, ArrayArgument, Region, Repack
from qc.backends.triton.glue import Glue, power_of_two
from qc.backends.triton.kernel import Call, Cells, KernelRule, Launch, Scratch, Variant
from qc.backends.triton.rendering import ELEMENTWISE, render
from qc.backends.triton.storage import declare_input, declare_result, is_cache, quantized_arrays
from qc.ir import ops
from qc.ir.node import Node
from qc.ir.types import ActivationFormat, Dim, TensorType, as_dim, element_count

STATISTICS = (ops.RMSNorm, ops.LayerNorm, ops.Softmax, ops.Reduce)
ROUNDING = (ops.Quantize, ops.FakeQuantize)
ROW_OPS = (*ELEMENTWISE, *STATISTICS, *ROUNDING, ops.Hadamard, ops.Input, ops.Scalar)

LARGEST = 1 << 16
"""Channels of the longest row: 64 a thread, with the 1024 threads of a block."""
PIECE = 1024
"""Channels of the largest piece of a row that several programs share: they have four warps."""
CHANNELS_A_WARP = 256
"""Eight a thread: two loads of 16 bytes from float32, one from float16."""


@dataclass
class Row:
    """A row that is being written: the names of what is known of it."""

    glue: Glue
    region: Region
    size: int
    pointers: dict[Node, str]
    number: str
    channel: str
    known: dict[Node, str] = field(default_factory=dict)

    def value(self, node: Node) -> str:
        """Return the name of the row of a node, or of the one value that it has."""
        if node not in self.known:
            self.known[node] = self.computed(node)
        return self.known[node]

    def computed(self, node: Node) -> str:
        """Write the computation of one node."""
        if node in self.pointers:
            return self.load(node)
        if isinstance(node.op, ops.Scalar):
            floats = node.tensor.is_float
            return self.glue.number(node.op.value, torch.float32 if floats else node.tensor.dtype)
        operands = [self.value(operand) for operand in node.inputs]
        if isinstance(node.op, ELEMENTWISE):
            return render(self.glue, node, operands)
        return self.statistic(node, operands)

    def load(self, node: Node) -> str:
        """Read an input: a row of its own, one row for all, one value a row, or one number."""
        shape, pointer, call = node.tensor.shape, self.pointers[node], self.glue.call
        if shape == () or (len(shape) == 1 and shape[0] == 1 != self.size):
            return call("elements.load_one", pointer)
        if len(shape) == 1:
            return call("single_row.load_vector", pointer, self.channel, self.size)
        if shape[-1] == 1 and self.size != 1:
            return call("single_row.load_number", pointer, self.number)
        return call("single_row.load", pointer, self.number, self.channel, self.size)

    def statistic(self, node: Node, operands: list[str]) -> str:
        """Write a call of a function that looks at the whole row."""
        where = (self.channel, self.size)
        match node.op:
            case ops.RMSNorm(eps):
                return self.glue.call("single_row.rms_norm", *operands, *where, eps)
            case ops.LayerNorm(eps):
                return self.glue.call("single_row.layer_norm", *operands, *where, eps)
            case ops.Softmax():
                return self.glue.call("single_row.softmax", *operands, *where)
            case ops.Reduce(kind):
                return self.glue.call(f"single_row.{kind}", *operands, *where)
            case ops.FakeQuantize(format):
                module, how = self.rounding(format, "rounded")
                return self.glue.call(f"{module}.fake_quantize", *operands, *where, *how)
        raise TypeError(f"{node.op} looks at no row")

    def store_scratch(self, node: Node, target: Scratch) -> None:
        """Write the row of a node to a temporary."""
        pointer = self.glue.pointer(target, target.dtype)
        where = (self.number, self.channel, self.size)
        self.glue.do("single_row.store", pointer, *where, self.value(node))

    def store(self) -> None:
        """Write the row of the root."""
        root, glue = self.region.root, self.glue
        if isinstance(root.op, ops.Quantize):
            self.store_quantized(root)
            return
        value, result = self.value(root), declare_result(glue, self.region)
        if isinstance(root.op, ops.Reduce):
            glue.do("single_row.store_number", result, self.number, value)
        else:
            glue.do("single_row.store", result, self.number, self.channel, self.size, value)

    def store_quantized(self, root: Node) -> None:
        """Write codes and scales."""
        assert isinstance(root.op, ops.Quantize)
        rows, format = element_count(root.tensor.shape[:-1]), root.op.format
        value = self.value(root.inputs[0])
        arrays = [
            self.glue.pointer(ArrayArgument(RESULT, name, shape), dtype)
            for name, (dtype, shape) in quantized_arrays(
                TensorType((rows, root.tensor.shape[-1]), format=format)
            ).items()
        ]
        module, how = self.rounding(format, "to")
        where = (value, self.number, self.channel, self.size)
        self.glue.do(f"{module}.quantize", *arrays, *where, *how)

    def rounding(self, format: ActivationFormat, to: str) -> tuple[str, tuple[object, ...]]:
        """Return the module that rounds to codes of a format, and how it is told which; `to` is
        what the names of functions begin with that round in units of scales."""
        block = power_of_two(self.size)
        groups = block, min(format.group or block, block)
        if format.kind == "e2m1":
            return "fp4", groups
        # Codes of fewer bits than 8 are bytes, too; their limit is given.
        code = "e4m3" if format.kind == "e4m3" else "int8"
        return "single_row", (*groups, format.limit, self.glue.named(f"codes.{to}_{code}"))

    def launch(self, count: Dim) -> Launch:
        """Close the kernel: a program a row."""
        block = power_of_two(self.size)
        warps = min(32, max(1, block // CHANNELS_A_WARP))
        return self.glue.launch((Cells(count),), warps=warps)


def rows_of(region: Region) -> tuple[Dim, int] | None:
    """Return the number of rows, and the known last axis over which a body is local to rows."""
    root = region.root
    source = root.inputs[0] if root.inputs else root
    whole = source if isinstance(root.op, ops.Reduce) else root
    shape = whole.tensor.shape
    if not shape or not isinstance(shape[-1], int) or not 1 <= shape[-1] <= LARGEST:
        return None
    whole_row = (*STATISTICS, *ROUNDING, ops.Hadamard)
    if not any(isinstance(n.op, whole_row) for n in region.body.nodes):
        return None
    if any(is_cache(operand) or operand.tensor.format for operand in region.operands):
        return None
    factors = {n.inputs[1] for n in region.body.nodes if isinstance(n.op, ops.Hadamard)}
    if not all(isinstance(factor.op, ops.Input) for factor in factors):
        return None
    if not all(is_local(node, shape, root) for node in region.body.nodes if node not in factors):
        return None
    return element_count(shape[:-1]), shape[-1]


def is_local(node: Node, shape: tuple[Dim, ...], root: Node) -> bool:
    """Say whether row r of `node` depends on row r of its inputs alone."""
    type, op = node.tensor, node.op
    if not isinstance(op, ROW_OPS):
        return False
    if isinstance(op, ROUNDING):
        group = op.format.group
        where = node is root if isinstance(op, ops.Quantize) else type.shape == shape
        return where and (group is None or group == power_of_two(group))
    if not type.is_float and type.shape == shape:
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


def pieces_of(region: Region, size: int) -> int:
    """Return among how many programs each row is shared out: several where it is long and nothing
    looks further than groups of its channels."""
    shape, piece = region.root.tensor.shape, min(PIECE, size & -size)
    if len(shape) < 2 or size <= PIECE or piece < CHANNELS_A_WARP:
        return 1
    whole = [node for node in region.body.nodes if not isinstance(node.op, ops.Scalar)]
    if not all(node.tensor.shape == shape and looks_within(node, piece) for node in whole):
        return 1
    return size // piece


def looks_within(node: Node, piece: int) -> bool:
    """Say whether a channel depends on those of its piece alone."""
    if isinstance(node.op, ROUNDING):
        format = node.op.format
        return format.kind != "e2m1" and format.group is not None and format.group <= piece
    return isinstance(node.op, (*ELEMENTWISE, ops.Input))


def rows(region: Region) -> Call | None:
    """A body that is local to rows."""
    found = rows_of(region)
    if found is None:
        return None
    count, size = found
    pieces = pieces_of(region, size)
    repack: dict[tuple[int, str], Repack] = {}
    kept: dict[Node, Scratch] = {}
    launches: list[Launch] = []
    for node in region.body.nodes:
        if isinstance(node.op, ops.Hadamard):
            launches += rotation(region, node, found, kept, repack)
    if region.root not in kept:
        row = row_of(region, region.root, size // pieces, kept, repack)
        row.store()
        launches.append(row.launch(as_dim(count * pieces)))
    return Call(count, (Variant(None, tuple(launches)),), repack)


def row_of(
    region: Region,
    root: Node,
    size: int,
    kept: Mapping[Node, Scratch],
    repack: dict[tuple[int, str], Repack],
) -> Row:
    """Begin a kernel that computes `root` from the inputs of the body and what is kept."""
    glue, pointers = Glue("rows"), dict[Node, str]()
    stack, seen = [root], set[Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in kept:
            stack += node.inputs
    for node in region.body.nodes:
        if node in seen and node in kept:
            pointers[node] = glue.pointer(kept[node], kept[node].dtype)
        elif node in seen and isinstance(node.op, ops.Input):
            pointers[node] = declare_input(glue, region, node, repack)
    number = glue.call("single_row.number")
    channel = glue.call("single_row.channels", power_of_two(size))
    return Row(glue, region, size, pointers, number, channel)


def rotation(
    region: Region,
    node: Node,
    rows_and_size: tuple[Dim, int],
    kept: dict[Node, Scratch],
    repack: dict[tuple[int, str], Repack],
) -> list[Launch]:
    """Write the launches that compute a rotation: what it rotates, where that is computed, then
    the rotation, a block a program."""
    assert isinstance(node.op, ops.Hadamard)
    (count, size), (x, factor) = rows_and_size, node.inputs
    launches = []
    if not isinstance(x.op, ops.Input) and x not in kept:
        row = row_of(region, x, size, kept, repack)
        source = Scratch(f"before{len(kept)}", torch.float32, (count, size))
        row.store_scratch(x, source)
        launches.append(row.launch(count))
        kept[x] = source
    glue, order, block = Glue("hadamard"), int(factor.tensor.shape[0]), node.op.block
    read = (
        glue.pointer(kept[x], torch.float32)
        if x in kept
        else declare_input(glue, region, x, repack)
    )
    matrix = declare_input(glue, region, factor, repack)
    lines, padded = block // order, 1 if order == 1 else max(16, power_of_two(order))
    number = glue.call("hadamard.block")
    tile = glue.call("hadamard.load", read, number, lines, order, padded)
    if order == 1:
        tile = glue.call("hadamard.scale", tile, matrix)
    else:
        tile = glue.call("hadamard.mix", tile, matrix, order, padded)
    tile = glue.call("hadamard.butterflies", tile, lines, lines.bit_length() - 1, padded)
    if node is region.root:
        target = declare_result(glue, region)
        kept[node] = Scratch("result", torch.float32, ())
    else:
        kept[node] = Scratch(f"rotated{len(kept)}", torch.float32, (count, size))
        target = glue.pointer(kept[node], torch.float32)
    glue.do("hadamard.store", target, number, tile, (order / block) ** 0.5, lines, order, padded)
    blocks = element_count((count, size // block))
    warps = min(8, max(1, lines * padded // CHANNELS_A_WARP))
    return [*launches, glue.launch((Cells(blocks),), warps=warps)]


row_rules: tuple[KernelRule, ...] = (rows,)
