"""Lower a planned graph to launches: each launch of each variant of a call is a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from qc.backends.artifact import dim_text
from qc.backends.lowering import Lowered, Lowering, Place, renamed
from qc.backends.region import RESULT, ArrayArgument, SizeArgument
from qc.backends.triton.elements import BLOCK
from qc.backends.triton.glue import Glue, launch_name
from qc.backends.triton.kernel import (
    TYPES,
    Call,
    Cells,
    KernelRule,
    Launch,
    Parameter,
    Scratch,
    Variant,
)
from qc.backends.triton.storage import quantized_arrays
from qc.errors import UnsupportedError
from qc.ir import ops
from qc.ir.graph import Graph
from qc.ir.node import Node
from qc.ir.target import Target
from qc.ir.types import DTYPE_NAMES, Dim, TensorType, as_dim, element_count
from qc.runtime.manifest import Dim as Size
from qc.runtime.manifest import KernelStep, Scalar, ValueArg

DTYPES = {type: dtype for dtype, type in TYPES.items()}
Names = Mapping[sympy.Symbol, sympy.Symbol]


def lower(graph: Graph, target: Target, rules: Sequence[KernelRule]) -> Lowered[Launch]:
    """Turn a planned graph into a program for `target`."""
    return GpuLowering(graph, target, rules).run()


class GpuLowering(Lowering[Call, Launch]):
    """One run of `lower`. `calls` are the steps of each fused node, `conversions` those that copy
    values into another type, for golden checks."""

    def __init__(self, graph: Graph, target: Target, rules: Sequence[KernelRule]) -> None:
        super().__init__(graph, target, rules)
        self.converted: dict[tuple[int, torch.dtype], int] = {}
        self.calls: list[PlacedCall] = []
        self.conversions: list[Conversion] = []

    def quantized(self, name: str, type: TensorType, kind: str = "scratch") -> Place:
        """Add the codes, the scales of the groups, and the factors of scales."""
        return {
            array: self.add_value(f"{name}.{array}", dtype, shape, kind)
            for array, (dtype, shape) in quantized_arrays(type).items()
        }

    def call_torch(self, node: Node) -> None:
        """Refuse: there is no torch between launches."""
        assert isinstance(node.op, ops.Torch)
        raise UnsupportedError(
            f"{node.op.overload} has no GPU kernel; the cpu and torch targets run it on torch",
            origin=node.origin.module or None,
        )

    def result_type(self, node: Node, found: Call) -> TensorType:
        """Return the type under which the launches write the result."""
        if node.tensor.format is not None:
            return node.tensor
        for parameter in found.variants[-1].launches[-1].parameters:
            argument = parameter.argument
            if isinstance(argument, ArrayArgument) and argument.operand == RESULT:
                return node.tensor.cast(DTYPES[parameter.type])
        raise AssertionError(f"no launch of {node.op} writes its result last")

    def computed(self, node: Node) -> int:
        """Return the buffer of an output: in float32 where the graph says so, for this machine
        would take milliseconds to widen a batch of logits."""
        index = super().computed(node)
        stored = self.program.values[index].dtype
        if node.tensor.dtype == torch.float32 and stored in ("f16", "bf16"):
            return self.convert(node, index, torch.float32)
        return index

    def add_steps(self, node: Node, key: object, found: Call) -> None:
        """Add the launches of every variant, each for its range of rows."""
        names = self.names(node)
        dim, low = renamed(found.dim, names), 1
        for variant in found.variants:
            high = variant.rows
            if isinstance(dim, int) and not low <= dim <= (high or dim):
                continue
            whole = isinstance(dim, int) or len(found.variants) == 1
            when = {} if whole else {str(dim_text(dim)): (low, high)}
            first = len(self.program.steps)
            self.add_launches(node, found, variant, names, when)
            steps = range(first, len(self.program.steps))
            self.calls.append(PlacedCall(node, dim, low, high, steps))
            low = low if high is None else high + 1

    def add_launches(
        self,
        node: Node,
        found: Call,
        variant: Variant,
        names: Names,
        when: Mapping[str, tuple[int, int | None]],
    ) -> None:
        """Add one step a launch; what they share between them is scratch."""
        shared: dict[str, int] = {}
        for launch in variant.launches:
            arguments: list[ValueArg | Scalar] = []
            reads: dict[int, None] = {}
            writes: dict[int, None] = {}
            for parameter in launch.parameters:
                argument = parameter.argument
                if isinstance(argument, SizeArgument):
                    arguments.append(Scalar(dim_text(renamed(argument.dim, names))))
                    continue
                if isinstance(argument, Scratch):
                    written = argument.name not in shared
                    bound = self.shared(argument, shared, names)
                else:
                    written = argument.operand == RESULT
                    bound = self.bind(node, launch.rule, found, parameter, argument)
                arguments.append(bound)
                (writes if written else reads)[bound.value] = None
            if found.in_place is not None:
                reads |= writes
            name = launch_name(launch)
            self.program.kernels.setdefault(name, launch)
            grid = tuple(cells_text(cells, names) for cells in launch.grid)
            origin = str(node.origin.module)
            late = late_values(launch, arguments)
            step = KernelStep(
                name, tuple(arguments), tuple(reads), tuple(writes), origin, when, grid, late
            )
            self.program.steps.append(step)

    def shared(self, scratch: Scratch, known: dict[str, int], names: Names) -> ValueArg:
        """Return the memory of a temporary, added when it is first named."""
        if scratch.name not in known:
            shape = tuple(renamed(dim, names) for dim in scratch.shape)
            name = f"v{len(self.program.values)}.{scratch.name}"
            known[scratch.name] = self.add_value(name, scratch.dtype, shape, "scratch")
        return ValueArg(known[scratch.name])

    def bind(
        self, node: Node, rule: str, found: Call, parameter: Parameter, argument: ArrayArgument
    ) -> ValueArg:
        """Bind an array argument; an operand that is stored in another type is converted first."""
        bound = self.array_argument(node, rule, found, argument)
        value = self.program.values[bound.value]
        wanted = DTYPES[parameter.type]
        if value.dtype == DTYPE_NAMES[wanted]:
            return bound
        convertible = value.kind in ("scratch", "input", "output")
        if argument.operand == RESULT or argument.array != "values" or not convertible:
            raise AssertionError(f"{rule} takes {parameter.type} for {value.name}: {value.dtype}")
        operand = node.inputs[argument.operand]
        return ValueArg(self.convert(operand, bound.value, wanted), bound.shape)

    def convert(self, operand: Node, index: int, wanted: torch.dtype) -> int:
        """Add a launch that copies a value into another type, once."""
        if (index, wanted) not in self.converted:
            shape = operand.tensor.shape
            number = len(self.program.values)
            result = self.add_value(f"v{number}", wanted, shape, "scratch")
            launch = conversion(torch_dtype(self.program.values[index].dtype), wanted)
            name = launch_name(launch)
            self.program.kernels.setdefault(name, launch)
            count = element_count(shape)
            arguments = (ValueArg(index), ValueArg(result), Scalar(dim_text(count)), Scalar(0))
            grid = (cells_text(Cells(count, BLOCK), {}), 1, 1)
            origin = str(operand.origin.module)
            step = KernelStep(name, arguments, (index,), (result,), origin, {}, grid)
            self.conversions.append(Conversion(operand, index, result, len(self.program.steps)))
            self.program.steps.append(step)
            self.converted[index, wanted] = result
        return self.converted[index, wanted]


class PlacedCall:
    """Which steps compute a fused node, for how many rows."""

    def __init__(
        self, node: Node, dim: Dim, low: int, high: int | None, steps: Sequence[int]
    ) -> None:
        self.node, self.dim, self.low, self.high, self.steps = node, dim, low, high, steps


@dataclass(frozen=True)
class Conversion:
    """A step that copies the value of a node into another type."""

    node: Node
    source: int
    result: int
    step: int


def late_values(launch: Launch, arguments: Sequence[ValueArg | Scalar]) -> tuple[int, ...]:
    """Return the values that a launch touches behind its join alone."""
    bound = list(zip(launch.parameters, arguments, strict=True))
    early = {a.value for p, a in bound if isinstance(a, ValueArg) and p.name not in launch.late}
    found = [a.value for p, a in bound if isinstance(a, ValueArg) and a.value not in early]
    return tuple(dict.fromkeys(found))


def torch_dtype(name: str) -> torch.dtype:
    """Return the type that a manifest calls `name`."""
    return next(dtype for dtype, known in DTYPE_NAMES.items() if known == name)


def conversion(source: torch.dtype, wanted: torch.dtype) -> Launch:
    """Write the launch that copies values into another type."""
    count = sympy.Symbol("count", integer=True, positive=True)
    glue = Glue("convert")
    read = glue.pointer(ArrayArgument(0), source)
    write = glue.pointer(ArrayArgument(RESULT), wanted)
    position = glue.call("elements.positions", BLOCK)
    inside = glue.call("elements.below", position, glue.size(count))
    value = glue.call("elements.load", read, position, inside)
    glue.do("elements.store", write, position, inside, value)
    return glue.launch((Cells(count, BLOCK),))


def cells_text(cells: Cells, names: Names) -> Size:
    """Write the number of programs along an axis of a grid."""
    dim = as_dim(renamed(cells.dim, names))
    if isinstance(dim, int):
        return -(-dim // cells.per)
    return (
        dim_text(dim) if cells.per == 1 else f"({dim_text(dim)} + {cells.per - 1}) // {cells.per}"
    )
