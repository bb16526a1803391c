"""What a GPU kernel rule returns: launches of generated Triton functions, and what they read.

Between kernels an activation is float16 (or bfloat16, where a call says so) and row-major, its
leading axes flattened to rows; a quantized one is int8 codes [rows, channels] with float32 scales
[rows, groups]. All arrays start at addresses that are multiples of 16 bytes. Loads it no Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from qc.backends.region import ArrayArgument, Region, Repack, SizeArgument
from qc.ir.types import Dim, bind_dim

Constant = int | float | bool | str
"""What a generated function takes as a `tl.constexpr`."""


@dataclass(frozen=True)
class Scratch:
    """Memory that the launches of one call share: results of a prologue, partial sums."""

    name: str
    dtype: torch.dtype
    shape: tuple[Dim, ...]


Argument = ArrayArgument | SizeArgument | Scratch

LATE = "late"
"""The last parameter of every kernel, 0 or 1: whether it may begin beside the launches in front."""
OVERLAP = "OVERLAP"
"""The constant that says whether a kernel's architecture can begin launches early."""
FIRST_TO_OVERLAP = 90
"""The compute capability from which on they can."""


@dataclass(frozen=True)
class Parameter:
    """A run-time parameter of a generated function. `type` is Triton's: "*fp16", "i32", ..."""

    name: str
    argument: Argument
    type: str


def late_parameter() -> Parameter:
    """Return the parameter that every kernel has last; who launches it sets it."""
    return Parameter(LATE, SizeArgument(0), "i32")


@dataclass(frozen=True)
class Cells:
    """How many programs an axis of a grid has: ceil(dim / per)."""

    dim: Dim = 1
    per: int = 1

    def count(self, sizes: Mapping[str, int]) -> int:
        """Return the number for given sizes."""
        return -(-bind_dim(self.dim, dict(sizes)) // self.per)


Grid = tuple[Cells, Cells, Cells]


@dataclass(frozen=True)
class Launch:
    """One kernel launch: a function of a generated module, its arguments in order, its grid.

    `source` is the text of the module: glue that calls device functions, nothing else. `rule` names
    the kernel rule, for reports.
    """

    rule: str
    function: str
    source: str
    parameters: tuple[Parameter, ...]
    constants: tuple[tuple[str, Constant], ...]
    grid: Grid
    num_warps: int = 4
    num_stages: int = 3
    late: tuple[str, ...] = ()
    """Parameters whose memory is touched only behind the join: see device/launches.py."""
    most_registers: int | None = None
    """Of a thread: what lets so many programs share a multiprocessor as there are."""
    most_programs: int | None = None
    """Of a multiprocessor: where all programs find room at once, those that come while the launch
    in front ends would crowd where it ended first."""

    @property
    def multiplies_small_floats(self) -> bool:
        """Say whether it asks for tensor cores that multiply floats of 8 bits."""
        return "fp8.product(" in self.source


@dataclass(frozen=True)
class Variant:
    """How a call runs for at most `rows` rows (None: for any number): launches one after another
    on one stream."""

    rows: int | None
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Call:
    """What a rule makes of a region.

    `variants` ascend in their rows and the last takes any; `dim` is the number of rows that they
    are chosen by. `repack` gives, by operand and array, how a weight is laid out for the launches;
    an array without an entry is one of its format's own ("0.codes", "0.scale", ...). `in_place` is
    the operand whose buffer the result shares.
    """

    dim: Dim
    variants: tuple[Variant, ...]
    repack: Mapping[tuple[int, str], Repack] = field(default_factory=dict)
    in_place: int | None = None

    def variant(self, rows: int) -> Variant:
        """Return the variant for a number of rows."""
        return next(v for v in self.variants if v.rows is None or rows <= v.rows)


HIDDEN_PARAMETERS = 2
"""Pointers that Triton appends to the parameters of every kernel: global and profile scratch."""


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel. `name` is its entry point; `parameters` are Triton's types in order,
    after which come `HIDDEN_PARAMETERS` null pointers. A block has 32 num_warps threads and
    `shared_bytes` of dynamic shared memory. `registers` are a thread's, `spills` bytes of it. For
    an AMD GPU ("gfx942") it is an hsaco, without PTX, and a block has 64 num_warps threads."""

    name: str
    architecture: int | str
    binary: bytes
    ptx: str
    shared_bytes: int
    num_warps: int
    parameters: tuple[str, ...]
    registers: int
    spills: int


KernelRule = Callable[[Region], Call | None]
"""Region -> Call, or None: "not mine". The first rule that matches wins."""

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.uint16: "*u16",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
"""Triton's types of pointers to arrays."""
