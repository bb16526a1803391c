"""Appending to a KV cache, in place; and rotary position embedding, alone or on the way there."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qc.backends.region import RESULT, ArrayArgument, Region
from qc.backends.triton.glue import Glue, power_of_two
from qc.backends.triton.kernel import Call, Cells, KernelRule, Variant
from qc.backends.triton.storage import code_dtype, declare_result, flat, is_cache, stored_dtype
from qc.ir import ops
from qc.ir.node import Node
from qc.ir.types import ActivationFormat, Dim, element_count, symbol

CHANNELS_A_WARP = 256
"""Eight a thread: one load of 16 bytes from float16."""


def cache_shape(node: Node) -> tuple[Dim, ...]:
    """Return the shape of the buffer of a cache."""
    batch, _, heads, dim = node.tensor.shape
    return (batch, symbol("context"), heads, dim)


def codes_of(glue: Glue, operand: int, node: Node, format: ActivationFormat) -> tuple[str, str]:
    """Add pointers to the codes and the scales of a quantized cache, a scale a head."""
    shape = cache_shape(node)
    codes = glue.pointer(ArrayArgument(operand, "codes", shape), code_dtype(format))
    scales = ArrayArgument(operand, "scale", (*shape[:-1], 1))
    return codes, glue.pointer(scales, torch.float32)


def inner_nodes(region: Region) -> list[Node]:
    """Return what a body computes."""
    return [n for n in region.body.nodes if not isinstance(n.op, ops.Input)]


def rope_of(node: Node) -> tuple[Node, Node, Node] | None:
    """Return x, cos, sin where `node` is a rotation of body inputs that pairs channels evenly."""
    if not isinstance(node.op, ops.Rope):
        return None
    x, cos, sin = node.inputs
    rotary = cos.tensor.shape[2]
    if not all(isinstance(n.op, ops.Input) for n in node.inputs):
        return None
    return (x, cos, sin) if isinstance(rotary, int) and rotary % 2 == 0 else None


def declare(glue: Glue, region: Region, node: Node) -> str:
    """Add a pointer to one input: a cache with its room, everything else flat."""
    operand = region.body.inputs.index(node)
    shape = cache_shape(node) if is_cache(region.operands[operand]) else flat(node)
    argument = ArrayArgument(operand, "values", shape)
    return glue.pointer(argument, stored_dtype(region.operands[operand], region.target))


def tile_of(glue: Glue, source: Node, pointers: Mapping[Node, str]) -> tuple[str, list[object]]:
    """Write the loading of the heads of this program's token, rotated where `source` is a rotation.

    Return the name of the tile, and (token, head, channel).
    """
    rotation = rope_of(source)
    x = rotation[0] if rotation else source
    _, seq, heads, dim = x.tensor.shape
    place: list[object] = [
        glue.call("rotary.token"),
        glue.call("rotary.heads", power_of_two(int(heads))),
        glue.call("rotary.channels", power_of_two(int(dim))),
    ]
    if rotation is None:
        return glue.call("rotary.load", pointers[x], *place, heads, dim), place
    _, cos, sin = rotation
    batches, _, rotary = cos.tensor.shape
    token, *rest = place
    tables = pointers[cos], pointers[sin]
    sizes = glue.size(seq), glue.size(batches)
    tile = glue.call(
        "rotary.rotate", pointers[x], *tables, token, *sizes, *rest, heads, dim, rotary
    )  # fmt: skip
    return tile, place


def takes(region: Region, source: Node) -> bool:
    """Say whether `source` is an input of the body or its rotation, with known heads."""
    rotation = rope_of(source)
    x = rotation[0] if rotation else source
    fits = isinstance(x.op, ops.Input) and x.tensor.rank == 4
    known = all(isinstance(d, int) for d in x.tensor.shape[2:])
    operands = [region.operands[i] for i, n in enumerate(region.body.inputs) if n is x]
    return fits and known and not any(map(is_cache, operands))


def append(region: Region) -> Call | None:
    """An append of new keys or values, rotated on the way or not."""
    root = region.root
    if not isinstance(root.op, ops.Append):
        return None
    past, source = root.inputs
    if not isinstance(past.op, ops.Input) or not takes(region, source):
        return None
    if len(inner_nodes(region)) != 1 + (rope_of(source) is not None):
        return None
    glue = Glue("append")
    pointers = {n: declare(glue, region, n) for n in region.body.inputs if n is not past}
    tile, (token, *rest) = tile_of(glue, source, pointers)
    batch, seq, heads, dim = source.tensor.shape
    sizes = glue.size(seq), glue.size(past.tensor.shape[1]), glue.size(symbol("context"))
    format = root.tensor.format
    if format is not None:
        if format.group is not None:
            return None
        written = codes_of(glue, RESULT, root, format)
        code = glue.named(f"codes.to_{format.code}")
        glue.do(
            "rotary.append_codes", *written, code, token, *sizes, *rest, tile, heads, dim,
            format.limit,
        )  # fmt: skip
    else:
        cache = glue.pointer(ArrayArgument(RESULT, "values", cache_shape(root)), root.tensor.dtype)
        glue.do("rotary.append", cache, token, *sizes, *rest, tile, heads, dim)
    launch = glue.launch((Cells(element_count((batch, seq))),), warps_for(int(heads), int(dim)))
    in_place = region.body.inputs.index(past)
    return Call(element_count((batch, seq)), (Variant(None, (launch,)),), {}, in_place)


def rope(region: Region) -> Call | None:
    """A rotation alone."""
    root = region.root
    if rope_of(root) is None or not takes(region, root) or len(inner_nodes(region)) != 1:
        return None
    glue = Glue("rope")
    pointers = {n: declare(glue, region, n) for n in region.body.inputs}
    tile, place = tile_of(glue, root, pointers)
    batch, seq, heads, dim = root.tensor.shape
    glue.do("rotary.store", declare_result(glue, region), *place, tile, heads, dim)
    count = element_count((batch, seq))
    launch = glue.launch((Cells(count),), warps_for(int(heads), int(dim)))
    return Call(count, (Variant(None, (launch,)),))


def warps_for(heads: int, dim: int) -> int:
    """Return the warps that hold the heads of a token."""
    return min(8, max(1, power_of_two(heads) * power_of_two(dim) // CHANNELS_A_WARP))


append_rules: tuple[KernelRule, ...] = (append, rope)
