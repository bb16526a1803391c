"""Translate the launches of a GPU artifact into C: tables for qc/runtime/device/cuda_session.c.

A package runs one row and wants its last logits, so steps for other calls are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from qc.backends.device.program import (
    DeviceProgram,
    Numbers,
    Plan,
    belongs,
    names_source,
    table_source,
    text_source,
)
from qc.errors import UnsupportedError
from qc.runtime.cuda.executor import moving_sizes
from qc.runtime.cuda.order import Access, Span, late_starts
from qc.runtime.expression import parse_expression
from qc.runtime.manifest import (
    CONTEXT,
    PAST,
    Code,
    KernelStep,
    Manifest,
    Scalar,
    TorchStep,
    ValueArg,
)

__all__ = ["CudaProgram", "steps_of_one_row"]

WARP = 32
APART = 1 << 40
"""Pretended bytes from one piece of memory to the next, where only overlaps are asked for."""
NO_END = (1 << 63) - 1


def steps_of_one_row(manifest: Manifest) -> list[KernelStep]:
    """Return the steps that any call of a package takes: one row, its last logits."""
    assert manifest.generate is not None
    context = manifest.context_length or 0
    calls = [
        {"batch": 1, "seq": seq, "keep": 1, CONTEXT: context, PAST: 0}
        for seq in range(1, min(manifest.generate.chunk, context) + 1)
    ]
    known: dict[str, bool] = {}
    taken = []
    for step in manifest.steps:
        assert not isinstance(step, TorchStep), "nothing stays on torch between launches"
        ranges = repr(sorted(step.when.items()))
        if ranges not in known:
            if any(PAST in parse_expression(size).symbols for size in step.when):
                raise UnsupportedError("a package chooses steps by the number of tokens alone")
            known[ranges] = any(belongs(step, call) for call in calls)
        if known[ranges]:
            taken.append(step)
    return taken


class CudaProgram(DeviceProgram):
    """A GPU artifact's program. `manifest` has the steps of one row, and the code of all that they
    launch; `images` is the content of each file of code."""

    header = "cuda_program.h"

    def __init__(self, manifest: Manifest, images: Mapping[str, bytes]) -> None:
        self.images = images
        self.code = manifest.code
        self.moving = moving_sizes(manifest.steps)
        super().__init__(manifest)
        self.check_integers()

    def taken_steps(self) -> Sequence[KernelStep]:
        return steps_of_one_row(self.manifest)

    def number_step(self, step: KernelStep) -> None:
        super().number_step(step)
        for dim in (*step.grid, *step.when):
            self.size(dim)

    @property
    def code_bytes(self) -> Sequence[int]:  # type: ignore[override]
        return [len(image) for image in self.images.values()]

    @cached_property
    def lengths(self) -> tuple[Sequence[int], Sequence[int]]:
        """Where other steps are taken, the memory may be another: the ends of all ranges count."""
        step, prefill = super().lengths
        ranges = {repr(sorted(each.when.items())): each for each in self.steps}.values()
        taken = {
            seq: tuple(belongs(each, self.symbols(seq)) for each in ranges)
            for seq in range(1, max(prefill) + 1)
        }
        ends = {seq for seq in taken if seq > 1 and taken[seq] != taken[seq - 1]}
        ends |= {seq - 1 for seq in ends} - {1}
        return step, sorted({*prefill, *ends})

    @cached_property
    def identity(self) -> bytes:
        digest = hashlib.sha256(super().identity)
        for name, image in self.images.items():
            digest.update(name.encode() + hashlib.sha256(image).digest())
        return digest.digest()

    def check_integers(self) -> None:
        """Refuse sizes that do not fit the integers that kernels take."""
        longest = self.symbols(max(self.lengths[1]), self.context)
        for step in self.steps:
            kinds = self.code[step.kernel].parameters
            for argument, kind in zip(step.args, kinds, strict=True):
                if isinstance(argument, Scalar) and kind != "i64":
                    size = parse_expression(argument.symbol)(longest)
                    if not -(1 << 31) <= size < 1 << 31:
                        raise UnsupportedError(
                            f"kernel {step.kernel} takes 32-bit sizes, and one may be {size}",
                            origin=step.origin or None,
                        )

    # ---- Which launches may wait late

    @cached_property
    def late(self) -> frozenset[int]:
        """The steps that may wait late in a call with one token."""
        call, plan = self.symbols(1), self.plans[0]
        steps = self.steps_of(call)
        order = [self.access(step, call, plan) for _, step in steps]
        late = late_starts(order)
        return frozenset(n for (n, _), waits in zip(steps, late, strict=True) if waits)

    def access(self, step: KernelStep, call: Mapping[str, int], plan: Plan) -> Access:
        """Return the memory that a launch touches, at pretended addresses."""

        def spans(indices: Sequence[int], late: bool) -> tuple[Span, ...]:
            return tuple(self.span(i, call, plan) for i in indices if (i in step.late) == late)

        return Access(
            spans(step.reads, False), spans(step.writes, False),
            spans(step.reads, True), spans(step.writes, True),
        )  # fmt: skip

    def span(self, index: int, call: Mapping[str, int], plan: Plan) -> Span:
        """Return where a value lies: scratch in one arena, everything else apart."""
        is_scratch = self.values[index].kind == "scratch"
        start = plan.offsets[index] if is_scratch else (index + 1) * APART
        return start, start + self.bytes_of(index, call)

    # ---- C

    def steps_source(self) -> list[str]:
        """Write kernels with their codes, arguments and launches."""
        arguments, steps, ranges, first = [], [], list[str](), 0
        kernels, origins = Numbers(), Numbers()
        for number, step in enumerate(self.steps):
            code = self.code[step.kernel]
            called, origin = kernels.number(step.kernel), origins.number(step.origin)
            grid = ", ".join(str(self.size(dim)) for dim in step.grid)
            first_range = len(ranges)
            for size, (low, high) in step.when.items():
                ranges.append(f"{{{self.size(size)}, {low}, {NO_END if high is None else high}}}")
            steps.append(
                f"{{{called}, {len(step.args)}, {first}, {origin}, {{{grid}}}, "
                f"{len(ranges) - first_range}, {first_range}, {int(number in self.late)}}}"
            )
            first += len(step.args)
            for argument, kind in zip(step.args, code.parameters, strict=True):
                arguments.append(self.argument_source(argument, kind))
        binaries, described = self.kernels_source(map(str, kernels.of))
        overlaps = all(self.code[str(name)].overlaps for name in kernels.of)
        return [
            f"const cuda_facts cuda = {{{len(kernels.of)}, {len(binaries)}, {len(self.moving)}, "
            f"{int(overlaps)}}};\n",
            table_source("cuda_binary cuda_binaries", binaries),
            table_source("cuda_kernel cuda_kernels", described),
            table_source("cuda_argument cuda_arguments", arguments),
            table_source("cuda_step cuda_steps", steps),
            table_source("cuda_range cuda_ranges", ranges or ["{0, 0, 0}"]),
            table_source("uint16_t cuda_moving", (str(self.size(dim)) for dim in self.moving)),
            f"const char program_names[] =\n {names_source(kernels.of)};\n",
            f"const char program_origins[] =\n {names_source(origins.of)};\n",
        ]

    def argument_source(self, argument: ValueArg | Scalar, kind: str) -> str:
        """Write one row of cuda_arguments."""
        if isinstance(argument, ValueArg):
            return f"{{CUDA_ADDRESS, {self.tensors.number(self.view(argument))}}}"
        text = parse_expression(argument.symbol).text
        if kind == "pointer":
            return f"{{CUDA_MOVING, {self.moving.index(text)}}}"
        return f"{{CUDA_{kind.upper()}, {self.size(argument.symbol)}}}"

    def kernels_source(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Write the rows of cuda_binaries and of cuda_kernels."""
        numbers = {file: number for number, file in enumerate(self.images)}
        binaries: list[str] = []
        described = []
        for name in names:
            code: Code = self.code[name]
            described.append(
                f"{{{text_source(code.function)}, {WARP * code.warps}, {len(code.binaries)}, "
                f"{len(binaries)}}}"
            )
            for binary in code.binaries:
                kind, _, version = binary.architecture.rpartition("_")
                binaries.append(
                    f"{{{version}, {int(kind == 'ptx')}, {binary.shared}, {numbers[binary.file]}}}"
                )
        return binaries, described
