"""Codes of 1 to 8 bits in the order in which tensor cores take left operands.

A code is cut into planes of 1, 2, 4 or 8 bits. A plane is stored in blocks of 16 outputs, each 256
words of 16 bits: the 8 words of a thread of a warp (row g of 8, quad t of 4) are 16 bytes that one
instruction loads. A word holds 16 / bits codes: of outputs g and g + 8, for runs of 32 channels.
Within a run, word (s, h, p) of thread (g, t) has channel 16 s + 8 h + 2 t + p: the A operand of
`mma.m16n8k16`. So what is loaded is unpacked to half pairs and multiplied where it is, without a
trip through shared memory. Source for the idea: Marlin (Frantar et al. 2024), section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qc.backends.triton.device import bfloat16


@triton.constexpr_function
def half_pair(value):
    """Return a float16 twice, as the number of a 32-bit register."""
    return bfloat16.number_pair(value, 15, 10)


@triton.constexpr_function
def conversion(bits, unit, zero):
    """Return PTX that turns two words of codes q into 16 / bits pairs of float16 unit q - zero.

    Bits are cut out by one `lop3` that also puts in the exponent of 1024; one `fma` takes it off.
    Both are exact: 1024 + q in float16 holds q below 1024 in its 10 bits of mantissa.
    """
    count = 16 // bits
    lines = [".reg .b32 moved, raw, magic, scale, offset;", "mov.b32 magic, 0x64006400;"]
    source, shifted = f"${count}", 0
    spare = 1 if unit == 2 and zero % 2 else 0  # -2048 - zero is no float16: stay off bit 0
    for number in range(count):
        place = number * bits
        if place - shifted + bits > 10 or place - shifted < spare:
            shifted = place - spare
            move = "shr.u32" if shifted >= 0 else "shl.b32"
            lines.append(f"{move} moved, ${count}, {abs(shifted)};")
            source = "moved"
        low = place - shifted
        mask = ((1 << bits) - 1) << low
        step = unit / (1 << low)
        lines.append(f"lop3.b32 raw, {source}, 0x{mask:04x}{mask:04x}, magic, 0xea;")
        lines.append(f"mov.b32 scale, {half_pair(step)};")
        lines.append(f"mov.b32 offset, {half_pair(-1024 * step - zero)};")
        lines.append(f"fma.rn.f16x2 ${number}, raw, scale, offset;")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def small_floats(bits, magnitude, place):
    """Return PTX that turns two words of small floats into 16 / bits pairs of float16: the lowest
    `magnitude` bits of a code moved up to `place`, the bit above them as the sign."""
    count = 16 // bits
    mask = ((1 << magnitude) - 1) << place
    lines = [".reg .b32 sign, moved;"]
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
        lines.append(f"lop3.b32 ${number}, {source}, 0x{mask:04x}{mask:04x}, sign, 0xea;")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def small_floats_to(type, bits, magnitude, place):
    """Return PTX that turns small floats into pairs of float16, or of the bfloat16 of the same
    value: 3 places lower, the code's bits are 2^-112 times it."""
    if type != tl.bfloat16:
        return small_floats(bits, magnitude, place)
    moved = small_floats(bits, magnitude, place - 3)
    return "{ " + moved + " " + bfloat16.scaled(16 // bits, 2.0**112) + " }"


@triton.constexpr_function
def conversion_to(type, bits, unit, zero):
    """Return PTX that turns codes into pairs of float16 or of bfloat16."""
    if type == tl.bfloat16:
        return bfloat16.conversion(bits, unit, zero)
    return conversion(bits, unit, zero)


@triton.constexpr_function
def registers(bits):
    """Return the constraints of a conversion: its results, then its operand."""
    return ",".join(["=r"] * (16 // bits) + ["r"])


@triton.constexpr_function
def types(bits, type):
    """Return the types of the results of a conversion."""
    return (type,) * (16 // bits)


@triton.jit
def unpack_halves(words, BITS: tl.constexpr, MAGNITUDE: tl.constexpr, PLACE: tl.constexpr,
                  TYPE: tl.constexpr = tl.float16):  # fmt: skip
    """Return 16 / BITS tensors of the numbers that small floats are as bits of a float16."""
    IN: tl.constexpr = registers(BITS)
    OUT: tl.constexpr = types(BITS, TYPE)
    ASM: tl.constexpr = small_floats_to(TYPE, BITS, MAGNITUDE, PLACE)
    return tl.inline_asm_elementwise(ASM, IN, [words], OUT, True, 2)


@triton.jit
def unpack(words, BITS: tl.constexpr, UNIT: tl.constexpr, ZERO: tl.constexpr,
           TYPE: tl.constexpr = tl.float16):  # fmt: skip
    """Return 16 / BITS tensors UNIT q - ZERO of the codes q in words, in float16 or bfloat16."""
    IN: tl.constexpr = registers(BITS)
    OUT: tl.constexpr = types(BITS, TYPE)
    ASM: tl.constexpr = conversion_to(TYPE, BITS, UNIT, ZERO)
    return tl.inline_asm_elementwise(ASM, IN, [words], OUT, True, 2)


@triton.jit
def load(plane, first, start, BLOCKS: tl.constexpr, BITS: tl.constexpr, STEPS: tl.constexpr,
         OUT: tl.constexpr, LANES: tl.constexpr = 1):  # fmt: skip
    """Load the words of OUT outputs, from block `first` of BLOCKS on, at channel `start` of LANES.

    STEPS: the blocks of a plane along the channels, 256 / BITS each.
    """
    words = tl.load(plane + places(first, start, BLOCKS, BITS, STEPS, OUT, LANES))
    return tl.reshape(words, [OUT * LANES // 16, 8, 4, 2, 2, 2])


@triton.jit
def load_pairs(plane, first, start, BLOCKS: tl.constexpr, BITS: tl.constexpr, STEPS: tl.constexpr,
               OUT: tl.constexpr, LANES: tl.constexpr = 1):  # fmt: skip
    """Load words like `load`, two neighbours in a register: a loop passes those on as they are, and
    would take single words out of their registers and put them together again."""
    at = places(first, start, BLOCKS, BITS, STEPS, OUT, LANES, 128)
    pairs = tl.load(plane.to(tl.pointer_type(tl.int32), bitcast=True) + at)
    return tl.reshape(pairs, [OUT * LANES // 16, 8, 4, 2, 2])


@triton.jit
def words(pairs):
    """Return the words of pairs."""
    return tl.join(*tl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], (tl.int16, tl.int16), True, 1
    ))  # fmt: skip


@triton.jit
def places(first, start, BLOCKS: tl.constexpr, BITS: tl.constexpr, STEPS: tl.constexpr,
           OUT: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr = 256):  # fmt: skip
    """Return where the words of a tile lie: of lane after lane, of block after block. SIZE: the
    words of a block, or pairs of them."""
    at = tl.arange(0, OUT * SIZE // 16 * LANES)
    block = first + at // SIZE % (OUT // 16)
    if BLOCKS * 16 % OUT != 0:
        block = tl.minimum(block, BLOCKS - 1)
    lane = at // (OUT * SIZE // 16) * (STEPS // LANES * SIZE)
    return (block * (STEPS * SIZE) + lane + at % SIZE) + start // (256 // BITS) * SIZE


@triton.jit
def left(upper, lower, OUT: tl.constexpr):
    """Turn unpacked words of outputs g and g + 8 into a left operand [OUT, 32]."""
    both = tl.join(upper, lower)  # [block, g, t, s, h, p, rows]
    return tl.reshape(tl.permute(both, (0, 6, 1, 3, 4, 2, 5)), [OUT, 32])


@triton.jit
def left64(a, b, c, d, OUT: tl.constexpr):
    """Turn the words of two runs of 32 channels into a left operand [OUT, 64]."""
    both = tl.join(tl.join(a, b), tl.join(c, d))  # [block, g, t, s, h, p, rows, run]
    return tl.reshape(tl.permute(both, (0, 6, 1, 7, 3, 4, 2, 5)), [OUT, 64])


@triton.jit
def left128(a, b, c, d, e, f, g, h, OUT: tl.constexpr):
    """Turn the words of four runs of 32 channels into a left operand [OUT, 128]."""
    first = tl.join(tl.join(a, b), tl.join(c, d))
    second = tl.join(tl.join(e, f), tl.join(g, h))
    both = tl.join(first, second)  # [block, g, t, s, h, p, rows, run % 2, run // 2]
    return tl.reshape(tl.permute(both, (0, 6, 1, 8, 7, 3, 4, 2, 5)), [OUT, 128])


@triton.jit
def added(first, second):
    """Put the digits of two planes together; exact."""
    return first + second


@triton.jit
def product(left, x):
    """left x, from zero."""
    return tl.dot(left, x)


@triton.jit
def more(acc, left, x):
    """acc + left x."""
    return tl.dot(left, x, acc)


@triton.jit
def ones(OUT: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """Return a left operand that adds up the channels of a tile."""
    return tl.full([OUT, WIDTH], 1.0, DTYPE)


@triton.jit
def scaled(acc, product, factor):
    """acc + factor product, one factor an output."""
    return acc + product * factor[:, None].to(tl.float32)


@triton.jit
def scaled_alike(acc, product, factor):
    """acc + factor product, one factor for all outputs."""
    return acc + product * factor
