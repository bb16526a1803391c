"""Codes of up to 4 bits whose values are a table of each row, or of a segment of a row.

The table of an output lies in registers, a byte of float32 values in each; one instruction looks a
byte of as many codes up as a vector has, and interleaving the bytes gives floats: see
`code_values.Planes`. Lanes go along the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor
from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.along_inputs import AlongInputs, prefetch_codes
from qc.backends.tvm.linear.bit_serial_reader import shuffled
from qc.backends.tvm.linear.byte_lookup import byte_lookup
from qc.backends.tvm.linear.code_products import CODE, TABLE_BITS, in_segments, own_code, replaced
from qc.backends.tvm.linear.code_values import PLANES, TABLE, Planes
from qc.backends.tvm.linear.codes import Part
from qc.backends.tvm.linear.layout import ROWS_AT_ONCE, STEP, Piece, pieces_of
from qc.backends.tvm.linear.skeleton import Signature
from qc.backends.tvm.linear.term import Place, TermKernel
from qc.backends.tvm.linear.vectors import span
from qc.ir.weights.affine import simplify
from qc.ir.weights.expression import (
    COL,
    ROW,
    Code,
    Expr,
    Load,
    TorchRendering,
    is_structural,
    walk,
)
from qc.ir.weights.packing import unpack_codes

PREFETCH_BYTES = 1024
"""Ahead in the codes of a row, and of the next ones, which follow it."""

LEAST_SEGMENT = 64
"""Columns that must share a table for it to be smaller than what it saves."""


@dataclass(frozen=True)
class RowCodes:
    """The codes of `bits` bits of a matrix, row after row, for vectors of `size` bytes.

    A step is as many columns as fill whole vectors with pieces of codes; in each piece of b bits,
    the first `size` columns are in the lowest b bits of every byte, the next ones above them.
    """

    array: str
    bits: int
    inner: int
    size: int
    order: tuple[int, ...]
    """Which code of `size` columns each byte holds."""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """How codes are split."""
        return pieces_of(self.bits)

    @property
    def vectors(self) -> int:
        """Vectors of codes in a step."""
        return 8 // min(piece.width for piece in self.pieces)

    @property
    def width(self) -> int:
        """Columns of a step."""
        return self.vectors * self.size

    @property
    def step_bytes(self) -> int:
        return self.width * self.bits // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of a row; the last step is full."""
        return -(-self.inner // self.width) * self.step_bytes

    def start(self, piece: Piece) -> int:
        """Return where a piece starts in a step."""
        return self.width * piece.shift // 8

    def repack(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the codes u8[rows, row_bytes]."""
        parts = [self.packed(rows) for rows in arrays[self.array].split(ROWS_AT_ONCE)]
        return torch.cat(parts) if parts else torch.empty(0, self.row_bytes, dtype=torch.uint8)

    def packed(self, rows: Tensor) -> Tensor:
        """Return the codes of some rows."""
        codes = unpack_codes(rows, self.bits, self.inner)
        padded = torch.nn.functional.pad(codes, (0, -self.inner % self.width))
        vectors = padded.unflatten(1, (-1, self.vectors, self.size))[..., list(self.order)]
        found = []
        for piece in self.pieces:
            bits = (vectors >> piece.shift) & ((1 << piece.width) - 1)
            places = bits.unflatten(2, (-1, 8 // piece.width))
            shifts = torch.arange(0, 8, piece.width, dtype=torch.uint8).view(-1, 1)
            found.append((places << shifts).sum(3, dtype=torch.uint8).flatten(2))
        return torch.cat(found, 2).flatten(1)


@dataclass(frozen=True, eq=False)
class RowTables(AlongInputs):
    """Look codes up in the tables of their row, one for every `segment` columns."""

    rule: ClassVar[str] = "row_tables"
    codes: RowCodes
    planes: Planes
    segment: int | None

    @property
    def work(self) -> float:
        return 2.5  # counted on AVX2, for 3 planes

    @property
    def width(self) -> int:
        return self.codes.width

    @property
    def segments(self) -> int:
        """Tables of a row."""
        return 1 if self.segment is None else -(-self.place.inner // self.segment)

    def declare(self, signature: Signature) -> None:
        outer = self.place.outer
        shape = (outer, self.codes.row_bytes)
        self.place.declare(signature, "lanes", "uint8", shape, self.codes.repack)
        tables = (outer, self.segments, self.planes.count, TABLE)
        self.place.declare(signature, "planes", "uint8", tables, self.tables)
        super().declare(signature)

    def tables(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the tables u8[rows, segments, planes, 16], the lowest byte first."""
        rows, entries = self.place.outer, 1 << self.codes.bits
        starts = torch.arange(self.segments, dtype=torch.int32) * (self.segment or 0)
        indices = {
            CODE.axis: torch.arange(entries, dtype=torch.int32),
            ROW.axis: torch.arange(rows, dtype=torch.int32).view(-1, 1, 1),
            COL.axis: starts.view(-1, 1),
        }
        found = TorchRendering(arrays, indices).value(self.planes.value).float()
        values = found.expand(rows, self.segments, entries)
        padded = torch.nn.functional.pad(values, (0, TABLE - entries)).contiguous()
        bytes: Tensor = padded.view(torch.uint8).unflatten(2, (TABLE, 4)).transpose(2, 3)
        return bytes[:, :, -self.planes.count :]

    def reader(self, signature: Signature) -> Callable[[Any], TableReader]:
        codes = self.place.buffer(signature, "lanes")
        tables = self.place.buffer(signature, "planes")

        def read(output: Any) -> TableReader:
            loaded = None if self.segment else load(tables, output, T.int64(0), self.planes)
            return TableReader(self, codes, tables, output, loaded)

        return read


@dataclass(frozen=True)
class TableReader:
    """The codes and the tables of one output."""

    kernel: RowTables
    codes: Any
    tables: Any
    output: Any
    loaded: list[Any] | None

    def vectors(self, step: Any, count: int) -> Iterator[list[Any]]:
        """Yield the float32 vectors of a step."""
        codes, planes, lanes = self.kernel.codes, self.kernel.planes, self.kernel.lanes
        start = T.Bind(step * codes.step_bytes)
        prefetch_codes(self.codes, self.output, start, codes.step_bytes)
        tables = self.loaded
        if tables is None:
            assert self.kernel.segment is not None
            number = T.floordiv(step * codes.width, T.int64(self.kernel.segment))
            tables = load(self.tables, self.output, number, planes)
        chunks: dict[int, Any] = {}
        for vector in range(-(-count // codes.size)):
            parts = []
            for piece in codes.pieces:
                number, place = divmod(vector, 8 // piece.width)
                at = codes.start(piece) + number * codes.size
                if at not in chunks:
                    chunks[at] = T.Bind(self.codes[self.output, span(start + at, codes.size)])
                part = Part(chunks[at], place * piece.width, piece.width, piece.shift)
                parts.append(part.as_bytes(codes.size, piece.shift))
            floats = planes.widen(T.Bind(reduce(T.bitwise_or, parts)), tables)
            left = -(-(count - vector * codes.size) // lanes)
            for value in floats[:left]:
                yield [value]


def load(tables: Any, output: Any, segment: Any, planes: Planes) -> list[Any]:
    """Load the tables of a segment of an output, each repeated over the vector."""
    found, copies = [], planes.size // TABLE
    for plane in range(planes.count):
        table = T.Bind(tables[output, segment, T.int64(plane), span(0, TABLE)])
        found.append(T.Bind(shuffled([table] * copies, [*range(TABLE)] * copies)))
    return found


def row_tables_term(place: Place) -> TermKernel | None:
    """Look codes up that have one meaning in a row, or in segments of it."""
    decode = place.format.decode(place.shape, ROW, COL)
    lookup = byte_lookup(place.target)
    if is_structural(decode) or place.inner < STEP or lookup is None:
        return None
    decode = simplify(decode, dict(zip((ROW, COL), place.shape, strict=True)))
    code = own_code(decode)
    if code is None or code.width > TABLE_BITS:
        return None
    value = replaced(decode, code)
    if any(CODE in each.indices and isinstance(each, Code) for each in walk(value)):
        return None
    planes = Planes(place.target.vector_bytes, value, planes_of(value, place), lookup)
    order = [0] * planes.size
    for number in range(planes.size):
        order[planes.byte_of(*divmod(number, planes.lanes))] = number
    codes = RowCodes(code.array, code.width, place.inner, planes.size, tuple(order))
    segment = segment_of(value, codes.width, place.inner)
    if segment == 0:
        return None
    return RowTables(place, None, {}, codes, planes, segment)


def planes_of(value: Expr, place: Place) -> int:
    """Return how many bytes of float32 values are wanted: all, where they are computed."""
    match value:
        case Load(array, _):
            return PLANES.get(place.specs[array].dtype, 4)
    return 4


def segment_of(value: Expr, width: int, inner: int) -> int | None:
    """Return the columns that share a table, in whole steps: None for all of them, 0 if too few."""
    if COL not in value.indices:
        return None
    segment = max(width, LEAST_SEGMENT)
    if not in_segments(value, segment):
        return 0
    while segment < inner and in_segments(value, 2 * segment):
        segment *= 2
    return segment
