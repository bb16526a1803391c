"""Terms that are codes times factors that runs of 32 channels share.

    w = sum over parts of factor(output, group) (q - zero)  +  sum of factor(output, group)

Integers of 2 to 8 bits with scales, zero points or minima in any form, bit planes, 2-bit ternaries:
what counts is the decode expression, not the format. Codes are unpacked in registers, in the order
of tensor cores; a factor multiplies the product of a group, not each weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from qc.backends.triton.emit import Emission
from qc.backends.triton.linear.loop import Loop, Term
from qc.backends.triton.linear.place import Place
from qc.ir.weights.affine import depends_on, simplify
from qc.ir.weights.expression import (
    COL,
    ROW,
    Arith,
    AsHalf,
    Code,
    Const,
    Expr,
    Index,
    Load,
    ToFloat,
    is_structural,
    rebuild,
    substitute_indices,
)
from qc.ir.weights.factored import FormPart, columns_of_step, factored
from qc.ir.weights.packing import unpack_codes
from qc.ir.weights.weight import ArraySpec, Weight

RUN = 32
"""Channels that one word's code covers over a warp's threads: see device/fragments.py."""
BLOCK = 16
STEP, GROUP, REST = Index("step"), Index("group"), Index("rest")
LARGEST_GROUP = 128
LARGEST_UNIT = 64
"""Channels that are multiplied at once."""


@dataclass(frozen=True)
class Table:
    """An array of values [tables, 1, 2^bits], one for so many rows."""

    array: str
    rows: int


@dataclass(frozen=True)
class Stream:
    """Codes of `bits` bits that a term reads one after the other: an array of bytes, the places
    on its leading axes, and what its values are: digit * code + offset."""

    array: str
    lead: tuple[int, ...]
    bits: int
    digit: int = 1
    offset: int = 0
    half: tuple[int, int] | None = None
    """Of codes that are small floats: a code's lowest bits, so many, moved up by so much, and its
    highest bit as the sign, are the float16 that it stands for."""
    table: Table | None = None
    """Of codes that are places in a table."""


@dataclass(frozen=True)
class CodedPart:
    """factor * values; `factor` None is 1, over ROW and GROUP; `stream` None is a 1."""

    factor: Expr | None
    stream: Stream | None


def planes_of(bits: int) -> tuple[tuple[int, int], ...]:
    """Return the planes that store codes, (bits, place of the lowest bit), the smallest first, so
    that no digit leaves float16 while it is unpacked."""
    if bits == 8:
        return ((8, 0),)
    found, place = [], 0
    for width in (1, 2, 4):
        if bits & width:
            found.append((width, place))
            place += width
    return tuple(found)


@dataclass(frozen=True)
class Coded(Term):
    """A term of coded parts, whose factors are constant over `group` channels."""

    place: Place
    parts: tuple[CodedPart, ...]
    group: int
    rule = "coded"

    @property
    def width(self) -> int:
        narrowest = min(
            (w for p in self.parts if p.stream for w, _ in planes_of(p.stream.bits)), default=4
        )
        return max(self.group, 256 // narrowest)

    @property
    def unit(self) -> int:
        return min(self.group, LARGEST_UNIT)

    @property
    def bits(self) -> int:
        """Bits of codes that are loaded for a weight."""
        return sum(part.stream.bits for part in self.parts if part.stream is not None)

    def emit(self, emission: Emission, loop: Loop, acc: str) -> None:
        for part in self.parts:
            factors = self.factors(emission, loop, part)
            for number, factor in enumerate(factors):
                start = number * self.group
                value = self.value(emission, loop, part, start)
                if factor is None:
                    emission.line(f"{acc} += {value}")
                else:
                    alike = part.factor is None or not depends_on(part.factor, ROW)
                    kind = "scaled_alike" if alike else "scaled"
                    emission.line(f"{acc} = fragments.{kind}({acc}, {value}, {factor})")

    def value(self, emission: Emission, loop: Loop, part: CodedPart, start: int) -> str:
        """Write what a factor multiplies, for the group from `start` on; return its name."""
        if part.stream is None:
            return loop.sums(emission, start, self.group)
        return self.product(emission, loop, part.stream, start)

    def factors(self, emission: Emission, loop: Loop, part: CodedPart) -> list[str | None]:
        """Write the factors of all groups of a step."""
        groups = loop.width // self.group
        if part.factor is None:
            return [None] * groups
        if isinstance(part.factor, Const):
            return [f"{float(part.factor.value)!r}"] * groups
        turned, repacked = transposed(self.place, part.factor)
        raw = isinstance(turned, Load)
        name, arrays = self.place.function(emission, turned, (ROW, GROUP), repacked, raw)
        call = f"{name}({loop.out}, {{}}{arrays})"
        return [loop.loaded_ahead(emission, self.group, n, call) for n in range(groups)]

    def product(self, emission: Emission, loop: Loop, stream: Stream, start: int) -> str:
        """Write the product of the codes of a group with x; return its name."""
        result = None
        for at in range(start, start + self.group, loop.unit):
            runs = [
                self.digits(emission, loop, stream, run) for run in range(at, at + loop.unit, RUN)
            ]
            flat = ", ".join(name for run in runs for name in run)
            kind = {1: "left", 2: "left64", 4: "left128"}[len(runs)]
            left = emission.bind(f"fragments.{kind}({flat}, {loop.size})")
            x = loop.x(at)
            call = f"product({left}, {x})" if result is None else f"more({result}, {left}, {x})"
            result = emission.bind(f"fragments.{call}")
        assert result is not None
        return result

    def digits(self, emission: Emission, loop: Loop, stream: Stream, run: int) -> tuple[str, str]:
        """Write the unpacked codes of a run of 32 channels, of outputs g and g + 8."""
        planes = planes_of(stream.bits)
        found: list[tuple[str, str]] = []
        for number, (bits, place) in enumerate(planes):
            columns = 256 // bits
            zero = -stream.offset if number == 0 else 0
            words = self.words(emission, loop, stream, bits, place, run // columns * columns)
            key = f"{words} as {bits}, {stream.digit << place}, {zero}"
            module, type = emission.unpacking, emission.dtype_name
            if key not in loop.known and stream.half is not None:
                bits_and_place = ", ".join(map(str, stream.half))
                call = f"{module}.unpack_halves({words}, {bits}, {bits_and_place}, {type})"
                loop.known[key] = emission.bind(call)
            elif key not in loop.known:
                code = f"{bits}, {stream.digit << place}, {zero}"
                call = f"{module}.unpack({words}, {code}, {type})"
                loop.known[key] = emission.bind(call)
            codes, at = loop.known[key], run % columns // RUN
            found.append((f"{codes}[{2 * at}]", f"{codes}[{2 * at + 1}]"))
        total = found[0]
        for more in found[1:]:
            upper, lower = (
                emission.bind(f"fragments.added({a}, {b})")
                for a, b in zip(total, more, strict=True)
            )
            total = upper, lower
        return total

    def words(
        self, emission: Emission, loop: Loop, stream: Stream, bits: int, place: int, start: int
    ) -> str:
        """Load the words of a plane from channel `start` of the step on, once."""
        blocks = -(-self.place.outer // BLOCK)
        steps = -(-self.place.inner // (256 // bits))
        name = self.plane(emission, stream, bits, place)
        key = f"{name} from {start}"
        if key not in loop.known:
            sizes = f"{blocks}, {bits}, {steps}"
            if loop.registers:
                loop.known[key] = loop.codes_ahead(emission, name, start, 256 // bits, sizes)
            else:
                here = loop.stored_at(loop.at(start), 256 // bits)
                at = f"{here}, {sizes}, BN, {loop.lanes}"
                loop.known[key] = emission.bind(f"fragments.load({name}, block, {at})")
        return loop.known[key]

    def plane(self, emission: Emission, stream: Stream, bits: int, place: int) -> str:
        """Take a plane as a parameter."""
        lead = "_".join(map(str, stream.lead))
        array = f"{stream.array}/plane{bits}at{place}" + (f"of{lead}" if lead else "")
        repack = partial(packed, stream, self.place.shape, bits, place)
        return emission.weight(self.place.operand, array, torch.int16, repack)


def packed(stream: Stream, shape: tuple[int, int], bits: int, place: int, weight: Weight) -> Tensor:
    """Return a plane of a stream of codes in fragment order: i16[blocks, steps, 256]."""
    return fragments(plane_of(stream, shape, bits, place, weight), bits)


def plane_of(
    stream: Stream, shape: tuple[int, int], bits: int, place: int, weight: Weight
) -> Tensor:  # fmt: skip
    """Return `bits` bits of codes from bit `place` on: i32[outputs, channels]."""
    stored = weight.arrays()[stream.array][stream.lead]
    codes = unpack_codes(stored, stream.bits, shape[1]).int()
    return (codes >> place) & ((1 << bits) - 1)


def fragments(codes: Tensor, bits: int) -> Tensor:
    """Put codes i32[outputs, channels] in the order of device/fragments.py, padded with zeros."""
    columns = 256 // bits
    padded = torch.nn.functional.pad(
        codes, (0, -codes.shape[1] % columns, 0, -codes.shape[0] % BLOCK)
    )
    outputs, channels = padded.shape
    # block, rows, g, step, run, s, h, t, p
    axes = padded.view(outputs // BLOCK, 2, 8, channels // columns, columns // RUN, 2, 2, 4, 2)
    ordered = axes.permute(0, 3, 2, 7, 5, 6, 8, 4, 1)  # block, step, g, t, s, h, p, run, rows
    digits = ordered.flatten(7)
    words = (digits << (torch.arange(digits.shape[-1], dtype=torch.int32) * bits)).sum(-1)
    return words.to(torch.int16).reshape(outputs // BLOCK, channels // columns, 256).contiguous()


def transposed(
    place: Place, factor: Expr
) -> tuple[Expr, dict[str, tuple[ArraySpec, partial[Tensor]]]]:
    """Let arrays of a factor that rows read first be read by rows last: neighbouring threads have
    neighbouring outputs."""
    repacked: dict[str, tuple[ArraySpec, partial[Tensor]]] = {}

    def change(each: Expr) -> Expr:
        inner = rebuild(each, change)
        match inner:
            case Load(array, (first, second)) if depends_on(first, ROW) and not depends_on(
                second, ROW
            ):
                spec = place.specs[array]
                turned = replace(spec, shape=spec.shape[::-1])
                repacked[f"{array}/across"] = turned, partial(across, array)
                return Load(f"{array}/across", (second, first))
        return inner

    return change(factor), repacked


def across(array: str, weight: Weight) -> Tensor:
    """Return a matrix of a weight transposed."""
    return weight.arrays()[array].T.contiguous()


# ---------------------------------------------------------------- matching


def coded_term(place: Place, run: int = RUN) -> Coded | None:
    """Take a term whose weights are codes times factors that `run` channels share."""
    found = matched(place, run)
    if found is None or any(part.stream and part.stream.table for part in found.parts):
        return None
    return found


@lru_cache(maxsize=64)
def matched(place: Place, run: int = RUN) -> Coded | None:
    """View weights as codes, or places in tables, times factors that `run` channels share at least.
    Remembered: several rules ask, and for every number of rows that kernels are made for."""
    if is_structural(place.decode) or place.inner < RUN:
        return None
    columns = columns_of_step(place.decode, STEP * run, run, {ROW: place.outer})
    parts = [coded_part(part, place) for part in factored(columns)]
    found = [part for part in parts if part is not None]
    if len(found) != len(parts) or not any(part.stream for part in found):
        return None
    found = with_zero_points(found)
    most = max(1, min(LARGEST_GROUP, place.inner) // RUN)
    for runs in (4, 2, 1) if run == RUN else (1,):
        if runs <= most:
            grouped = [over_groups(part, runs, run, place) for part in found]
            if all(part is not None for part in grouped):
                kept = tuple(part for part in grouped if part is not None)
                return Coded(place, kept, runs * run)
    return None


def coded_part(part: FormPart, place: Place) -> CodedPart | None:
    """View a part as codes times a factor; None where its values are something else."""
    if part.values is None:
        return CodedPart(part.factor, None)
    run = len(part.values)
    streams = {stream_of(value, column, run, place) for column, value in enumerate(part.values)}
    if len(streams) != 1 or (stream := streams.pop()) is None:
        return None
    return CodedPart(part.factor, stream)


def stream_of(value: Expr, column: int, run: int, place: Place) -> Stream | None:
    """View the value of a column of a step of `run` as digit * code + offset, as a small float, or
    as what stands in a table."""
    digit, offset = 1, 0
    match value:
        case ToFloat(inner):
            value = inner
        case AsHalf(inner):
            return half_stream(inner, column, run)
        case Load():
            return table_stream(value, column, run, place)
        case _:
            return None
    match value:
        case Arith("sub", inner, Const(int(number))):
            value, offset = inner, -number
        case Arith("add", inner, Const(int(number))):
            value, offset = inner, number
    match value:
        case Arith("mul", inner, Const(int(number))):
            value, digit = inner, number
    lead = lead_of(value, column, run)
    if lead is None or not isinstance(value, Code):
        return None
    return Stream(value.array, lead, value.width, digit, offset)


def lead_of(code: Expr, column: int, run: int) -> tuple[int, ...] | None:
    """Return the places on the leading axes of a code's array; None where it is not the code of
    its own column and row."""
    if not isinstance(code, Code) or not 1 <= code.width <= 8:
        return None
    lead = code.index[:-1]
    if code.index[-1] != ROW or not all(isinstance(each, Const) for each in lead):
        return None
    if simplify(code.position - (STEP * run + column) * code.width, {}) != Const(0):
        return None
    return tuple(int(each.value) for each in lead if isinstance(each, Const))


def half_stream(bits: Expr, column: int, run: int) -> Stream | None:
    """View the bits of a float16 as those of a code of 4 or 8 bits:
    (code & mask) << place | (code >> sign) << 15."""
    match bits:
        case Arith(
            "or",
            Arith("shl", Arith("and", Code() as code, Const(int(mask))), Const(int(place))),
            Arith("shl", Arith("shr", Code() as again, Const(int(sign))), Const(15)),
        ) if code == again and code.width in (4, 8):
            lead = lead_of(code, column, run)
            if lead is None or sign != code.width - 1 or mask != (1 << sign) - 1:
                return None
            return Stream(code.array, lead, code.width, half=(sign, place))
    return None


def table_stream(value: Load, column: int, run: int, place: Place) -> Stream | None:
    """View a value as one of a table that a row has, some rows, or all."""
    match value.index:
        case (number, Const(0), Code() as code):
            rows = rows_of_table(number, place.outer)
            lead = lead_of(code, column, run)
            if rows is None or lead is None or place.specs[value.array].dtype != torch.float16:
                return None
            return Stream(code.array, lead, code.width, table=Table(value.array, rows))
    return None


def rows_of_table(number: Expr, outer: int) -> int | None:
    """Return how many rows share the table of this number."""
    match number:
        case Const(0):
            return outer
        case Arith("floordiv", left, Const(int(rows))) if left == ROW:
            return rows
    return 1 if number == ROW else None


def over_groups(part: CodedPart, runs: int, run: int, place: Place) -> CodedPart | None:
    """Write a factor over groups of `runs` times `run` channels; None where it varies inside."""
    if part.factor is None:
        return part
    if COL in part.factor.indices:
        return None
    groups = -(-place.inner // (runs * run))
    sizes = {GROUP: groups, REST: runs, ROW: place.outer}
    at = GROUP * runs + REST if runs > 1 else GROUP
    wide = simplify(substitute_indices(part.factor, {STEP: at}), sizes)
    return None if depends_on(wide, REST) else replace(part, factor=wide)


def with_zero_points(parts: Sequence[CodedPart]) -> list[CodedPart]:
    """Fold constant zero points into the codes:  s q + (-8 s) 1  -->  s (q - 8)."""
    kept = list(parts)
    for part in parts:
        if part.stream is None or part.stream.offset or part.stream.half or part.stream.table:
            continue
        for other in kept:
            number = multiple_of(other, part)
            if number is not None:
                kept.remove(other)
                kept[kept.index(part)] = replace(part, stream=replace(part.stream, offset=number))
                break
    return kept


def multiple_of(other: CodedPart, part: CodedPart) -> int | None:
    """Return c where `other` is c times the factor of `part`, without codes."""
    if other.stream is not None:
        return None
    if part.factor is None:
        match other.factor:
            case Const(float(number)) if number == int(number):
                return int(number)
        return None
    match other.factor:
        case Arith("mul", left, Const(float(number))) if left == part.factor:
            return int(number) if number == int(number) else None
        case Arith("mul", Const(float(number)), right) if right == part.factor:
            return int(number) if number == int(number) else None
    return None
