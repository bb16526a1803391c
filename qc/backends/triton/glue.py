"""Write the text of a generated function: parameters, and calls of device functions one after
another. There is no arithmetic in it: what is computed stands in `device/`, as ordinary code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from math import isinf, isnan

import torch

from qc.backends.region import SizeArgument
from qc.backends.triton.expression import Rendering
from qc.backends.triton.kernel import (
    LATE,
    OVERLAP,
    TYPES,
    Argument,
    Cells,
    Launch,
    Parameter,
    late_parameter,
)
from qc.ir.types import Dim, as_dim, dim_symbols
from qc.ir.weights.expression import Expr

PAST = "past"

NAMES = {
    torch.float32: "tl.float32", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16",
    torch.float64: "tl.float64", torch.int64: "tl.int64", torch.int32: "tl.int32",
    torch.int16: "tl.int16", torch.int8: "tl.int8", torch.uint8: "tl.uint8", torch.bool: "tl.int1",
}  # fmt: skip
"""What element types are called in generated text."""


@dataclass
class Glue:
    """A function that is being written; `rule` names it."""

    rule: str
    parameters: list[Parameter] = field(default_factory=list)
    sizes: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    modules: dict[str, None] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)
    """Texts of device functions of its own."""
    counted: int = 0

    @property
    def function(self) -> str:
        """The name of the function: never that of a module that it calls."""
        return f"{self.rule}_kernel"

    def pointer(self, argument: Argument, dtype: torch.dtype) -> str:
        """Add a parameter that points to an array; return its name."""
        name = f"p{len(self.parameters)}"
        self.parameters.append(Parameter(name, argument, TYPES[dtype]))
        return name

    def size(self, dim: Dim) -> str:
        """Return a size as the text of an argument: a number, or a parameter.

        What depends on the past is read from memory: it changes while everything else stays.
        """
        dim = as_dim(dim)
        if isinstance(dim, int):
            return str(dim)
        text = str(dim)
        if text not in self.sizes:
            name = f"n{len(self.sizes)}"
            moves = PAST in dim_symbols((dim,))
            kind = "*i32" if moves else "i32"
            self.parameters.append(Parameter(name, SizeArgument(dim), kind))
            self.sizes[text] = self.call("elements.size", name) if moves else name
        return self.sizes[text]

    def call(self, function: str, *arguments: object) -> str:
        """Write a call; return the name of its result."""
        name = f"v{self.counted}"
        self.counted += 1
        self.lines.append(f"{name} = {self.expression(function, arguments)}")
        return name

    def decode(self, rendering: Rendering, expr: Expr, *arguments: object) -> str:
        """Write a function that computes a decode expression, and a call of it; return the name of
        its result."""
        name = f"decode{len(self.functions)}"
        self.functions.append(rendering.function(name, expr))
        self.modules["decode"] = None
        passed = ", ".join([*map(text_of, arguments), *rendering.names.values()])
        self.lines.append(f"v{self.counted} = {name}({passed})")
        self.counted += 1
        return f"v{self.counted - 1}"

    def named(self, function: str) -> Text:
        """Return the name of a device function that is an argument of another."""
        self.modules[function.partition(".")[0]] = None
        return Text(function)

    def calls(self, results: int, function: str, *arguments: object) -> list[str]:
        """Write a call with several results; return their names."""
        names = [f"v{self.counted + i}" for i in range(results)]
        self.counted += results
        self.lines.append(f"{', '.join(names)} = {self.expression(function, arguments)}")
        return names

    def do(self, function: str, *arguments: object) -> None:
        """Write a call that has no result."""
        self.lines.append(self.expression(function, arguments))

    def expression(self, function: str, arguments: tuple[object, ...]) -> str:
        """Return the text of a call."""
        self.modules[function.partition(".")[0]] = None
        return f"{function}({', '.join(text_of(argument) for argument in arguments)})"

    def number(self, value: float | int | bool, dtype: torch.dtype) -> str:
        """Write a constant."""
        return self.call("elementwise.constant", value, Text(NAMES[dtype]))

    @property
    def source(self) -> str:
        """The module."""
        imports = ", ".join(sorted({*self.modules, "launches"}))
        known = (parameter.name for parameter in self.parameters)
        names = ", ".join([*known, LATE, f"{OVERLAP}: tl.constexpr"])
        begin, end = f"launches.begin({LATE}, {OVERLAP})", f"launches.join({OVERLAP})"
        body = "\n".join(f"    {line}" for line in (begin, *self.lines, end))
        return (
            "import triton\nimport triton.language as tl\n\n"
            f"from qc.backends.triton.device import {imports}\n\n\n"
            + "".join(f"{text}\n\n\n" for text in self.functions)
            + f"@triton.jit\ndef {self.function}({names}):\n{body}\n"
        )

    def launch(self, grid: tuple[Cells, ...], warps: int = 4, stages: int = 3) -> Launch:
        """Close the function; missing axes of the grid have one program."""
        whole = (*grid, Cells(), Cells(), Cells())
        return Launch(
            self.rule, self.function, self.source, (*self.parameters, late_parameter()),
            ((OVERLAP, False),), (whole[0], whole[1], whole[2]), warps, stages,
        )  # fmt: skip


@dataclass(frozen=True)
class Text:
    """An argument that is no literal."""

    text: str


def text_of(argument: object) -> str:
    """Return an argument as text: names as they are, numbers as literals."""
    match argument:
        case Text(text=text) | str(text):
            return text
        case float() if isinf(argument) or isnan(argument):
            return f'float("{argument}")'
    return repr(argument)


def power_of_two(size: int) -> int:
    """Return the least power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


def launch_name(launch: Launch) -> str:
    """Name a launch by its content."""
    types = [parameter.type for parameter in launch.parameters]
    content = (
        launch.function, launch.source, types, launch.constants, launch.num_warps,
        launch.num_stages, launch.most_registers,
        *([] if launch.most_programs is None else [launch.most_programs]),
    )  # fmt: skip
    return f"{launch.rule}_{sha256(repr(content).encode()).hexdigest()[:10]}"
