"""Codes into tables of up to 16 values of 16 bits: looked up in registers, by `prmt`.

A thread holds the tables of its outputs g and g + 8 as words of four low bytes and of four high
ones. `prmt` picks four bytes of eight by four nibbles, so four codes of one output are a selector
as they lie: two words (or four, where a fourth bit chooses between halves of the table) give four
values, exactly. Integers of 3 bits are looked up, too: as planes of 1 and 2 bits they would be
unpacked twice and added. Codes lie as in fragments.py but for this: a word belongs to output g or
g + 8, and nibble i of it to channel p = i % 2 of run i / 2; codes of 1 and 2 bits share the nibbles
with those of further pairs of runs (slots).
Source: PTX ISA 8.5, section 9.7.9.7 (prmt).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def nibbles(mask):
    """Return a mask of four bits eight times, as the number of a 32-bit register."""
    return f"0x{mask * 0x11111111:08x}"


@triton.constexpr_function
def selecting(planes, slot):
    """Return PTX that puts codes together from planes ((bits, place), ...): the nibbles of `codes`.

    Operands of it are behind 8 results, a pair of words a plane.
    """
    lines = ["mov.b32 codes, 0;"]
    for number in range(len(planes)):  # Triton 3.6 reads no nested targets
        bits, place = planes[number]
        shift = bits * (slot % (4 // bits)) - place
        move = "shr.u32" if shift >= 0 else "shl.b32"
        mask = nibbles(((1 << bits) - 1) << place)
        lines.append(f"{move} moved, ${8 + number}, {abs(shift)};")
        lines.append(f"lop3.b32 codes, moved, {mask}, codes, 0xea;")
    return " ".join(lines)


@triton.constexpr_function
def picking(target, words):
    """Return PTX that picks four bytes of the words of a table."""
    if len(words) < 4:
        return f"prmt.b32 {target}, {words[0]}, {words[-1]}, picked;"
    return (
        f"prmt.b32 {target}, {words[0]}, {words[1]}, picked; "
        f"prmt.b32 other, {words[2]}, {words[3]}, picked; "
        f"lop3.b32 {target}, upper, other, {target}, 0xca;"
    )


@triton.constexpr_function
def looking_up(planes, slot, tables):
    """Return PTX for the values of a slot of pairs of words, in the order run, output, p. `tables`
    are the words of two tables: those of low bytes, none where all are 0, and of high ones."""
    bits = sum(each[0] for each in planes)
    lines = [
        ".reg .b32 moved, codes, picked, high, low, other, upper, choice, value;",
        selecting(planes, slot),
    ]
    for output in range(2):
        low, high = tables[output]
        lines.append(f"shr.u32 picked, codes, {16 * output};")
        if bits == 4:
            lines.append("mov.b32 choice, 0x0000ff00; shr.u32 other, picked, 3;")
            lines.append(f"and.b32 other, other, {nibbles(1)};")
            lines.append("prmt.b32 upper, choice, choice, other;")
            lines.append(f"and.b32 picked, picked, {nibbles(7)};")
        lines.append(picking("low", low) if low else "mov.b32 low, 0;")
        lines.append(picking("high", high))
        for run, pattern in enumerate(("0x5140", "0x7362")):
            result = 4 * run + 2 * output
            lines.append(f"prmt.b32 value, low, high, {pattern};")
            lines.append("mov.b32 {" + f"${result}, ${result + 1}" + "}, value;")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def operands(planes, words, low):
    """Return the names of the words of two tables."""
    each = 2 * words if low else words
    names = [f"${8 + len(planes) + number}" for number in range(2 * each)]
    halves = tuple(names[:each]), tuple(names[each:])
    return tuple((half[: each - words], half[-words:]) for half in halves)


@triton.constexpr_function
def registers(planes, words, low):
    """Return the constraints of a lookup: results of 16 bits, pairs of words, tables."""
    return ",".join(["=h"] * 8 + ["r"] * (len(planes) + (4 if low else 2) * words))


@triton.constexpr_function
def types(type):
    """Return the types of the results."""
    return (type,) * 8


@triton.jit
def load(tables, first, BLOCKS: tl.constexpr, OUT: tl.constexpr, LANES: tl.constexpr,
         SHARED: tl.constexpr, COUNT: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """Load the tables, i32[WORDS, COUNT], of OUT outputs from block `first` on: the words of output
    g, then of g + 8. SHARED outputs have one table."""
    block = first + tl.arange(0, OUT * LANES // 16) % (OUT // 16)
    if BLOCKS * 16 % OUT != 0:
        block = tl.minimum(block, BLOCKS - 1)
    found = ()
    for half in tl.static_range(2):
        output = block[:, None] * 16 + tl.arange(0, 8)[None, :] + 8 * half
        number = tl.minimum(output // SHARED, COUNT - 1)
        for word in tl.static_range(WORDS):
            more = (tl.load(tables + (number + word * COUNT))[:, :, None, None, None],)
            found = found + more  # type: ignore[assignment]
    return found


@triton.jit
def look_up(pairs, tables, PLANES: tl.constexpr, SLOT: tl.constexpr, WORDS: tl.constexpr,
            LOW: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """Return the values of 64 channels: of run 0 the outputs g and g + 8, then of run 1. WORDS hold
    one byte of all values; without LOW, lower bytes are 0."""
    ASM: tl.constexpr = looking_up(PLANES, SLOT, operands(PLANES, WORDS, LOW))
    IN: tl.constexpr = registers(PLANES, WORDS, LOW)
    OUT: tl.constexpr = types(TYPE)
    found = tl.inline_asm_elementwise(ASM, IN, pairs + tables, OUT, True, 1)
    return (
        tl.join(found[0], found[1]), tl.join(found[2], found[3]),
        tl.join(found[4], found[5]), tl.join(found[6], found[7]),
    )  # fmt: skip
