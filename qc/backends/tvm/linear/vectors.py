"""Vector idioms in TIR. Index arithmetic is int64: large tables pass 2^31 bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from qc.ir.target import Target


def index(value: Any) -> Any:
    """Make an int64 index of a Python int; expressions pass."""
    return T.int64(value) if isinstance(value, int) else value


def span(start: Any, lanes: int) -> Any:
    """Index `lanes` consecutive elements."""
    return index(start) if lanes == 1 else T.ramp(index(start), T.int64(1), lanes)


def splat(value: Any, lanes: int) -> Any:
    """Repeat a scalar in all lanes."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def typed(dtype: str, lanes: int) -> str:
    """Name a vector type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def lanes_of(value: Any) -> int:
    """Return the number of lanes of a value, 1 for a scalar."""
    kind = str(value.ty)
    return int(kind.rpartition("x")[2]) if "x" in kind else 1


def pure(result: str, intrinsic: str, *operands: Any) -> Any:
    """Call an LLVM intrinsic without side effects."""
    number = tvm.target.codegen.llvm_lookup_intrinsic_id(intrinsic)
    return T.call_llvm_pure_intrin(result, T.uint32(number), *operands)


def multiply_add(a: Any, b: Any, c: Any, target: Target) -> Any:
    """Return a b + c, rounded once where the machine can.

    In a b + c d, which of the products is rounded LLVM decides, for each machine by itself.
    """
    if target.has("fma") or target.has("asimd"):
        return pure(str(c.ty), "llvm.fma", a, b, c)
    return a * b + c


def prefetch(address: Any) -> None:
    """Ask for a cache line that will be read."""
    number = tvm.target.codegen.llvm_lookup_intrinsic_id("llvm.prefetch")
    read, keep, data = T.int32(0), T.int32(3), T.int32(1)
    T.evaluate(T.call_llvm_intrin("void", T.uint32(number), address, read, keep, data))


def halves_to_float(bits: Any, lanes: int, target: Target) -> Any:
    """Convert float16 values, given as uint16 lanes, to float32.

    Without F16C (every ARM has the like) LLVM would call a library function for each lane; shifting
    the exponent into place and scaling by 2^112 is exact for every finite value.
    """
    if target.has("f16c") or target.has("asimd"):
        return T.Cast(typed("float32", lanes), T.reinterpret(typed("float16", lanes), bits))
    wide = T.Bind(T.Cast(typed("int32", lanes), bits))

    def placed(mask: int, shift: int) -> Any:
        kept = T.bitwise_and(wide, splat(T.int32(mask), lanes))
        return T.shift_left(kept, splat(T.int32(shift), lanes))

    magnitude = T.reinterpret(typed("float32", lanes), placed(0x7FFF, 13))
    scaled = T.reinterpret(typed("int32", lanes), magnitude * splat(T.float32(2.0**112), lanes))
    return T.reinterpret(typed("float32", lanes), T.bitwise_or(scaled, placed(0x8000, 16)))


def bfloats_to_float(bits: Any, lanes: int) -> Any:
    """Convert bfloat16 values, given as uint16 lanes, to float32."""
    wide = T.shift_left(T.Cast(typed("uint32", lanes), bits), splat(T.uint32(16), lanes))
    return T.reinterpret(typed("float32", lanes), wide)


def sum_of_lanes(values: Any) -> Any:
    """Add the lanes of a float32 vector, in order."""
    return pure("float32", "llvm.vector.reduce.fadd", T.float32(0), values)


def added(values: Sequence[Any]) -> Any:
    """Add values up in pairs: few additions wait for one another."""
    if len(values) == 1:
        return values[0]
    middle = len(values) // 2
    return added(values[:middle]) + added(values[middle:])


def float_lanes(target: Target) -> int:
    """Return how many float32 values fill a vector register."""
    return target.vector_bytes // 4
