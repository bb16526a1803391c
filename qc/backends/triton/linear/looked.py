"""Terms of codes into tables of up to 16 values that a row has, some rows, or all of them.

    w = sum over parts of factor(output, group) table[output][code]  +  sum of factor(output, group)

Values are looked up in registers (device/tables.py), and go on as unpacked codes do. Integers of
3 bits are codes into a table that is the same for all: that takes fewer instructions. Tables of
columns or of groups of them are decoded element by element, and so are longer ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qc.backends.region import Repack
from qc.backends.triton.emit import Emission
from qc.backends.triton.linear.coded import (
    BLOCK,
    RUN,
    Coded,
    Stream,
    matched,
    plane_of,
    planes_of,
)
from qc.backends.triton.linear.loop import Loop
from qc.backends.triton.linear.place import Place
from qc.ir.weights.weight import Weight

MOST_BITS = 4
"""Of a code: a table of 16 values takes 16 registers for two outputs."""
NUMBERS = 3
"""Bits of the integers that are looked up, too."""
RUNS = 2
"""Runs of 32 channels that are looked up together."""


@dataclass(frozen=True)
class Looked(Coded):
    """A term of codes into tables."""

    rule = "looked"

    def digits(self, emission: Emission, loop: Loop, stream: Stream, run: int) -> tuple[str, str]:
        portable = emission.unpacking == "portable"
        if stream.table is None and (portable or stream.bits != NUMBERS):
            return super().digits(emission, loop, stream, run)
        slot = run // (RUNS * RUN)
        pairs = [
            self.pairs(emission, loop, stream, bits, place, slot)
            for bits, place in planes_of(stream.bits)
        ]
        key = f"looked up {pairs} at {slot}"
        if key not in loop.known:
            module = "portable" if portable else "tables"
            low = stream.table is not None or has_low_bytes(stream, emission.dtype)
            how = f"{planes_of(stream.bits)}, {slot}, {words_of(stream.bits)}, {low}"
            tables = self.tables(emission, loop, stream, low)
            call = f"({', '.join(pairs)},), {tables}, {how}, {emission.dtype_name}"
            loop.known[key] = emission.bind(f"{module}.look_up({call})")
        values, at = loop.known[key], run // RUN % RUNS
        return f"{values}[{2 * at}]", f"{values}[{2 * at + 1}]"

    def pairs(
        self, emission: Emission, loop: Loop, stream: Stream, bits: int, place: int, slot: int
    ) -> str:
        """Load pairs of words of a plane that hold a slot, once."""
        columns = 256 // bits
        start = slot * RUNS * RUN // columns * columns
        name = self.selectors(emission, stream, bits, place)
        key = f"{name} from {start}"
        if key not in loop.known:
            sizes = f"{-(-self.place.outer // BLOCK)}, {bits}, {-(-self.place.inner // columns)}"
            if loop.registers:
                loop.known[key] = loop.pairs_ahead(emission, name, start, columns, sizes)
            else:
                here = loop.stored_at(loop.at(start), columns)
                at = f"{here}, {sizes}, BN, {loop.lanes}"
                loop.known[key] = emission.bind(f"fragments.load_pairs({name}, block, {at})")
        return loop.known[key]

    def tables(self, emission: Emission, loop: Loop, stream: Stream, low: bool) -> str:
        """Load the tables of a tile in front of the loop, once."""
        place, table = self.place, stream.table
        if table is None:
            array, rows = f"{stream.array}/numbers", place.outer
            repack: Repack = partial(packed_numbers, stream, emission.dtype, low)
        else:
            array, rows = f"{table.array}/bytes", table.rows
            repack = partial(packed_tables, table.array, emission.dtype)
        name = emission.weight(place.operand, array, torch.int32, repack)
        key = f"tables {name}"
        if key not in loop.known:
            blocks, count = -(-place.outer // BLOCK), -(-place.outer // rows)
            words = words_of(stream.bits) * (2 if low else 1)
            sizes = f"{blocks}, BN, {loop.lanes}, {rows}, {count}, {words}"
            loop.known[key] = loop.before(emission, f"tables.load({name}, block, {sizes})")
        return loop.known[key]

    def selectors(self, emission: Emission, stream: Stream, bits: int, place: int) -> str:
        """Take a plane as a parameter."""
        lead = "_".join(map(str, stream.lead))
        array = f"{stream.array}/selectors{bits}at{place}" + (f"of{lead}" if lead else "")
        repack = partial(packed, stream, self.place.shape, bits, place)
        return emission.weight(self.place.operand, array, torch.int16, repack)


def words_of(bits: int) -> int:
    """Return the words that hold one byte of each value of a table."""
    return max(1, (1 << bits) // 4)


def numbers_of(stream: Stream, dtype: torch.dtype) -> Tensor:
    """Return what integers stand for, [1, values]."""
    return (torch.arange(1 << stream.bits) * stream.digit + stream.offset).to(dtype)[None]


def has_low_bytes(stream: Stream, dtype: torch.dtype) -> bool:
    """Say whether the low byte of what an integer stands for is not always 0."""
    return bool((numbers_of(stream, dtype).view(torch.int16) & 255).any())


def packed(stream: Stream, shape: tuple[int, int], bits: int, place: int, weight: Weight) -> Tensor:
    """Return a plane of codes in the order of device/tables.py: i16[blocks, steps, 256]."""
    return selectors(plane_of(stream, shape, bits, place, weight), bits)


def selectors(codes: Tensor, bits: int) -> Tensor:
    """Put codes i32[outputs, channels] in the order of device/tables.py, padded with zeros."""
    columns, slots = 256 // bits, 4 // bits
    padded = torch.nn.functional.pad(
        codes, (0, -codes.shape[1] % columns, 0, -codes.shape[0] % BLOCK)
    )
    outputs, channels = padded.shape
    # block, rows, g, step, slot, run, s, h, t, p
    axes = padded.view(outputs // BLOCK, 2, 8, channels // columns, slots, RUNS, 2, 2, 4, 2)
    # block, step, g, t, s, h, rows, run, p, slot
    ordered = axes.permute(0, 3, 2, 8, 6, 7, 1, 5, 9, 4).flatten(7)
    places = torch.arange(ordered.shape[-1], dtype=torch.int32) * bits
    words = (ordered << places).sum(-1)
    return words.to(torch.int16).reshape(outputs // BLOCK, channels // columns, 256).contiguous()


def packed_tables(array: str, dtype: torch.dtype, weight: Weight) -> Tensor:
    """Return the stored tables as words of bytes."""
    return words_of_bytes(weight.arrays()[array].to(dtype).flatten(0, 1), True)


def packed_numbers(stream: Stream, dtype: torch.dtype, low: bool, weight: Weight) -> Tensor:
    """Return the one table of what integers stand for."""
    return words_of_bytes(numbers_of(stream, dtype), low)


def words_of_bytes(values: Tensor, low: bool) -> Tensor:
    """Return tables [tables, values] as words of high bytes, in front of them those of low ones:
    i32[words, tables]."""
    bits = values.contiguous().view(torch.int16).long() & 0xFFFF
    filled = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 4))
    bytes = torch.cat([filled & 255, filled >> 8], 1) if low else filled >> 8
    words = (bytes.view(len(values), -1, 4) << torch.arange(0, 32, 8)).sum(-1)
    return words.to(torch.int32).T.contiguous()  # from 2^31 on: negative


def looked_term(place: Place, run: int = RUN) -> Looked | None:
    """Take a term some of whose weights are looked up, whose factors `run` channels share."""
    found = matched(place, run)
    if found is None:
        return None
    streams = [part.stream for part in found.parts if part.stream is not None]
    if any(each.table is not None and each.bits > MOST_BITS for each in streams):
        return None
    if not any(each.table is not None or each.bits == NUMBERS for each in streams):
        return None
    return Looked(place, found.parts, found.group)
