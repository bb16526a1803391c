"""Describe a compiled model: the schema of manifest.json, as frozen dataclasses.

`Manifest.to_json` writes what `Manifest.parse` reads, which manifest_reader checks. The format is
documented in docs/artifact.md.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qc.errors import ArtifactError, nearest
from qc.runtime.dtypes import DTYPES, DType

__all__ = [
    "CUDA",
    "FORMAT",
    "GOLDEN",
    "LIBRARY",
    "MANIFEST",
    "NATIVE",
    "ON_GPUS",
    "ROCM",
    "TORCH",
    "WEIGHTS",
    "Binary",
    "Code",
    "Dim",
    "FileEntry",
    "Generate",
    "GoldenCheck",
    "KernelStep",
    "Manifest",
    "Scalar",
    "Step",
    "TargetFacts",
    "TorchStep",
    "Value",
    "ValueArg",
    "is_file_name",
]

FORMAT = 1
"""Raised by every change that an older reader would misread."""

EXECUTORS = NATIVE, TORCH, CUDA, ROCM = "native", "torch", "cuda", "rocm"
ON_GPUS = CUDA, ROCM

MANIFEST, WEIGHTS, LIBRARY = "manifest.json", "weights.safetensors", "model.so"
GOLDEN = "golden.safetensors"

Kind = Literal["input", "weight", "state", "scratch", "output"]
Dim = int | str
"""A size: an integer, or an expression over symbols such as "batch" or "(context + 15) // 16"."""

DEFAULT_CHUNK = 512
"""Tokens of a prompt in one call: enough for efficient matrix products, few enough that the
intermediate values stay small."""

PAST, CONTEXT, KEEP = "past", "context", "keep"
BOUND_BY_EXECUTOR = frozenset({PAST, CONTEXT, KEEP})
"""Symbols that no input shape gives: tokens already in the state, the positions that the state has
room for, and how many of the last positions the caller wants results for."""


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """Name the target and what its CPU must have: `features` are spelled as in /proc/cpuinfo."""

    name: str
    arch: str
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Pin a file of the artifact: its size and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Value:
    """Declare one tensor of the program.

    A "weight" names its `tensor` in the weights file. A "state" lives as long as a session and is
    shaped by batch and context. Elements of an integer input with `below` must be in [0, below).
    Only "past" may not occur in a shape.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    kind: Kind
    tensor: str | None = None
    below: int | None = None

    @property
    def element(self) -> DType:
        return DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class ValueArg:
    """Pass a value, perhaps reshaped, from element `offset` on (which may use "past")."""

    value: int
    shape: tuple[Dim, ...] | None = None
    offset: Dim = 0


@dataclass(frozen=True, slots=True)
class Scalar:
    """Pass an integer: an expression over all symbols."""

    symbol: Dim


@dataclass(frozen=True, slots=True)
class KernelStep:
    """Call a kernel of the library.

    `reads` and `writes` list every value among `args` (in both: updated in place). With `when`, the
    step belongs to a call only if each size named, such as "seq" or "batch * seq", lies in its
    closed range (None: no upper end). `grid` is how many blocks of threads run a kernel of `code`;
    `late` lists the values that it touches only once it has waited for the steps in front.
    """

    kernel: str
    args: tuple[ValueArg | Scalar, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    origin: str = ""
    when: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    grid: tuple[Dim, ...] = ()
    late: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TorchStep:
    """Call an ATen operator on torch, and copy its results into the values of `writes`, in order.

    `args` and `kwargs` are templates of plain JSON in which {"value": i, "shape": optional} stands
    for a tensor, {"symbol": "batch * 2"} for an integer and {"dtype": "f32"} for a torch dtype.
    """

    torch: str
    args: tuple[Any, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    when: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)


Step = KernelStep | TorchStep


@dataclass(frozen=True, slots=True)
class Binary:
    """Machine code of a kernel for one architecture ("sm_90"), or code that a driver translates
    for that and later ones ("ptx_80"). `shared` is the shared memory of a block, in bytes."""

    architecture: str
    file: str
    shared: int


@dataclass(frozen=True, slots=True)
class Code:
    """Describe a GPU kernel: a `function` in files, with blocks of `warps` * 32 threads.

    `parameters` are "pointer", "i32" or "i64", one an argument of the steps that call it. An
    argument that depends on "past" is a pointer to an i32. `constants` are what the source was
    compiled with: nothing that runs needs them. `overlaps`: from sm_90 on it waits by itself for
    the launches in front, at once where its last argument is 0, only behind its work where it is 1.
    """

    function: str
    warps: int
    parameters: tuple[str, ...]
    binaries: tuple[Binary, ...]
    constants: Mapping[str, int | float | bool | str] = field(default_factory=dict)
    overlaps: bool = False


@dataclass(frozen=True, slots=True)
class GoldenCheck:
    """Say what some steps must compute: run `steps` with `sizes`, the values of `inputs` taken from
    tensors of golden.safetensors; then `result` must be the tensor `expected`, up to a `tolerance`
    relative to its norm."""

    steps: tuple[int, ...]
    sizes: Mapping[str, int]
    inputs: Mapping[str, str]
    result: int
    expected: str
    tolerance: float


@dataclass(frozen=True, slots=True)
class Generate:
    """Say how to generate text: `tokens` is the input of ids, `logits` the output to choose from.

    `top_k`, `top_p` are used when a caller samples without saying otherwise. `chunk` is how many
    tokens of a prompt one call takes. `sampler` names the kernels that choose tokens on a GPU: see
    qc/runtime/cuda/sampling.py.
    """

    tokens: str
    logits: str
    eos: tuple[int, ...] = ()
    bos: int | None = None
    pad: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    chunk: int = DEFAULT_CHUNK
    sampler: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """Describe a compiled model completely, except for the bytes of weights and code."""

    target: TargetFacts
    symbols: tuple[str, ...]
    values: tuple[Value, ...]
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    context_length: int | None = None
    generate: Generate | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: bool = False
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    executor: str = NATIVE
    """Who runs it: "native" and "cuda" walk `steps`; "torch" has none and evaluates graph.json."""
    code: Mapping[str, Code] = field(default_factory=dict)
    """The kernels of a GPU, by name."""
    golden: tuple[GoldenCheck, ...] = ()
    """What `qc verify` runs."""

    @classmethod
    def parse(cls, raw: bytes) -> Manifest:
        """Read manifest.json. Raises ArtifactError."""
        from qc.runtime.manifest_reader import read_manifest  # it is built on the schema

        return read_manifest(raw)

    def to_json(self) -> bytes:
        """Write manifest.json, after checking that `parse` reads it back as it is."""
        content = {"qc": FORMAT, "executor": NATIVE} | _plain(self)
        raw = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode()
        self.parse(raw)
        return raw

    def value_index(self, name: str) -> int:
        """Return the position of a value in `values`. Raises ArtifactError."""
        for index, value in enumerate(self.values):
            if value.name == name:
                return index
        raise ArtifactError(f"no value {name!r}{nearest(name, (v.name for v in self.values))}")


def is_file_name(name: str) -> bool:
    """Whether `name` is a plain relative path of at most three parts: "ir/captured.txt"."""
    parts = name.split("/")
    return len(parts) <= 3 and all(
        re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}", part) for part in parts
    )


def _plain(thing: object) -> Any:
    """Turn dataclasses into JSON, leaving out fields that have their default."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        result = {}
        for each in dataclasses.fields(thing):
            content = getattr(thing, each.name)
            default = (
                each.default_factory()
                if each.default_factory is not dataclasses.MISSING
                else each.default
            )
            if content != default:
                result[each.name] = _plain(content)
        return result
    if isinstance(thing, Mapping):
        return {key: _plain(content) for key, content in thing.items()}
    if isinstance(thing, tuple | list):
        return [_plain(content) for content in thing]
    return thing
