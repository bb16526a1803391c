"""Coded terms times int8 activations: products of bytes, exact in int32.

Activations that share a scale over fewer channels than LEAST_GROUP are multiplied as float16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qc.backends.triton.emit import Emission
from qc.backends.triton.linear.coded import BLOCK, RUN, Coded, CodedPart, Stream, coded_term
from qc.backends.triton.linear.loop import Loop, Source
from qc.backends.triton.linear.place import Place
from qc.ir.target import LEAST_GROUP
from qc.ir.weights.expression import Const, arith
from qc.ir.weights.packing import unpack_codes
from qc.ir.weights.weight import Weight


@dataclass(frozen=True)
class Int8Coded(Coded):
    """A term of streams of 4 or 8 bits; `scale` is the activations' parameter, `groups` how many
    each row has, of `row_group` channels."""

    rule = "int8"
    source: Source | None = None

    @property
    def width(self) -> int:
        return max(self.group, 64)

    @property
    def unit(self) -> int:
        return min(self.group, 64)

    def value(self, emission: Emission, loop: Loop, part: CodedPart, start: int) -> str:
        source = self.source
        assert source is not None
        if part.stream is None:
            found, unit = self.summed(emission, loop, start), 1.0
        else:
            found = self.product(emission, loop, part.stream, start)
            unit = 1 / 16 if part.stream.bits == 4 else 1.0
        scale = row_scale(emission, loop, source, start)
        return emission.bind(f"int8.scaled({found}, {scale}, {unit!r})")

    def product(self, emission: Emission, loop: Loop, stream: Stream, start: int) -> str:
        run = partial(self.run, emission, loop, stream)
        return product_of(emission, loop, run, start, self.group, "int8")

    def summed(self, emission: Emission, loop: Loop, start: int) -> str:
        """Write the sums of the activations' codes, once."""
        key = f"int8 sums {start}"
        if key not in loop.known:
            result = None
            for at in range(start, start + self.group, loop.unit):
                ones = f"int8.ones(BN, {loop.unit})"
                result = multiplied(emission, "int8", result, ones, loop.x(at))
            assert result is not None
            loop.known[key] = result
        return loop.known[key]

    def run(self, emission: Emission, loop: Loop, stream: Stream, start: int) -> str:
        """Write the signed codes of a run of 32 channels."""
        columns = 256 // stream.bits
        steps = -(-self.place.inner // columns)
        blocks = -(-self.place.outer // BLOCK)
        lead = "_".join(map(str, stream.lead))
        array = f"{stream.array}/bytes" + (f"of{lead}" if lead else "")
        repack = partial(packed, stream, self.place.shape)
        name = emission.weight(self.place.operand, array, torch.int8, repack)
        at = start // columns * columns
        key = f"{name} from {at}"
        if key not in loop.known:
            here = loop.stored_at(loop.at(at), columns)
            size = f"{blocks}, {stream.bits}, {steps}, BN"
            loaded = emission.bind(f"int8.load({name}, block, {here}, {size})")
            four = stream.bits == 4
            unpack = "int8.unpack" if emission.unpacking == "fragments" else "portable.unpack_bytes"
            loop.known[key] = emission.bind(f"{unpack}({loaded})") if four else loaded
        codes = loop.known[key]
        return f"{codes}[{start % columns // RUN}]" if stream.bits == 4 else codes


def product_of(
    emission: Emission, loop: Loop, run: Callable[[int], str], start: int, group: int, module: str
) -> str:
    """Write the product of a group's bytes with x; `run` loads those of 32 channels, `module` has
    the products."""
    result = None
    for at in range(start, start + group, loop.unit):
        runs = [run(channel) for channel in range(at, at + loop.unit, RUN)]
        kind = "left" if len(runs) == 1 else "left64"
        left = emission.bind(f"int8.{kind}({', '.join(runs)}, BN)")
        result = multiplied(emission, module, result, left, loop.x(at))
    assert result is not None
    return result


def multiplied(emission: Emission, module: str, result: str | None, left: str, x: str) -> str:
    """Write a product, added to what is there."""
    if result is None:
        return emission.bind(f"{module}.product({left}, {x})")
    return emission.bind(f"{module}.more({result}, {left}, {x})")


def row_scale(emission: Emission, loop: Loop, source: Source, start: int) -> str:
    """Write the load of the rows' scales for the channels from `start` on, ahead and once."""
    assert source.scale is not None
    groups = -(-source.channels // source.group)
    key = f"row scales {start // source.group if source.group < loop.width else 0}"
    if key not in loop.known:
        name = emission.array("x_scale", source.scale, torch.float32)
        if groups == 1:
            call = f"int8.row_scales({name}, rows, 0, 1)"
            loop.known[key] = emission.bind(call)
        else:
            size = min(source.group, loop.width)
            call = f"int8.row_scales({name}, rows, {{}}, {groups})"
            if source.group > size:
                call = call.replace("{}", f"{{}} // {source.group // size}")
            loop.known[key] = loop.loaded_ahead(emission, size, start // size, call)
    return loop.known[key]


def packed(stream: Stream, shape: tuple[int, int], weight: Weight) -> Tensor:
    """Return codes in the order of device/int8.py: i8[blocks, steps, 512]."""
    stored = weight.arrays()[stream.array][stream.lead]
    codes = unpack_codes(stored, stream.bits, shape[1]).int()
    return byte_fragments(codes ^ 128 if stream.bits == 8 else codes, stream.bits)


def byte_fragments(codes: Tensor, bits: int) -> Tensor:
    """Put codes i32[outputs, channels] in the order of device/int8.py, padded with zeros."""
    columns = 256 // bits
    padded = torch.nn.functional.pad(
        codes, (0, -codes.shape[1] % columns, 0, -codes.shape[0] % BLOCK)
    )
    outputs, channels = padded.shape
    # block, r, g, step, run, h, t, i
    axes = padded.view(outputs // BLOCK, 2, 8, channels // columns, columns // RUN, 2, 4, 4)
    ordered = axes.permute(0, 3, 2, 6, 1, 5, 7, 4)  # block, step, g, t, r, h, i, run
    places = torch.arange(ordered.shape[-1], dtype=torch.int32) * bits
    bytes = (ordered << places).sum(-1)
    return bytes.to(torch.uint8).view(torch.int8).reshape(outputs // BLOCK, -1, 512).contiguous()


def int8_term(place: Place, source: Source) -> Int8Coded | None:
    """Take a coded term of 4 or 8 bits, where the activations' groups are wide enough."""
    found = coded_term(place)
    if found is None or source.kind != "quantized" or source.code != "int8":
        return None
    row_group = min(source.group, source.channels)
    if row_group < min(LEAST_GROUP, source.channels) or row_group % found.group:
        return None
    streams = [part.stream for part in found.parts if part.stream is not None]
    if any(s.bits not in (4, 8) or s.digit != 1 or s.half is not None for s in streams):
        return None
    parts = around_middle(found.parts)
    return Int8Coded(place, parts, found.group, replace(source, kind="codes"))


def around_middle(parts: Sequence[CodedPart]) -> tuple[CodedPart, ...]:
    """Write codes around their middle:  s (q + o)  -->  s (q - m) + s (o + m)."""
    found: list[CodedPart] = []
    for part in parts:
        found.append(part)
        if part.stream is not None:
            rest = part.stream.offset + (1 << (part.stream.bits - 1))
            if rest:
                factor = Const(float(rest))
                scaled = factor if part.factor is None else arith("mul", part.factor, factor)
                found.append(CodedPart(scaled, None))
    return tuple(found)
