"""Translate the steps of an artifact into C: tables that qc/runtime/device/model.c walks.

Where a value lies is decided here: one arena holds all intermediate values, planned for one token
and for a whole chunk of a prompt. What remains for the device is to compute the sizes of a call, a
few dozen integers, and to write them where the kernels read them.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from qc.errors import UnsupportedError
from qc.runtime.expression import parse_expression
from qc.runtime.manifest import (
    CONTEXT,
    KEEP,
    PAST,
    Dim,
    Generate,
    KernelStep,
    Manifest,
    Scalar,
    Value,
    ValueArg,
)
from qc.runtime.memory import Lifetime, plan_arena, round_up

SYMBOLS = ("batch", "seq", PAST, CONTEXT, KEEP)
"""In the order of program.h."""

LINE = 64
_CONTEXT_MULTIPLE = 64  # of model.c
_MOST = 1 << 16  # numbers of tensors, sizes and dimensions are u16


@dataclass(frozen=True)
class Tensor:
    """One view of a value, as kernels are given it."""

    value: int
    shape: tuple[Dim, ...]
    offset: Dim


@dataclass(frozen=True)
class Plan:
    """Where scratch values lie, by value, and how large the arena is."""

    offsets: Mapping[int, int]
    bytes: int


@dataclass
class Numbers:
    """Give every distinct thing a number, in the order of first use."""

    of: dict[object, int] = field(default_factory=dict)

    def number(self, thing: object) -> int:
        return self.of.setdefault(thing, len(self.of))


class DeviceProgram:
    """An artifact's program, checked for what a device package can do.

    UnsupportedError says what it cannot.
    """

    header = "program.h"
    code_bytes: Sequence[int] = ()
    """Of each code in the weights file: a CPU's is in the library."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.values = manifest.values
        self.steps = self.taken_steps()
        self.generate = generation_of(manifest)
        self.context = manifest.context_length or 0
        self.sizes = Numbers()
        self.tensors = Numbers()
        self.dims: list[int] = []
        self.shape_at: dict[tuple[Dim, ...], int] = {}
        self.size(0)
        for step in self.steps:
            self.number_step(step)
        for value in self.states:
            self.shape(value.shape)
        if max(len(self.sizes.of), len(self.tensors.of), len(self.dims)) >= _MOST:
            raise UnsupportedError(f"a device package holds fewer than {_MOST} views of values")
        self.check_offsets()

    def taken_steps(self) -> Sequence[KernelStep]:
        """Return the steps of every call, or of some."""
        return kernel_steps(self.manifest)

    # ---- What is numbered

    def number_step(self, step: KernelStep) -> None:
        """Number everything that a step needs."""
        for argument in step.args:
            if isinstance(argument, Scalar):
                self.size(argument.symbol)
                continue
            tensor = self.view(argument)
            self.tensors.number(tensor)
            self.shape(tensor.shape)
            self.size(tensor.offset)

    def view(self, argument: ValueArg) -> Tensor:
        """Return what an argument shows of its value."""
        shape = self.values[argument.value].shape if argument.shape is None else argument.shape
        return Tensor(argument.value, shape, argument.offset)

    def size(self, dim: Dim) -> int:
        """Return the number of a size."""
        return self.sizes.number(parse_expression(dim).text)

    def shape(self, shape: tuple[Dim, ...]) -> int:
        """Return where the sizes of a shape start among all dimensions."""
        if shape not in self.shape_at:
            self.shape_at[shape] = len(self.dims)
            self.dims += [self.size(dim) for dim in shape]
        return self.shape_at[shape]

    @cached_property
    def weights(self) -> list[Value]:
        return [value for value in self.values if value.kind == "weight"]

    @cached_property
    def states(self) -> list[Value]:
        return [value for value in self.values if value.kind == "state"]

    @cached_property
    def number_in_kind(self) -> dict[int, int]:
        """The number of each value among those of its kind."""
        seen: dict[str, int] = {}
        found = {}
        for index, value in enumerate(self.values):
            found[index] = seen.get(value.kind, 0)
            seen[value.kind] = found[index] + 1
        return found

    @property
    def vocabulary(self) -> int:
        return int(self.value(self.generate.logits).shape[-1])

    @property
    def below(self) -> int:
        """Tokens are below this."""
        return self.value(self.generate.tokens).below or self.vocabulary

    def value(self, name: str) -> Value:
        """Return the value of this name."""
        return self.values[self.manifest.value_index(name)]

    # ---- Memory

    def symbols(self, seq: int, past: int = 0) -> dict[str, int]:
        """Return the sizes of a call at the longest context."""
        context = round_up(self.context, _CONTEXT_MULTIPLE)
        return {"batch": 1, "seq": seq, PAST: past, CONTEXT: context, KEEP: 1}

    def bytes_of(self, index: int, symbols: Mapping[str, int]) -> int:
        """Return the bytes of a value."""
        value = self.values[index]
        return prod(parse_expression(d)(symbols) for d in value.shape) * value.element.bytes

    @cached_property
    def lengths(self) -> tuple[Sequence[int], Sequence[int]]:
        """Numbers of tokens that bound the memory of all calls with one, and with more."""
        chunk = min(self.generate.chunk, self.context)
        return [1], sorted({min(2, chunk), chunk // 2 + 1, chunk})

    @cached_property
    def plans(self) -> tuple[Plan, Plan]:
        """The arena for one token, and for up to `chunk` of them."""
        step, prefill = self.lengths
        return self.plan(step), self.plan(prefill)

    def steps_of(self, call: Mapping[str, int]) -> Sequence[tuple[int, KernelStep]]:
        """Return the steps of a call of these sizes, with their numbers."""
        return [(n, step) for n, step in enumerate(self.steps) if belongs(step, call)]

    def plan(self, lengths: Iterable[int]) -> Plan:
        """Place all scratch values for calls of any of these lengths."""
        lifetimes: dict[int, Lifetime] = {}
        for call in map(self.symbols, lengths):
            for at, step in self.steps_of(call):
                for index in (*step.reads, *step.writes):
                    if self.values[index].kind == "scratch":
                        size = self.bytes_of(index, call)
                        known = lifetimes.get(index, Lifetime(at, at, size))
                        lifetimes[index] = Lifetime(
                            min(known.first, at), max(known.last, at), max(known.bytes, size)
                        )
        placed, total = plan_arena(list(lifetimes.values()))
        return Plan(dict(zip(lifetimes, placed, strict=True)), round_up(total, LINE))

    def state_bytes(self, context: int) -> int:
        """Return the bytes of keys and values for a context of so many tokens."""
        symbols = self.symbols(1) | {CONTEXT: round_up(context, _CONTEXT_MULTIPLE)}
        indices = [i for i, value in enumerate(self.values) if value.kind == "state"]
        return sum(round_up(self.bytes_of(index, symbols), LINE) for index in indices)

    def check_offsets(self) -> None:
        """Refuse views that reach beyond their values in the first or the last possible call."""
        lengths = sorted({length for each in self.lengths for length in each})
        for seq in lengths:
            for past in {0, self.context - seq}:
                call = self.symbols(seq, past)
                for _, step in self.steps_of(call):
                    self.check_step(step, call)

    def check_step(self, step: KernelStep, call: Mapping[str, int]) -> None:
        """Refuse a step whose views reach beyond their values in a call."""
        for argument in step.args:
            if isinstance(argument, Scalar):
                continue
            tensor, whole = self.view(argument), self.values[argument.value]
            room = self.bytes_of(tensor.value, call) // whole.element.bytes
            first = parse_expression(tensor.offset)(call)
            end = first + prod(parse_expression(dim)(call) for dim in tensor.shape)
            if not 0 <= first <= end <= room:
                raise UnsupportedError(
                    f"a step uses elements {first}..{end} of value {whole.name!r}, which has {room}"
                )

    # ---- C

    @cached_property
    def identity(self) -> bytes:
        """Tell programs apart whose weights do not fit each other."""
        target = self.manifest.target
        text = repr((target.name, target.arch, target.features, self.values, self.steps))
        return hashlib.sha256(text.encode()).digest()

    def source(self, workspace: int) -> str:
        """Write program.c. `workspace`: bytes of temporary memory of one thread."""
        return "\n".join(
            [
                "/* Written by qc build: see qc/runtime/device/program.h. */",
                f'#include "{self.header}"',
                "",
                "#include <stddef.h>",
                "",
                '#include "processor.h"',
                "",
                self.facts_source(workspace),
                *self.tables_source(),
                self.sizes_source(),
                self.features_source(),
            ]
        )

    def facts_source(self, workspace: int) -> str:
        """Write the numbers of the program."""
        tokens, logits = self.value(self.generate.tokens), self.value(self.generate.logits)
        begin = -1 if self.generate.bos is None else self.generate.bos
        fields = {
            "identity": "{" + ", ".join(map(str, self.identity)) + "}",
            "target": text_source(self.manifest.target.name),
            "sizes": len(self.sizes.of),
            "dims": len(self.dims),
            "tensors": len(self.tensors.of),
            "arguments": sum(len(step.args) for step in self.steps),
            "steps": len(self.steps),
            "weights": len(self.weights),
            "states": len(self.states),
            "ends": len(self.generate.eos),
            "codes": len(self.code_bytes),
            "context": self.context,
            "chunk": min(self.generate.chunk, self.context),
            "vocabulary": self.vocabulary,
            "below": self.below,
            "begin": begin,
            "token_bits": 8 * tokens.element.bytes,
            "logit_bits": 8 * logits.element.bytes,
            "tiles": int("amx_tile" in self.manifest.target.features),
            "arena": "{" + ", ".join(str(plan.bytes // LINE) for plan in self.plans) + "}",
            "workspace": workspace,
        }
        lines = [f"    .{name} = {content}," for name, content in fields.items()]
        return "\n".join(["const program_facts program = {", *lines, "};", ""])

    def tables_source(self) -> list[str]:
        """Write tensors, weights, states, and what the steps are."""
        states = [
            f"{{{self.shape(v.shape)}, {len(v.shape)}, {v.element.bytes}}}" for v in self.states
        ]
        weights = [prod(map(int, v.shape)) * v.element.bytes for v in self.weights]
        return [
            table_source("uint16_t program_dims", map(str, self.dims)),
            table_source(
                "program_tensor program_tensors", map(self.tensor_source, self.tensors.of)
            ),
            table_source("uint64_t program_weight_bytes", map(str, [*weights, *self.code_bytes])),
            table_source("program_state program_states", states),
            table_source("int32_t program_ends", map(str, self.generate.eos)),
            *self.steps_source(),
        ]

    def steps_source(self) -> list[str]:
        """Write kernels, arguments and steps."""
        arguments, steps, first = [], [], 0
        kernels, origins = Numbers(), Numbers()
        for step in self.steps:
            count = len(step.args)
            called = kernels.number(step.kernel), origins.number(step.origin)
            steps.append(f"{{{called[0]}, {count}, {first}, {called[1]}}}")
            first += count
            for argument in step.args:
                if isinstance(argument, Scalar):
                    arguments.append(f"{{QC_INTEGER, {self.size(argument.symbol)}}}")
                    continue
                tensor = self.tensors.number(self.view(argument))
                arguments.append(f"{{QC_TENSOR, {tensor}}}")
        declared = [
            f"int __tvm_ffi_{name}(void *, const qc_any *, int32_t, qc_any *);"
            for name in sorted(map(str, kernels.of))
        ]
        return [
            "\n".join([*declared, ""]),
            table_source("program_argument program_arguments", arguments),
            table_source("program_step program_steps", steps),
            table_source("qc_kernel program_kernels", (f"__tvm_ffi_{k}" for k in kernels.of)),
            f"const char program_names[] =\n {names_source(kernels.of)};\n",
            f"const char program_origins[] =\n {names_source(origins.of)};\n",
        ]

    def tensor_source(self, tensor: object) -> str:
        """Write one row of program_tensors."""
        assert isinstance(tensor, Tensor)
        value = self.values[tensor.value]
        memory, places = {
            "weight": ("MEMORY_WEIGHT", [self.number_in_kind[tensor.value]] * 2),
            "state": ("MEMORY_STATE", [self.number_in_kind[tensor.value]] * 2),
            "input": ("MEMORY_TOKENS", [0, 0]),
            "output": ("MEMORY_LOGITS", [0, 0]),
            "scratch": (
                "MEMORY_ARENA",
                [plan.offsets.get(tensor.value, 0) // LINE for plan in self.plans],
            ),
        }[value.kind]
        element = value.element
        return (
            f"{{{memory}, {element.dlpack_code}, {8 * element.bytes}, {len(tensor.shape)}, "
            f"{self.shape(tensor.shape)}, {self.size(tensor.offset)}, "
            f"{{{places[0]}, {places[1]}}}}}"
        )

    def sizes_source(self) -> str:
        """Write the function that computes all sizes."""
        lines = [f"  const int64_t {name} = symbols[SYMBOL_{name.upper()}];" for name in SYMBOLS]
        unused = ", ".join(f"(void){name}" for name in SYMBOLS)
        body = [
            f"  sizes[{number}] = {expression_source(str(text))};"
            for text, number in self.sizes.of.items()
        ]
        head = "void program_sizes(const int64_t symbols[PROGRAM_SYMBOLS], int64_t *sizes) {"
        return "\n".join([head, *lines, f"  {unused};", *body, "}", ""])

    def features_source(self) -> str:
        """Write what the CPU is asked for."""
        features = [text_source(name) for name in self.manifest.target.features]
        return "\n".join(
            [
                "const char *program_lacks(void) {",
                f"  static const char *const needed[] = {{{', '.join([*features, 'NULL'])}}};",
                "  return processor_lacks(needed);",
                "}",
                "",
            ]
        )


def belongs(step: KernelStep, call: Mapping[str, int]) -> bool:
    """Say whether a call of these sizes takes a step."""
    for size, (low, high) in step.when.items():
        found = parse_expression(size)(call)
        if found < low or (high is not None and found > high):
            return False
    return True


def kernel_steps(manifest: Manifest) -> Sequence[KernelStep]:
    """Return the steps, all of which must be kernels of every call."""
    steps = []
    for step in manifest.steps:
        if not isinstance(step, KernelStep):
            raise UnsupportedError(
                f"{step.torch} stayed on torch, which a device has not", origin=step.origin or None
            )
        if step.when:
            raise UnsupportedError(
                f"kernel {step.kernel} belongs to calls of some sizes only; a device package runs "
                "all steps of every call",
                origin=step.origin or None,
            )
        steps.append(step)
    return steps


def generation_of(manifest: Manifest) -> Generate:
    """Return how the model generates: token ids alone go in, float32 logits alone come out."""
    generate = manifest.generate
    if generate is None or manifest.context_length is None:
        raise UnsupportedError("a device package holds a model that generates tokens")
    if manifest.inputs != (generate.tokens,) or manifest.outputs != (generate.logits,):
        got = f"({', '.join(manifest.inputs)}) -> ({', '.join(manifest.outputs)})"
        raise UnsupportedError(f"a device package takes token ids and gives logits; this is {got}")
    logits = manifest.values[manifest.value_index(generate.logits)]
    tokens = manifest.values[manifest.value_index(generate.tokens)]
    if logits.dtype != "f32" or tokens.dtype not in ("i32", "i64"):
        raise UnsupportedError(
            f"a device package takes i32 or i64 ids and gives f32 logits, not {tokens.dtype} and "
            f"{logits.dtype}"
        )
    unknown = set(manifest.symbols) - set(SYMBOLS)
    if unknown:
        raise UnsupportedError(f"a device package knows no size {', '.join(sorted(unknown))}")
    return generate


def table_source(declaration: str, rows: Iterable[str]) -> str:
    """Write a table, several rows a line."""
    lines, line = [], ""
    for row in rows:
        if line and len(line) + len(row) > 96:
            lines.append(line)
            line = ""
        line += f" {row},"
    body = "\n ".join([*lines, line or " 0"])
    kind, _, name = declaration.rpartition(" ")
    return f"const {kind} {name}[] = {{\n {body}\n}};\n"


def text_source(text: str) -> str:
    """Write a C string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if " " <= c <= "~" else "?" for c in escaped) + '"'


def names_source(names: Iterable[object]) -> str:
    """Write names one after the other, each ended by a zero."""
    return "\n ".join(text_source(str(name))[:-1] + '\\0"' for name in names)


def expression_source(text: str) -> str:
    """Write an integer expression of a manifest in C; divisions round down, sizes are positive."""
    return node_source(ast.parse(text, mode="eval").body)


def node_source(node: ast.expr) -> str:
    """Write a checked syntax tree."""
    match node:
        case ast.Constant(value=int(value)):
            return f"INT64_C({value})"
        case ast.Name(id=name):
            return name
        case ast.UnaryOp(operand=operand):
            return f"(-{node_source(operand)})"
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(exponent))):
            return "(" + " * ".join(["INT64_C(1)", *[node_source(left)] * exponent]) + ")"
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
            return f"quotient({node_source(left)}, {node_source(right)})"
        case ast.BinOp(left=left, op=op, right=right):
            sign = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}[type(op)]
            return f"({node_source(left)} {sign} {node_source(right)})"
    raise UnsupportedError("an expression of the manifest has no form in C")
