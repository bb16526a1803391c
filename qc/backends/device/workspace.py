"""Bound the temporary memory of kernels, so that a device can reserve it before the first token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import tvm_ffi
from tvm import tirx

from qc.backends.device.program import DeviceProgram
from qc.backends.region import ArrayArgument, SizeArgument
from qc.backends.tvm.kernel import Kernel
from qc.backends.tvm.vector_math import TVM_NAMES
from qc.errors import UnsupportedError
from qc.runtime.expression import parse_expression
from qc.runtime.manifest import KernelStep, Scalar

LINE = 64
ON_STACK = 1024  # bytes: TVM's kMaxStackAlloca, below which nothing is asked of the runtime

DTYPE_BYTES = {name: dtype.itemsize for dtype, name in TVM_NAMES.items()}
DTYPE_BYTES |= {"uint16": 2, "uint32": 4, "uint64": 8}

Sizes = dict[Any, Any]
"""The largest value of each variable of a kernel, or the expression that defines it."""


def workspace_bytes(program: DeviceProgram, kernels: Mapping[str, Kernel]) -> int:
    """Return the bytes that any kernel needs on one thread in any call: the sum of its buffers.

    Sizes are bounded by those of a whole chunk at the end of the longest context.
    """
    chunk = min(program.generate.chunk, program.context)
    symbols = program.symbols(chunk, program.context - chunk)
    return max(kernel_bytes(kernels[step.kernel], step, program, symbols) for step in program.steps)


def kernel_bytes(
    kernel: Kernel, step: KernelStep, program: DeviceProgram, symbols: Mapping[str, int]
) -> int:
    """Return the bytes of the buffers of one kernel as one step calls it."""
    sizes = argument_sizes(kernel, step, program, symbols)
    total = 0
    for node in nodes_of(kernel.function.body):
        if isinstance(node, tirx.Bind):
            sizes[node.var] = node.value  # looked at when a size depends on it
        if isinstance(node, tirx.AllocBuffer):
            total += buffer_bytes(node.buffer, sizes, step)
    return total


def argument_sizes(
    kernel: Kernel, step: KernelStep, program: DeviceProgram, symbols: Mapping[str, int]
) -> Sizes:
    """Return the sizes that the arguments of a step give to variables."""
    sizes: Sizes = {}
    for parameter, declared, given in zip(
        kernel.function.params, kernel.arguments, step.args, strict=True
    ):
        if isinstance(given, Scalar):
            assert isinstance(declared, SizeArgument)
            sizes[parameter] = parse_expression(given.symbol)(symbols)
            continue
        assert isinstance(declared, ArrayArgument)
        shape = program.values[given.value].shape if given.shape is None else given.shape
        for dim, size in zip(parameter.shape, shape, strict=True):
            if isinstance(dim, tirx.Var):
                sizes[dim] = max(sizes.get(dim, 0), parse_expression(size)(symbols))
    return sizes


def nodes_of(body: Any) -> Sequence[Any]:
    """List allocations and definitions in the order of the program."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, tirx.AllocBuffer | tirx.Bind):
            found.append(node)

    tvm_ffi.structural_walk(body, visit)
    return found


def buffer_bytes(buffer: Any, sizes: Sizes, step: KernelStep) -> int:
    """Return what a buffer takes of the workspace, with its header."""
    extents = [bound(extent, sizes) for extent in buffer.shape]
    if any(extent is None for extent in extents):
        raise UnsupportedError(
            f"kernel {step.kernel} needs memory of a size that is not known before the call",
            origin=step.origin or None,
        )
    size = prod(extent for extent in extents if extent is not None)
    bytes_needed = size * DTYPE_BYTES[str(buffer.dtype)]
    is_fixed = all(isinstance(extent, int | tirx.IntImm) for extent in buffer.shape)
    if is_fixed and bytes_needed < ON_STACK:
        return 0
    return -(-bytes_needed // LINE) * LINE + LINE


def quotient(a: int, b: int) -> int:
    """Divide, where nothing is known of a divisor below one."""
    return a // max(b, 1)


GROWING: dict[str, Callable[[int, int], int]] = {
    "Add": lambda a, b: a + b,
    "Mul": lambda a, b: a * b,
    "Sub": lambda a, b: a,
    "FloorDiv": quotient,
    "Div": quotient,
    "FloorMod": lambda a, b: b,
    "Mod": lambda a, b: b,
    "Min": min,
    "Max": max,
}
"""The greatest value of an operation on numbers of 0 or more, from the greatest of both sides; a
divisor is taken as it is, so it must be a constant."""


def bound(expression: Any, sizes: Sizes) -> int | None:
    """Return the most that an integer may be; None where it depends on more than sizes."""
    if isinstance(expression, int):
        return expression
    kind = type(expression).__name__
    if isinstance(expression, tirx.IntImm):
        return int(expression.value)
    if isinstance(expression, tirx.Var):
        known = sizes.get(expression)
        return None if known is None else bound(known, sizes)
    if kind == "Cast":
        return bound(expression.value, sizes)
    if kind in ("Select", "IfThenElse"):
        parts = [bound(expression.true_value, sizes), bound(expression.false_value, sizes)]
        return None if None in parts else max(p for p in parts if p is not None)
    if kind not in GROWING:
        return None
    left, right = bound(expression.a, sizes), bound(expression.b, sizes)
    divides = kind in ("FloorDiv", "Div", "FloorMod", "Mod")
    if left is None or right is None or (divides and not isinstance(expression.b, tirx.IntImm)):
        return None
    if kind == "Sub" and isinstance(expression.b, tirx.IntImm) and expression.b.value < 0:
        return left - int(expression.b.value)
    return GROWING[kind](left, right)
