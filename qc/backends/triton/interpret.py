"""Make Triton's interpreter run the inline PTX of device/fragments.py, exactly as PTX defines it.

For tests only. It works where TRITON_INTERPRET=1 was set before Triton was imported. What the
emulation checks is our reading of PTX; that the assembler reads it so, a GPU has to confirm.
Source: PTX ISA 8.5, sections 9.7.8.6 (lop3), 9.7.4.4 (fma.f16x2).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
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


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lop3,
    "fma.rn.f16x2": fused,
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


def create_inline_asm(
    self: Any, text: str, constraints: str, values: list[Any], types: list[Any], pure: bool,
    pack: int,
) -> Results:  # fmt: skip
    """Stand in for the builder's method of this name."""
    shape = values[0].data.shape
    operands = [
        np.ascontiguousarray(v.data).reshape(-1, pack).view(np.uint32).reshape(-1) for v in values
    ]
    found = run_ptx(text, operands, len(types))
    handles = []
    for words, type in zip(found, types, strict=True):
        element = getattr(type, "scalar", type)
        kind = np.float16 if pack == 2 else np.int8  # what fills a register, pack at a time
        data = np.ascontiguousarray(words).view(kind).reshape(shape)
        handles.append(interpreter.TensorHandle(data, element))
    return Results(handles)


def install() -> None:
    """Teach the interpreter inline PTX; RuntimeError where Triton was not told to interpret."""
    from triton import knobs

    if not knobs.runtime.interpret:
        raise RuntimeError("Triton compiles here: set TRITON_INTERPRET=1 before importing it")
    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
