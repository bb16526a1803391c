"""Make Triton's interpreter run the inline PTX of device/fragments.py, exactly as PTX defines it,
and products of floats of 4 bits.

For tests only. It works where TRITON_INTERPRET=1 was set before Triton was imported. What the
emulation checks is our reading of PTX; that the assembler reads it so, a GPU has to confirm.
Source: PTX ISA 8.5, sections 9.7.8.6 (lop3), 9.7.9.7 (prmt), 9.7.4.4 (fma.f16x2, fma.bf16x2).

Triton's interpreter keeps bfloat16 as bits in uint16 and computes with those numbers; here its
operations widen them to float32, and round results to nearest, ties to even.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Words = Any
"""uint32 arrays: one register of every thread."""


def lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Apply a truth table of three bits; bit i of the table is the answer for (a, b, c) = i."""
    result = np.zeros_like(a)
    for case in range(8):
        if int(table.flat[0]) >> case & 1:
            result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    return result


def halves(words: Words) -> Any:
    """View registers as pairs of float16."""
    return np.ascontiguousarray(words).view(np.float16).reshape(*words.shape, 2)


def fused(a: Words, b: Words, c: Words) -> Words:
    """a b + c of float16 pairs, rounded once: products of float16 are exact in float64."""
    wide = [halves(each).astype(np.float64) for each in (a, b, c)]
    rounded = (wide[0] * wide[1] + wide[2]).astype(np.float16)
    return np.ascontiguousarray(rounded).view(np.uint32).reshape(a.shape)


def widened(words: Any) -> Any:
    """Return bfloat16, held as uint16, in float32."""
    bits: Any = np.ascontiguousarray(words).view(np.uint16).astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32)


def narrowed(values: Any) -> Any:
    """Round float32 to bfloat16, held as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def fused_brain(a: Words, b: Words, c: Words) -> Words:
    """a b + c of bfloat16 pairs, rounded once: float64 holds their product and, where it is not
    2^37 times as large as c or as small, the sum."""
    wide = [widened(each).reshape(*a.shape, 2).astype(np.float64) for each in (a, b, c)]
    rounded = narrowed((wide[0] * wide[1] + wide[2]).astype(np.float32))
    return np.ascontiguousarray(rounded).view(np.uint32).reshape(a.shape)


def permuted(a: Words, b: Words, selector: Words) -> Words:
    """Pick four bytes of (a, b), each by the lowest bits of a nibble; none may have its highest
    bit set, which would ask for signs."""
    if (selector & np.uint32(0x8888)).any():
        raise NotImplementedError("prmt that spreads signs")
    bytes = np.stack(
        [word >> np.uint32(8 * n) & np.uint32(255) for word in (a, b) for n in range(4)]
    )
    result = np.zeros_like(a)
    for n in range(4):
        choice = (selector >> np.uint32(4 * n) & np.uint32(7)).astype(np.int64)
        result |= np.take_along_axis(bytes, choice[None], 0)[0] << np.uint32(8 * n)
    return result


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lop3,
    "prmt.b32": permuted,
    "fma.rn.f16x2": fused,
    "fma.rn.bf16x2": fused_brain,
}


def run_ptx(text: str, operands: list[Words], results: int) -> list[Words]:
    """Run straight-line PTX; `$0`, `$1`, ... are the results, then the operands."""
    registers = {f"${results + n}": words for n, words in enumerate(operands)}
    shape = operands[0].shape
    for statement in re.sub(r"\.reg[^;]*;|[{}]", "", text).split(";"):
        if not statement.strip():
            continue
        instruction, rest = statement.split(None, 1)
        target, *sources = (each.strip() for each in rest.split(","))
        if instruction == "mov.b32" and len(sources) == 2:  # {target, source}, register
            registers[target] = registers[sources[1]] & np.uint32(0xFFFF)
            registers[sources[0]] = registers[sources[1]] >> np.uint32(16)
            continue
        values = [
            registers[s] if s in registers else np.full(shape, int(s, 0), np.uint32)
            for s in sources
        ]
        registers[target] = INSTRUCTIONS[instruction](*values)
    return [registers[f"${n}"] for n in range(results)]


class Results:
    """What Triton asks for the results of inline assembly."""

    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def get_result(self, number: int) -> Any:
        return self.handles[number]


KINDS = {tl.bfloat16: np.uint16, tl.int16: np.int16, tl.int32: np.int32}
"""How the interpreter keeps what registers hold, but float16."""


def create_inline_asm(
    self: Any, text: str, constraints: str, values: list[Any], types: list[Any], pure: bool,
    pack: int,
) -> Results:  # fmt: skip
    """Stand in for the builder's method of this name."""
    shape = values[0].data.shape
    if text.startswith("prefetch"):  # what is asked for is there
        nothing = np.zeros(shape, np.int32)
        return Results([interpreter.TensorHandle(nothing, type.scalar) for type in types])
    operands = [
        np.ascontiguousarray(v.data).reshape(-1, pack).view(np.uint32).reshape(-1) for v in values
    ]
    found = run_ptx(text, operands, len(types))
    handles = []
    for words, type in zip(found, types, strict=True):
        element = getattr(type, "scalar", type)
        if pack == 1 and element != tl.int32:  # registers of 16 bits
            words = words.astype(np.uint16)
        kind = np.int8 if pack == 4 else KINDS.get(element, np.float16)  # what fills a register
        data = np.ascontiguousarray(words).view(kind).reshape(shape)
        handles.append(interpreter.TensorHandle(data, element))
    return Results(handles)


# ---------------------------------------------------------------- floats of 4 bits

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
"""Values of the codes without a sign. OCP Microscaling Formats 1.0, section 5.3.3."""


def scaled_codes(codes: Any, scale: Any) -> Any:
    """Return the values of e2m1 [rows, K], two codes in a byte of [rows, K / 2], times scales of
    e4m3 [rows, groups]."""
    pairs = np.stack((codes & 15, codes >> 4), -1).reshape(codes.shape[0], -1)
    values = np.where(pairs & 8, np.float32(-1), np.float32(1)) * E2M1[pairs & 7]
    bits: Any = (scale.astype(np.uint16) & 0x7F) << np.uint16(7)
    factors = bits.view(np.float16).astype(np.float32) * 256  # its exponents are larger by 8
    return values * np.repeat(factors, values.shape[1] // factors.shape[1], 1)


def create_dot_scaled(
    self: Any, left: Any, left_scale: Any, left_kind: Any, x: Any, x_scale: Any, x_kind: Any,
    fast: bool, left_packed: bool, x_packed: bool, acc: Any,
) -> Any:  # fmt: skip
    """Stand in for the builder's method of this name, for e2m1 with scales of e4m3: Triton's knows
    scales of e8m0 alone, and before 3.9 there is none."""
    known = {tl.float8e4nv} == {each.dtype.scalar for each in (left_scale, x_scale)}
    if not known or str(left_kind) != str(x_kind) or not (left_packed and x_packed):
        raise NotImplementedError("products of blocks are emulated for e2m1 with scales of e4m3")
    first, second = scaled_codes(left.data, left_scale.data), scaled_codes(x.data.T, x_scale.data)
    return interpreter.TensorHandle(first @ second.T + acc.data, tl.float32)


# ---------------------------------------------------------------- bfloat16

ARITHMETIC = (
    "fadd", "fsub", "fmul", "fdiv", "fma", "fneg", "fabs", "exp", "exp2", "log", "log2", "sin",
    "cos", "erf", "sqrt", "rsqrt", "floor", "minnumf", "maxnumf", "minimumf", "maximumf",
    "clampf", "precise_divf", "precise_sqrt",
)  # fmt: skip
"""Methods create_... of the builder that compute with floats; comparisons are others."""


def is_brain(handle: Any) -> bool:
    """Say whether a value of the interpreter is bfloat16."""
    known = isinstance(handle, interpreter.TensorHandle)
    return known and handle.dtype.scalar == tl.bfloat16


def to_float32(handle: Any) -> Any:
    """Return a bfloat16 value of the interpreter as float32; anything else as it is."""
    if not is_brain(handle):
        return handle
    data = widened(handle.data).reshape(handle.data.shape)
    return interpreter.TensorHandle(data, tl.float32)


def to_brain(handle: Any) -> Any:
    """Return a float32 value of the interpreter as bfloat16."""
    data = narrowed(handle.data).reshape(handle.data.shape)
    return interpreter.TensorHandle(data, tl.bfloat16)


def in_float32(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method of the builder compute bfloat16 operands in float32."""

    @wraps(method)
    def computed(self: Any, *operands: Any, **options: Any) -> Any:
        if not any(map(is_brain, operands)):
            return method(self, *operands, **options)
        result = method(self, *map(to_float32, operands), **options)
        return to_brain(result) if result.data.dtype == np.float32 else result

    return computed


def cast(method: Callable[..., Any], self: Any, source: Any, type: Any, *rest: Any) -> Any:
    """Convert from and to bfloat16 by way of float32, else as `method` does."""
    wanted = type.scalar
    if (source.dtype.scalar == wanted) or tl.bfloat16 not in (source.dtype.scalar, wanted):
        return method(self, source, type, *rest)
    source = to_float32(source)
    if source.dtype.scalar != tl.float32:
        source = method(self, source, tl.float32, *rest)
    if wanted == tl.float32:
        return source
    return to_brain(source) if wanted == tl.bfloat16 else method(self, source, type, *rest)


def multiply(method: Callable[..., Any], self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """Multiply matrices of bfloat16 in float32, as tensor cores do."""
    return method(self, to_float32(a), to_float32(b), *rest)


def bound(change: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """Return `change` of a method, as a method."""
    return lambda self, *rest: partial(change, method)(self, *rest)


def compared(method: Callable[..., Any], self: Any, *operands: Any) -> Any:
    """Compare; the result is of booleans, where the interpreter names the operands' type: a mask
    that is one number would be spread over a block as that type."""
    return interpreter.TensorHandle(method(self, *operands).data, tl.int1)


def teach_bfloat16(builder: Any) -> None:
    """Replace the methods of the builder that take bfloat16 for integers."""
    comparisons = [name for name in dir(builder) if name.startswith(("create_fcmp", "create_icmp"))]
    for name in comparisons:
        setattr(builder, name, bound(compared, getattr(builder, name)))
    for name in (*(f"create_{each}" for each in ARITHMETIC), *comparisons):
        if hasattr(builder, name):
            setattr(builder, name, in_float32(getattr(builder, name)))
    builder.create_dot = bound(multiply, builder.create_dot)
    conversions = ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc")
    for name in ("cast_impl", "create_fp_to_fp", *(f"create_{each}" for each in conversions)):
        setattr(builder, name, bound(cast, getattr(builder, name)))


def index(tensor: Any) -> int:
    """Return a number of the interpreter, which holds it as an array of one axis."""
    return int(tensor.handle.data.item())


def count_by_numbers(method: Callable[..., Any], tensor: Any, scope: Any) -> None:
    """Patch a class of tensors as `method` does. Before Triton 3.7 a loop over such numbers
    converted an array of one axis, which numpy refuses from 2.4 on."""
    method(tensor, scope)
    scope.set_attr(tensor, "__index__", index)


def install() -> None:
    """Teach the interpreter inline PTX, floats of 4 bits and bfloat16; RuntimeError where Triton
    was not told to interpret. A second call changes nothing."""
    from triton import knobs

    if not knobs.runtime.interpret:
        raise RuntimeError("Triton compiles here: set TRITON_INTERPRET=1 before importing it")
    builder = interpreter.InterpreterBuilder
    if builder.__dict__.get("create_inline_asm") is not create_inline_asm:
        builder.create_inline_asm = create_inline_asm
        builder.create_dot_scaled = create_dot_scaled
        teach_bfloat16(builder)
        patch = interpreter._patch_lang_tensor
        interpreter._patch_lang_tensor = partial(count_by_numbers, patch)
