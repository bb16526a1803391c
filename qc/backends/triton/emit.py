"""Generated modules: glue that calls device functions, written to files named by their content.

Triton reads a function's source from its file, so a module must be one. Its name is the hash of its
text: equal kernels share a file, and tracebacks, profilers and line tables can show it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile, gettempdir
from typing import Any

import torch

from qc.backends.region import ArrayArgument, Repack, SizeArgument
from qc.backends.triton.expression import Rendering
from qc.backends.triton.glue import NAMES
from qc.backends.triton.kernel import (
    LATE,
    OVERLAP,
    TYPES,
    Argument,
    Constant,
    Grid,
    Launch,
    Parameter,
    Scratch,
    late_parameter,
)
from qc.ir.weights.expression import Expr

HEAD = "import triton\nimport triton.language as tl\n\n"
DEVICE = "qc.backends.triton.device"


@dataclass
class Emission:
    """One generated kernel while it is written: parameters, constants, functions, statements."""

    name: str
    title: str
    device: tuple[str, ...]
    """The modules of device functions that it may call."""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)
    decoders: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    repack: dict[tuple[int, str], Repack] = field(default_factory=dict)
    depth: int = 1
    bound: int = 0
    prefix: str = ""
    """Of the names of its functions, where several kernels share a module."""
    early: frozenset[str] | None = None
    """The parameters that are named in front of the join, once there is one."""
    dtype: torch.dtype = torch.float16
    """Of activations between kernels, and of what tensor cores multiply."""
    unpacking: str = "fragments"
    """The module of what unpacks codes: it is PTX, or "portable" for GPUs that have none."""
    begun: bool = False
    """A statement lets the launches around begin: it may stand behind loads of weights."""

    @property
    def dtype_name(self) -> str:
        """What the type of activations is called in generated text."""
        return NAMES[self.dtype]

    def begin(self) -> None:
        """Let the launches around begin, here instead of at the start."""
        if not self.begun:
            self.line(f"launches.begin({LATE}, {OVERLAP})")
            self.begun = True

    def join(self) -> None:
        """Wait here, at the latest, for the launches in front."""
        if self.early is None:
            self.line(f"launches.join({OVERLAP})")
            self.early = frozenset(self.parameters)

    def line(self, text: str) -> None:
        """Write a statement."""
        self.lines.append("    " * self.depth + text)

    def bind(self, text: str) -> str:
        """Write an assignment to a new name; return it."""
        self.bound += 1
        self.line(f"t{self.bound} = {text}")
        return f"t{self.bound}"

    def array(self, name: str, argument: ArrayArgument | Scratch, dtype: torch.dtype) -> str:
        """Take an array as a parameter; return its name, which equal arguments share."""
        return self.parameter(name, argument, TYPES[dtype])

    def size(self, name: str, argument: SizeArgument) -> str:
        """Take a size as a parameter."""
        return self.parameter(name, argument, "i32")

    def written(self, write: Callable[[], None]) -> list[str]:
        """Return the statements that `write` writes, instead of having them here."""
        kept, self.lines = self.lines, []
        write()
        found, self.lines = self.lines, kept
        return [line[4 * self.depth :] for line in found]

    def call(self, other: Emission, name: str, where: str) -> None:
        """Write a call of another function, which becomes one of this module. `where` are the
        values of WHERE."""
        self.functions += [each for each in other.functions if each not in self.functions]
        text = other.text(name, WHERE)
        if text not in self.functions:
            self.functions.append(text)
        passed = [
            self.parameter(self.free(each), each.argument, each.type)
            for each in other.parameters.values()
        ]
        constants = [f"{key}={value!r}" for key, value in other.constants.items()]
        values = [*passed, LATE, where, *constants, f"{OVERLAP}={OVERLAP}"]
        self.line(f"{name}({', '.join(values)})")
        self.repack |= other.repack

    def free(self, parameter: Parameter) -> str:
        """Return a name for a parameter of another function: its own, or one that is not taken."""
        name = parameter.name
        while name in self.parameters and self.parameters[name].argument != parameter.argument:
            name += "_"
        return name

    def parameter(self, name: str, argument: Argument, type: str) -> str:
        for each in self.parameters.values():
            if each.argument == argument:
                return each.name
        self.parameters[name] = Parameter(name, argument, type)
        return name

    def weight(
        self, operand: int, array: str, dtype: torch.dtype, repack: Repack | None = None
    ) -> str:
        """Take an array of a weight as a parameter."""
        if repack is not None:
            self.repack[operand, array] = repack
        name = f"w{operand}_{array.replace('.', '_').replace('/', '_')}"
        return self.array(name, ArrayArgument(operand, array), dtype)

    def function(self, rendering: Rendering, expr: Expr) -> str:
        """Write a device function for a decode expression, or find the equal one."""
        text = rendering.function("NAME", expr)
        if text not in self.decoders:
            name = f"{self.prefix}decode{len(self.decoders)}"
            self.decoders[text] = name
            self.functions.append(text.replace("def NAME(", f"def {name}("))
        return self.decoders[text]

    def source(self) -> str:
        """Return the module's text."""
        main = self.text(self.name, ())
        return module_text(self.title, self.device, [*self.functions, main])

    def text(self, name: str, where: tuple[str, ...]) -> str:
        """Return the function under a name: it ends joined. `where` are parameters that say which
        program of a role it is."""
        constants = [f"{each}: tl.constexpr" for each in (*self.constants, OVERLAP)]
        parameters = ", ".join([*self.parameters, LATE, *where, *constants])
        first = [f"    launches.begin({LATE}, {OVERLAP})"] * (not self.begun)
        end = [f"    launches.join({OVERLAP})"] * (self.early is None)
        lines = [*first, *self.lines, *end]
        return "\n".join(["@triton.jit", f"def {name}({parameters}):", *lines])

    def launch(
        self, rule: str, grid: Grid, num_warps: int, num_stages: int,
        most_registers: int | None = None, most_programs: int | None = None,
    ) -> Launch:  # fmt: skip
        """Return the launch of what was written."""
        late = [name for name in self.parameters if self.early and name not in self.early]
        return Launch(
            rule, self.name, self.source(), (*self.parameters.values(), late_parameter()),
            (*self.constants.items(), (OVERLAP, False)), grid, num_warps, num_stages, tuple(late),
            most_registers, most_programs,
        )  # fmt: skip


def module_text(title: str, device: Iterable[str], functions: Sequence[str]) -> str:
    """Return the text of a module of functions, the last of which is launched."""
    body = "\n\n\n".join(functions)
    called = [each for each in sorted({*device, "launches"}) if f"{each}." in body]
    imports = f"from {DEVICE} import {', '.join(called)}\n\n\n"
    return f'"""{title}"""\n\n{HEAD}{imports}{body}\n'


WHERE = ("tile", "cell", "part")
"""What says which program of a role it is: its tiles of rows and of outputs, its part."""


@dataclass(frozen=True)
class Role:
    """What some programs of a launch do: `cells` tiles of outputs times `parts`."""

    emission: Emission
    cells: int
    parts: int


def combined(name: str, title: str, roles: Sequence[Role]) -> Emission:
    """Return one function whose programs play several roles, one after the other by number."""
    whole = Emission(name, title, tuple({d: None for r in roles for d in r.emission.device}))
    early: set[str] = set()
    first = 0
    whole.begun = True  # every role does
    whole.line("number = launches.number(1)")
    for at, role in enumerate(roles):
        each = role.emission
        for parameter in each.parameters.values():
            known = whole.parameter(whole.free(parameter), parameter.argument, parameter.type)
            if each.early is None or parameter.name in each.early:
                early.add(known)
        first += role.cells * role.parts
        if at == 0:
            whole.line(f"if number < {first}:")
        else:
            whole.line("else:" if at == len(roles) - 1 else f"elif number < {first}:")
        whole.depth += 1
        start = first - role.cells * role.parts
        whole.line(f"cell, part = launches.within(number, {start}, {role.cells})")
        whole.call(each, f"{each.name}_role", "0, cell, part")
        whole.depth -= 1
    whole.early = frozenset(early)
    return whole


def cache_folder() -> Path:
    """Return where generated modules and compiled kernels are kept between runs."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    base = Path(home) if os.access(os.path.dirname(home) or "/", os.W_OK) else Path(gettempdir())
    return base / "qc" / "triton"


def load_function(source: str, name: str, folder: Path | None = None) -> Any:
    """Import a generated module and return one of its functions, as `triton.jit` made it."""
    key = hashlib.sha256(source.encode()).hexdigest()[:16]
    module_name = f"qc_kernels.k{key}"
    if module_name not in sys.modules:
        path = (folder or cache_folder() / "source") / f"k{key}.py"
        if not path.exists() or path.read_text() != source:
            path.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as written:
                written.write(source)
            os.replace(written.name, path)  # never half a module, whoever else is writing it
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[module_name] = module
    return getattr(sys.modules[module_name], name)


def merged(*repacks: Mapping[tuple[int, str], Repack]) -> dict[tuple[int, str], Repack]:
    """Join what several launches say of the layout of weights."""
    found: dict[tuple[int, str], Repack] = {}
    for each in repacks:
        found |= each
    return found
