"""What every kernel must compute, for `qc verify`: random inputs, and what the graph makes of them.

Each call of the program is checked once for every kind of launches that it has, alone, with the
weights of the first layer that makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qc.backends.region import rounding_of
from qc.backends.stored import as_numpy
from qc.backends.triton.lower import Conversion, GpuLowering, PlacedCall, torch_dtype
from qc.backends.triton.storage import half_dtype, is_cache
from qc.ir import ops
from qc.ir.fused import Fused
from qc.ir.meaning import evaluate_nodes
from qc.ir.node import Node
from qc.ir.quantized import QuantizedTensor, quantize_activation
from qc.ir.types import Dim, bind_dim, dim_symbols
from qc.runtime.manifest import GoldenCheck, KernelStep

PAST, CONTEXT = 5, 64
"""Tokens in the caches, and the room that they have."""
MOST_ELEMENTS = 1 << 22
"""Of an output: the last variant for many rows of a vocabulary would be larger than its kernel is
worth."""
FLOAT_TOLERANCE, BRAIN_TOLERANCE = 4e-3, 2e-2
"""Twice what the error of a linear may be: results are rounded to float16, or to bfloat16."""
CODE_TOLERANCE = 2e-2
"""A code that falls on the other side of a border is off by one, of at most 127. Where rows are
rounded and stored as floats, one code of any format may do so."""


@dataclass
class Golden:
    """The checks of a program, and the arrays that they read."""

    checks: list[GoldenCheck]
    arrays: dict[str, Any]


def golden_checks(lowering: GpuLowering) -> Golden:
    """Compute what every call must give."""
    golden = Golden([], {})
    seen: set[tuple[str, ...]] = set()
    writer = GoldenWriter(lowering, golden)
    for call in lowering.calls:
        kernels = kernels_of(lowering, call.steps)
        if kernels not in seen and writer.add(call):
            seen.add(kernels)
    checked = {kernel for kernels in seen for kernel in kernels}
    for conversion in lowering.conversions:
        (kernel,) = kernels_of(lowering, [conversion.step])
        if kernel not in checked and writer.add_conversion(conversion):
            checked.add(kernel)
    return golden


def kernels_of(lowering: GpuLowering, steps: Sequence[int]) -> tuple[str, ...]:
    """Return the kernels that some steps launch."""
    found = (lowering.program.steps[number] for number in steps)
    return tuple(step.kernel for step in found if isinstance(step, KernelStep))


def sizes_for(call: PlacedCall) -> dict[str, int] | None:
    """Return the least sizes for which a call takes these launches; None where its rows are not
    those of one sequence."""
    rows = call.low
    sizes = sizes_of(rows)
    while sizes["seq"] + PAST > sizes["context"]:
        sizes["context"] *= 2
    names = dim_symbols((call.dim,)) | operand_symbols(call.node)
    if not names <= sizes.keys():
        return None
    count = bind_dim(call.dim, sizes)
    return sizes if call.low <= count <= (call.high or count) else None


def sizes_of(rows: int) -> dict[str, int]:
    """Return the sizes of one sequence of so many tokens."""
    return {"batch": 1, "seq": rows, "keep": rows, "past": PAST, "context": CONTEXT}


def operand_symbols(node: Node) -> set[str]:
    """Return the symbols of a call's operands and result."""
    return {s for each in (node, *node.inputs) for s in dim_symbols(each.tensor.shape)}


class GoldenWriter:
    """Makes inputs, evaluates bodies, keeps what checks read."""

    def __init__(self, lowering: GpuLowering, golden: Golden) -> None:
        self.lowering, self.golden = lowering, golden
        self.random = torch.Generator().manual_seed(0)
        self.dense: dict[Node, Tensor] = {}

    def add(self, call: PlacedCall) -> bool:
        """Add the checks of one call; say whether that was possible."""
        node, sizes = call.node, sizes_for(call)
        if sizes is None or not isinstance(node.op, Fused):
            return False
        if bind_dim_product(node.tensor.shape, sizes) > MOST_ELEMENTS:
            return False
        operands = [self.operand(each, sizes) for each in node.inputs]
        held = {
            index: array
            for each, (_, arrays) in zip(node.inputs, operands, strict=True)
            for index, array in arrays.items()
        }
        if not self.needed(call) <= held.keys():
            return False
        known = dict(zip(node.op.body.inputs, (value for value, _ in operands), strict=True))
        with torch.no_grad():
            result = evaluate_nodes(node.op.body.outputs, {}, sizes, known=known)[0]
        needed = {index: held[index] for index in sorted(self.needed(call))}
        self.keep(call.steps, sizes, needed, self.results(node, result, held))
        return True

    def add_conversion(self, conversion: Conversion) -> bool:
        """Add the check of a copy into another type; say whether that was possible."""
        node, sizes, values = conversion.node, sizes_of(1), self.lowering.program.values
        if not dim_symbols(node.tensor.shape) <= sizes.keys():
            return False
        source, wanted = (
            torch_dtype(values[index].dtype) for index in (conversion.source, conversion.result)
        )
        value = self.values(node, source, sizes)
        results = [(conversion.result, value.to(wanted), 0.0)]
        self.keep([conversion.step], sizes, {conversion.source: value}, results)
        return True

    def keep(
        self, steps: Sequence[int], sizes: dict[str, int], held: Mapping[int, Tensor],
        results: Iterable[tuple[int, Tensor, float]],
    ) -> None:  # fmt: skip
        """Keep the checks of some steps, a result each, and the arrays that they read."""
        number = len(self.golden.checks)
        inputs = {str(index): f"{number}.in{index}" for index in held}
        self.golden.arrays |= {inputs[str(i)]: as_numpy(array) for i, array in held.items()}
        for index, expected, tolerance in results:
            name = f"{number}.out{index}"
            self.golden.arrays[name] = as_numpy(expected)
            check = GoldenCheck(tuple(steps), sizes, inputs, index, name, tolerance)
            self.golden.checks.append(check)

    def needed(self, call: PlacedCall) -> set[int]:
        """Return the values that the steps read and do not write first."""
        values, steps = self.lowering.program.values, self.lowering.program.steps
        written: set[int] = set()
        found: set[int] = set()
        for number in call.steps:
            found |= {i for i in steps[number].reads if i not in written}
            written |= set(steps[number].writes)
        return {index for index in found if values[index].kind != "weight"}

    def operand(self, node: Node, sizes: Mapping[str, int]) -> tuple[Any, dict[int, Tensor]]:
        """Return the value of an operand for the graph, and the arrays that hold it."""
        if isinstance(node.op, ops.Parameter):
            if node not in self.dense:
                self.dense = {node: node.op.weight.dense()}  # one in memory at a time
            return self.dense[node], {}
        place = self.lowering.places[node]
        if node.tensor.format is not None and self.is_kept(place["codes"], node):
            return self.quantized_cache(node, place, sizes)
        if node.tensor.format is not None:
            value = self.normal(node.tensor.shape, sizes)
            quantized = quantize_activation(value, node.tensor.format)
            return quantized, {place[name]: held for name, held in quantized.arrays.items()}
        index = place["values"]
        stored = torch_dtype(self.lowering.program.values[index].dtype)
        if self.is_kept(index, node):
            return self.cache(node, index, stored, sizes)
        value = self.values(node, stored, sizes)
        arrays = {index: value}
        for (source, dtype), converted in self.lowering.converted.items():
            if source == index:
                arrays[converted] = value.to(dtype)
                value = value.to(dtype)
        return value.to(node.tensor.dtype), arrays

    def is_kept(self, index: int, node: Node) -> bool:
        """Say whether a value is a cache, which has room for more than it holds."""
        return is_cache(node) or self.lowering.program.values[index].kind == "state"

    def quantized_cache(
        self, node: Node, place: Mapping[str, int], sizes: Mapping[str, int]
    ) -> tuple[QuantizedTensor, dict[int, Tensor]]:
        """Make a cache of codes with all its room filled."""
        batch, length, *rest = node.tensor.shape
        assert node.tensor.format is not None
        room = quantize_activation(
            self.normal((batch, CONTEXT_SIZE, *rest), sizes), node.tensor.format
        )
        held = bind_dim(length, dict(sizes))
        seen = QuantizedTensor(room.codes[:, :held], room.scale[:, :held], room.format)
        return seen, {place["codes"]: room.codes, place["scale"]: room.scale}

    def values(self, node: Node, stored: torch.dtype, sizes: Mapping[str, int]) -> Tensor:
        """Make random values of an operand."""
        if stored.is_floating_point:
            return self.normal(node.tensor.shape, sizes).to(stored)
        below = 2 if stored == torch.bool else self.least_rows(node)
        shape = [bind_dim(d, dict(sizes)) for d in node.tensor.shape]
        return torch.randint(0, below, shape, generator=self.random).to(stored)

    def least_rows(self, node: Node) -> int:
        """Return the bound below which integers index any table: the matrices beside them."""
        tables = [
            table.op.weight.shape[0]
            for user in self.lowering.graph.users.get(node, ())
            for table in user.inputs
            if isinstance(table.op, ops.Parameter) and len(table.op.weight.shape) == 2
        ]
        return min([int(rows) for rows in tables if rows > 1], default=2)

    def cache(
        self, node: Node, index: int, stored: torch.dtype, sizes: Mapping[str, int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Make a cache with all its room filled; the graph sees the positions that count."""
        batch, length, *rest = node.tensor.shape
        room = self.normal((batch, CONTEXT_SIZE, *rest), sizes).to(stored)
        return room[:, : bind_dim(length, dict(sizes))], {index: room}

    def normal(self, shape: tuple[Any, ...], sizes: Mapping[str, int]) -> Tensor:
        """Make random values."""
        concrete = [
            sizes["context"] if d is CONTEXT_SIZE else bind_dim(d, dict(sizes)) for d in shape
        ]
        return torch.randn(concrete, generator=self.random)

    def results(
        self, node: Node, result: Any, held: Mapping[int, Tensor]
    ) -> Iterator[tuple[int, Tensor, float]]:
        """Yield what each array of the result must hold, and how exactly."""
        place = self.lowering.places[node]
        if isinstance(result, QuantizedTensor):
            for array, found in result.arrays.items():
                index = place[array]
                codes = found.dtype in (torch.int8, torch.uint8)
                tolerance = CODE_TOLERANCE if codes else FLOAT_TOLERANCE
                if self.lowering.program.values[index].kind == "state":
                    room = held[index].clone()
                    room[:, : found.shape[1]] = found
                    found = room
                yield index, found, tolerance
            return
        index = place["values"]
        stored = torch_dtype(self.lowering.program.values[index].dtype)
        if self.lowering.program.values[index].kind == "state":
            room = held[index].clone()
            room[:, : result.shape[1]] = result.to(stored)
            result = room
        target = self.lowering.program.target
        brain = half_dtype(target) == torch.bfloat16
        tolerance = BRAIN_TOLERANCE if brain else FLOAT_TOLERANCE
        if (format := rounding_of(node)) is not None:
            step = format.widest_step * float(result.abs().max())
            tolerance = CODE_TOLERANCE + step / max(float(result.norm()), 1e-30)
        yield index, result.to(stored), tolerance if stored.is_floating_point else 0.0


CONTEXT_SIZE: Any = object()
"""Stands for the room of a cache in a shape."""


def bind_dim_product(shape: tuple[Dim, ...], sizes: Mapping[str, int]) -> int:
    """Multiply sizes."""
    count = 1
    for dim in shape:
        count *= bind_dim(dim, dict(sizes))
    return count
