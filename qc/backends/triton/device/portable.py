"""What fragments.py, int8.py, tables.py and affine.py write in PTX, in Triton alone: for GPUs that
are not NVIDIA's."""

from __future__ import annotations

import triton
import triton.language as tl

from qc.backends.triton.device.affine import words


@triton.jit
def code(word, AT: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, ZERO: tl.constexpr,
         TYPE: tl.constexpr):  # fmt: skip
    """Return UNIT q - ZERO of the codes q at bit AT of words: exact in float32, and in TYPE."""
    number = (word >> AT) & ((1 << BITS) - 1)
    return (number.to(tl.float32) * UNIT - ZERO).to(TYPE)


@triton.jit
def unpack(words, BITS: tl.constexpr, UNIT: tl.constexpr, ZERO: tl.constexpr,
           TYPE: tl.constexpr = tl.float16):  # fmt: skip
    """Return 16 / BITS tensors UNIT q - ZERO of the codes q in words, in float16 or bfloat16."""
    found = ()
    for n in tl.static_range(16 // BITS):  # Triton knows no [*found, ...]
        more = (code(words, n * BITS, BITS, UNIT, ZERO, TYPE),)
        found = found + more  # type: ignore[assignment]
    return found


@triton.jit
def small(words, AT: tl.constexpr, MAGNITUDE: tl.constexpr, PLACE: tl.constexpr,
          TYPE: tl.constexpr):  # fmt: skip
    """Return the numbers that the small floats at bit AT of words are as bits of a float16: the
    lowest MAGNITUDE bits moved to PLACE, the bit above them as the sign."""
    number = ((words >> AT) & ((1 << MAGNITUDE) - 1)) << PLACE
    sign = ((words >> (AT + MAGNITUDE)) & 1) << 15
    return (number | sign).to(tl.float16, bitcast=True).to(TYPE)


@triton.jit
def unpack_halves(words, BITS: tl.constexpr, MAGNITUDE: tl.constexpr, PLACE: tl.constexpr,
                  TYPE: tl.constexpr = tl.float16):  # fmt: skip
    """Return 16 / BITS tensors of the numbers that small floats are as bits of a float16."""
    found = ()
    for n in tl.static_range(16 // BITS):
        more = (small(words, n * BITS, MAGNITUDE, PLACE, TYPE),)
        found = found + more  # type: ignore[assignment]
    return found


@triton.jit
def unpack_bytes(bytes):
    """Return 16 (q - 8) of both halves of bytes, as int8."""
    return ((bytes << 4) & -16) ^ -128, (bytes & -16) ^ -128


@triton.jit
def byte(tables, code, FIRST: tl.constexpr, WORDS: tl.constexpr):
    """Return byte `code` of WORDS words of a table, from word FIRST on."""
    word = tables[FIRST]
    for n in tl.static_range(1, WORDS):
        word = tl.where(code >> 2 == n, tables[FIRST + n], word)
    return (word >> ((code & 3) * 8)) & 255


@triton.jit
def looked_up(pairs, tables, PLANES: tl.constexpr, SLOT: tl.constexpr, WORDS: tl.constexpr,
              OUTPUT: tl.constexpr, NIBBLE: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """Return the values of one nibble of the words of output g or g + 8."""
    code = pairs[0] * 0
    for n in tl.static_range(len(PLANES)):
        at = 16 * OUTPUT + 4 * NIBBLE + PLANES[n][0] * (SLOT % (4 // PLANES[n][0]))
        code |= ((pairs[n] >> at) & ((1 << PLANES[n][0]) - 1)) << PLANES[n][1]
    low = byte(tables, code, 2 * WORDS * OUTPUT, WORDS)
    high = byte(tables, code, 2 * WORDS * OUTPUT + WORDS, WORDS)
    return (low | (high << 8)).to(tl.int16).to(TYPE, bitcast=True)


@triton.jit
def look_up(pairs, tables, PLANES: tl.constexpr, SLOT: tl.constexpr, WORDS: tl.constexpr,
            LOW: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    """Return the values of 64 channels: of run 0 the outputs g and g + 8, then of run 1."""
    tl.static_assert(LOW)
    found = ()
    for run in tl.static_range(2):
        for output in tl.static_range(2):
            first = looked_up(pairs, tables, PLANES, SLOT, WORDS, output, 2 * run, TYPE)
            second = looked_up(pairs, tables, PLANES, SLOT, WORDS, output, 2 * run + 1, TYPE)
            more = (tl.join(first, second),)
            found = found + more  # type: ignore[assignment]
    return found


@triton.jit
def scaled(codes, factors, LOWER: tl.constexpr, OFFSET: tl.constexpr):
    """Turn unpacked codes of outputs g, or g + 8 with LOWER, into weights, in float16."""
    both = words(factors, LOWER)
    scale = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    found = codes.to(tl.float32) * scale
    if OFFSET:
        found += (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return found.to(tl.float16)
