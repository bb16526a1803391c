"""Bytes looked up in tables of 16, and products of bytes added in pairs: x86 and ARM alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from qc.backends.tvm.linear.int8_dot import ADD_PAIRS, MULTIPLY_BYTES
from qc.backends.tvm.linear.vectors import lanes_of, pure, splat
from qc.ir.target import Target

SHUFFLES = {
    16: "llvm.x86.ssse3.pshuf.b.128",
    32: "llvm.x86.avx2.pshuf.b",
    64: "llvm.x86.avx512.pshuf.b.512",
}
TABLE = "llvm.aarch64.neon.tbl1.v16i8"
ADD_NEIGHBOURS = "llvm.aarch64.neon.addp.v8i16"
ARM_BYTES = 16


@dataclass(frozen=True)
class ByteLookup:
    """The instruction that looks `size` bytes up.

    `above` is what must be added to a byte so that 16 and more find 0: pshufb reads the low four
    bits of bytes without the top bit, tbl looks at the whole byte.
    """

    size: int
    intrinsic: str
    above: int

    def __call__(self, table: Any, bytes: Any) -> Any:
        """Look up; `table` is repeated in every 16 bytes."""
        return pure(f"int8x{self.size}", self.intrinsic, table, bytes)


def byte_lookup(target: Target) -> ByteLookup | None:
    """Return the instruction of a target; None where it has none."""
    size = target.vector_bytes
    if target.has("ssse3"):
        return ByteLookup(size, SHUFFLES[size], 0x70)
    return ByteLookup(ARM_BYTES, TABLE, 0) if target.has("asimd") else None


def pairs_of_products(unsigned: Any, signed: Any, target: Target) -> Any:
    """Multiply unsigned by signed bytes and add neighbours, in int16: what does not overflow."""
    size = lanes_of(unsigned)
    if not target.has("asimd"):
        return pure(f"int16x{size // 2}", MULTIPLY_BYTES[size], unsigned, signed)
    halves = []
    for start in (0, size // 2):
        order = [T.int32(start + n) for n in range(size // 2)]
        left, right = (
            T.Cast(f"int16x{size // 2}", T.Shuffle([bytes], order)) for bytes in (unsigned, signed)
        )
        halves.append(T.Bind(left * right))
    return pure(f"int16x{size // 2}", ADD_NEIGHBOURS, *halves)


def every_other(integers: Any, odd: bool, target: Target) -> Any:
    """Return the int16 of even or odd number as int32."""
    count = lanes_of(integers)
    if not target.has("asimd"):
        ones = T.reinterpret(f"int16x{count}", splat(T.int32(1 << 16 * odd), count // 2))
        return pure(f"int32x{count // 2}", ADD_PAIRS[2 * count], integers, ones)
    words = T.reinterpret(f"int32x{count // 2}", integers)
    sixteen = splat(T.int32(16), count // 2)
    return T.shift_right(words if odd else T.shift_left(words, sixteen), sixteen)
