"""PTX that unpacks codes in the order of fragments.py to bfloat16 instead of float16.

A bfloat16 has 8 significant bits: 128 + q holds q below 128, so wider codes come in two halves, and
all of q - zero within -256 .. 256 is exact.
"""

from __future__ import annotations

import triton


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
def number_pair(value, bias, digits):
    """Return a float of 16 bits twice, as the number of a 32-bit register: the exponent's bias, the
    bits of the mantissa."""
    if value == 0:
        return "0x00000000"
    size, exponent = abs(value), 0
    while size >= 2:
        size, exponent = size / 2, exponent + 1
    while size < 1:
        size, exponent = size * 2, exponent - 1
    mantissa = int((size - 1) * (1 << digits))
    bits = (int(value < 0) << 15) | ((exponent + bias) << digits) | mantissa
    return f"0x{bits:04x}{bits:04x}"


@triton.constexpr_function
def brain_pair(value):
    """Return a bfloat16 twice, as the number of a 32-bit register."""
    return number_pair(value, 127, 7)


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
def scaled(count, factor):
    """Return PTX that multiplies `count` results by a factor."""
    lines = [
        ".reg .b32 scale, none;", f"mov.b32 scale, {brain_pair(factor)};",
        "mov.b32 none, 0x80008000;",
    ]  # fmt: skip
    lines += [f"fma.rn.bf16x2 ${number}, ${number}, scale, none;" for number in range(count)]
    return " ".join(lines)
