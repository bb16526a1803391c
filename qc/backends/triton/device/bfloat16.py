"""Codes in the order of fragments.py, unpacked to bfloat16 instead of float16.

A bfloat16 has 8 significant bits: 128 + q holds q below 128, so wider codes come in two halves, and
all of q - zero within -256 .. 256 is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qc.backends.triton.device.fragments import registers


@triton.constexpr_function
def is_brain(value):
    """Say whether a number is a bfloat16, but for its range."""
    size = abs(value)
    while size and size < 128:
        size *= 2
    while size >= 256:
        size /= 2
    return size == int(size)


@triton.constexpr_function
def brain_pair(value):
    """Return a bfloat16 twice, as the number of a 32-bit register."""
    if value == 0:
        return "0x00000000"
    size, exponent = abs(value), 0
    while size >= 2:
        size, exponent = size / 2, exponent + 1
    while size < 1:
        size, exponent = size * 2, exponent - 1
    bits = (int(value < 0) << 15) | ((exponent + 127) << 7) | int((size - 1) * 128)
    return f"0x{bits:04x}{bits:04x}"


@triton.constexpr_function
def conversion(bits, unit, zero):
    """Return PTX that turns two words of codes q into 16 / bits pairs of bfloat16 unit q - zero.

    As in fragments.py: one `lop3` cuts bits out and puts in the exponent of 128, one `fma` takes it
    off. Codes of 8 bits are (q & 15) - zero, and 16 times the upper half added to it.
    """
    count = 16 // bits
    if bits == 8:
        return wide_conversion(unit, zero)
    lines = [".reg .b32 moved, raw, magic, scale, offset;", "mov.b32 magic, 0x43004300;"]
    source, shifted = f"${count}", 0
    for number in range(count):
        place = number * bits
        low = place - shifted
        if low + bits > 7 or not is_brain(128 * unit / (1 << low) + zero):
            low = 0
            while not is_brain(128 * unit / (1 << low) + zero):
                low += 1  # less of the exponent's 128 is left beside the zero
            shifted = place - low
            move = "shr.u32" if shifted >= 0 else "shl.b32"
            lines.append(f"{move} moved, ${count}, {abs(shifted)};")
            source = "moved"
        mask = ((1 << bits) - 1) << low
        step = unit / (1 << low)
        lines.append(f"lop3.b32 raw, {source}, 0x{mask:04x}{mask:04x}, magic, 0xea;")
        lines.append(f"mov.b32 scale, {brain_pair(step)};")
        lines.append(f"mov.b32 offset, {brain_pair(-128 * step - zero)};")
        lines.append(f"fma.rn.bf16x2 ${number}, raw, scale, offset;")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def wide_conversion(unit, zero):
    """Return PTX that turns two words of codes of 8 bits into 2 pairs of bfloat16 unit q - zero."""
    lines = [
        ".reg .b32 moved, raw, low, high, magic, lower, upper, one, zero, ends;",
        "mov.b32 magic, 0x43004300;", f"mov.b32 one, {brain_pair(1)};",
        f"mov.b32 lower, {brain_pair(unit)};", f"mov.b32 zero, {brain_pair(-128 * unit - zero)};",
        f"mov.b32 upper, {brain_pair(16 * unit)};",
        f"mov.b32 ends, {brain_pair(-2048 * unit)};",
    ]  # fmt: skip
    for number in range(2):
        source = "$2"
        if number:
            lines.append("shr.u32 moved, $2, 8;")
            source = "moved"
        lines.append(f"lop3.b32 raw, {source}, 0x000f000f, magic, 0xea;")
        lines.append("fma.rn.bf16x2 low, raw, lower, zero;")
        lines.append(f"shr.u32 moved, $2, {8 * number + 4};")
        lines.append("lop3.b32 raw, moved, 0x000f000f, magic, 0xea;")
        lines.append("fma.rn.bf16x2 high, raw, upper, ends;")
        lines.append(f"fma.rn.bf16x2 ${number}, high, one, low;")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def small_floats(bits, magnitude, place):
    """Return PTX that turns two words of small floats into 16 / bits pairs of bfloat16, equal to
    the float16 that the code's bits are at `place`: 3 places lower a bfloat16 2^-112 times it."""
    count, place = 16 // bits, place - 3
    mask = ((1 << magnitude) - 1) << place
    lines = [
        ".reg .b32 sign, moved, raw, scale, none;", f"mov.b32 scale, {brain_pair(2.0**112)};",
        "mov.b32 none, 0x80008000;",
    ]  # fmt: skip
    for number in range(count):
        first = number * bits
        source = "moved"
        if place > first:
            lines.append(f"shl.b32 moved, ${count}, {place - first};")
        elif place < first:
            lines.append(f"shr.u32 moved, ${count}, {first - place};")
        else:
            source = f"${count}"
        lines.append(f"shl.b32 sign, ${count}, {15 - first - magnitude};")
        lines.append("and.b32 sign, sign, 0x80008000;")
        lines.append(f"lop3.b32 raw, {source}, 0x{mask:04x}{mask:04x}, sign, 0xea;")
        lines.append(f"fma.rn.bf16x2 ${number}, raw, scale, none;")
    return "{ " + " ".join(lines) + " }"


@triton.jit
def converted(words, ASM: tl.constexpr, BITS: tl.constexpr):
    """Return the 16 / BITS tensors that PTX makes of words."""
    IN: tl.constexpr = registers(BITS)
    if BITS == 8:
        codes = tl.inline_asm_elementwise(ASM, IN, [words], (tl.bfloat16, tl.bfloat16), True, 2)
    elif BITS == 4:
        codes = tl.inline_asm_elementwise(
            ASM, IN, [words], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2
        )
    elif BITS == 2:
        codes = tl.inline_asm_elementwise(
            ASM, IN, [words],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
             tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
        )  # fmt: skip
    else:
        codes = tl.inline_asm_elementwise(
            ASM, IN, [words],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
             tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
             tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
             tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
        )  # fmt: skip
    return codes


@triton.jit
def unpack(words, BITS: tl.constexpr, UNIT: tl.constexpr, ZERO: tl.constexpr):
    """Return 16 / BITS tensors bfloat16 UNIT q - ZERO of the codes q in words."""
    ASM: tl.constexpr = conversion(BITS, UNIT, ZERO)
    return converted(words, ASM, BITS)


@triton.jit
def unpack_halves(words, BITS: tl.constexpr, MAGNITUDE: tl.constexpr, PLACE: tl.constexpr):
    """Return 16 / BITS tensors of the numbers that small floats are as bits of a float16."""
    ASM: tl.constexpr = small_floats(BITS, MAGNITUDE, PLACE)
    return converted(words, ASM, BITS)
