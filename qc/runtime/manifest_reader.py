"""Read manifest.json, which nobody trusts, into the schema of manifest.

Every size is bounded, every reference is in range, every name and path is checked, unknown keys and
versions are refused, and each problem is one ArtifactError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args

from qc.errors import ArtifactError, nearest
from qc.runtime.dtypes import DTYPES
from qc.runtime.expression import Expression, is_symbol_name, parse_expression
from qc.runtime.manifest import (
    BOUND_BY_EXECUTOR,
    CONTEXT,
    DEFAULT_CHUNK,
    EXECUTORS,
    FORMAT,
    MANIFEST,
    ON_GPUS,
    PAST,
    TORCH,
    Binary,
    Code,
    Dim,
    FileEntry,
    Generate,
    GoldenCheck,
    KernelStep,
    Kind,
    Manifest,
    Scalar,
    Step,
    TargetFacts,
    TorchStep,
    Value,
    ValueArg,
    is_file_name,
)
from qc.runtime.strict_json import parse_object

__all__ = ["read_manifest"]

_KINDS: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}

_MOST_BYTES = 256 * 2**20  # of a manifest
_MOST_VALUES = 1_000_000
_MOST_DIMENSIONS = 8
_MOST_CONTEXT = 2**31


_T = TypeVar("_T")


class _Record:
    """Take the fields of one JSON object, each with its check; `where` is for errors."""

    def __init__(self, content: object, where: str) -> None:
        if not isinstance(content, dict):
            raise ArtifactError(f"{MANIFEST}: {where} is not an object")
        self.content: dict[str, Any] = dict(content)
        self.where = where

    def fail(self, key: str, expected: str) -> ArtifactError:
        got = json.dumps(self.content.get(key))
        got = got if len(got) <= 80 else got[:77] + "..."
        return ArtifactError(f'{MANIFEST}: "{key}" of {self.where} must be {expected}, not {got}')

    def take(self, key: str, expected: str, read: Callable[[Any], _T | None]) -> _T:
        """Return read(field), where None means "not what is expected"."""
        if key not in self.content:
            raise ArtifactError(f'{MANIFEST}: {self.where} has no "{key}"')
        result = read(self.content[key])
        if result is None:
            raise self.fail(key, expected)
        del self.content[key]
        return result

    def text(self, key: str, *, empty: bool = False) -> str:
        return self.take(
            key,
            "a text",
            lambda v: v if isinstance(v, str) and len(v) <= 2000 and (v or empty) else None,
        )

    def integer(self, key: str, low: int, high: int) -> int:
        return self.take(
            key,
            f"an integer from {low} to {high}",
            lambda v: v if type(v) is int and low <= v <= high else None,
        )

    def items(self, key: str, most: int = _MOST_VALUES) -> list[Any]:
        return self.take(
            key,
            f"a list of at most {most}",
            lambda v: v if isinstance(v, list) and len(v) <= most else None,
        )

    def table(self, key: str) -> dict[str, Any]:
        return self.take(key, "an object", lambda v: v if isinstance(v, dict) else None)

    def has(self, key: str) -> bool:
        """Whether the field is there; a null counts as absent."""
        if key in self.content and self.content[key] is None:
            del self.content[key]
        return key in self.content

    def done(self) -> None:
        """Refuse what nobody has taken: a misspelled field must not be ignored."""
        for key in self.content:
            raise ArtifactError(f"{MANIFEST}: {self.where} has the unknown field {key[:60]!r}")


def read_manifest(raw: bytes) -> Manifest:
    """Read manifest.json. Raises ArtifactError."""
    if len(raw) > _MOST_BYTES:
        raise ArtifactError(f"{MANIFEST} has {len(raw)} bytes, more than {_MOST_BYTES}")
    return _read_content(parse_object(raw, MANIFEST))


def _read_content(content: dict[str, Any]) -> Manifest:
    top = _Record(content, "the artifact")
    version = top.integer("qc", 1, 2**31)
    if version != FORMAT:
        raise ArtifactError(
            f"the artifact has format {version}; this qc reads format {FORMAT}: "
            "update qc, or compile the model again"
        )
    executor = top.text("executor")
    if executor not in EXECUTORS:
        known = ", ".join(EXECUTORS)
        raise ArtifactError(f"the artifact needs the executor {executor!r}; this qc has {known}")

    context = top.integer("context_length", 1, _MOST_CONTEXT) if top.has("context_length") else None
    symbols = _read_symbols(top)
    values = tuple(
        _read_value(_Record(each, f"value {i}"), symbols)
        for i, each in enumerate(top.items("values"))
    )
    _refuse_duplicates("value", (value.name for value in values))
    steps = tuple(
        _read_step(_Record(each, f"step {i}"), values, symbols)
        for i, each in enumerate(top.items("steps"))
    )
    code = _read_code(top) if top.has("code") else {}
    manifest = Manifest(
        target=_read_target(_Record(top.table("target"), "the target")),
        symbols=tuple(symbols),
        values=values,
        steps=steps,
        inputs=_read_signature(top, "inputs", values),
        outputs=_read_signature(top, "outputs", values),
        context_length=context,
        generate=_read_generate(top, values, code) if top.has("generate") else None,
        report=top.table("report") if top.has("report") else {},
        tokenizer=top.take("tokenizer", "true or false", _boolean)
        if top.has("tokenizer")
        else False,
        files=_read_files(top) if top.has("files") else {},
        executor=executor,
        code=code,
        golden=_read_golden(top, steps, values, symbols) if top.has("golden") else (),
    )
    top.done()
    _check_whole(manifest)
    return manifest


def _boolean(content: object) -> bool | None:
    return content if isinstance(content, bool) else None


def _refuse_duplicates(what: str, names: Iterable[str]) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise ArtifactError(f"{MANIFEST}: two {what}s are called {name!r}")
        seen.add(name)


def _read_symbols(top: _Record) -> dict[str, None]:
    names = top.items("symbols", 64)
    for name in names:
        if not is_symbol_name(name):
            raise ArtifactError(f"{MANIFEST}: {str(name)[:60]!r} cannot name a symbol")
    _refuse_duplicates("symbol", names)
    return dict.fromkeys(names)


def _read_target(record: _Record) -> TargetFacts:
    features = record.items("features", 500) if record.has("features") else []
    for feature in features:
        if not isinstance(feature, str) or not re.fullmatch(r"[a-z0-9_.]{1,40}", feature):
            raise ArtifactError(f"{MANIFEST}: {str(feature)[:60]!r} cannot be a CPU feature")
    target = TargetFacts(record.text("name"), record.text("arch"), tuple(features))
    record.done()
    return target


def _read_dim(content: object, symbols: Iterable[str], where: str) -> Expression:
    if type(content) is int or isinstance(content, str):
        expression = parse_expression(content)
        for symbol in expression.symbols:
            if symbol not in symbols:
                hint = nearest(symbol, symbols)
                raise ArtifactError(f"{MANIFEST}: {where} uses the unknown symbol {symbol!r}{hint}")
        return expression
    raise ArtifactError(f"{MANIFEST}: {where} holds {str(content)[:60]!r}, not an expression")


def _read_shape(record: _Record, symbols: Iterable[str]) -> tuple[Dim, ...]:
    dims = record.items("shape", _MOST_DIMENSIONS)
    for dim in dims:
        expression = _read_dim(dim, symbols, f"the shape of {record.where}")
        if PAST in expression.symbols:
            raise ArtifactError(f'{MANIFEST}: the shape of {record.where} may not use "{PAST}"')
        if type(dim) is int and dim < 0:
            raise ArtifactError(f"{MANIFEST}: the shape of {record.where} has the size {dim}")
    return tuple(dims)


def _read_value(record: _Record, symbols: Iterable[str]) -> Value:
    name = record.text("name")
    record.where = f"value {name!r}"
    kind: Kind = record.take(
        "kind",
        "one of " + ", ".join(get_args(Kind)),
        lambda v: _KINDS.get(v) if isinstance(v, str) else None,
    )
    dtype = record.take(
        "dtype",
        "one of " + ", ".join(DTYPES),
        lambda v: v if isinstance(v, str) and v in DTYPES else None,
    )
    shape = _read_shape(record, symbols)
    used = {symbol for dim in shape for symbol in parse_expression(dim).symbols}
    tensor = record.text("tensor") if kind == "weight" else None
    if kind == "weight" and used:
        raise ArtifactError(f"{MANIFEST}: the shape of weight {name!r} must be made of integers")
    if kind == "state" and not used <= {"batch", CONTEXT}:
        raise ArtifactError(
            f"{MANIFEST}: the shape of state {name!r} may use batch and context only"
        )
    below = None
    if record.has("below"):
        below = record.integer("below", 1, 2**62)
        if kind != "input" or not DTYPES[dtype].is_integer:
            raise ArtifactError(f'{MANIFEST}: "below" is for integer inputs, {name!r} is none')
    record.done()
    return Value(name, dtype, shape, kind, tensor, below)


def _read_indices(record: _Record, key: str, values: tuple[Value, ...]) -> tuple[int, ...]:
    indices = record.items(key)
    for index in indices:
        _check_index(index, values, f'"{key}" of {record.where}')
    return tuple(indices)


def _check_index(index: object, values: tuple[Value, ...], where: str) -> int:
    if type(index) is not int or not 0 <= index < len(values):
        raise ArtifactError(
            f"{MANIFEST}: {where} names value {str(index)[:40]} of {len(values)} values"
        )
    return index


def _read_step(record: _Record, values: tuple[Value, ...], symbols: Iterable[str]) -> Step:
    origin = record.text("origin", empty=True) if record.has("origin") else ""
    reads = _read_indices(record, "reads", values)
    writes = _read_indices(record, "writes", values)
    when = _read_when(record, symbols) if record.has("when") else {}
    step: Step
    if record.has("torch"):
        name = record.text("torch")
        if not re.fullmatch(r"aten::[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)?", name):
            raise ArtifactError(
                f"{MANIFEST}: {record.where} names the torch operator {name[:60]!r}"
            )
        args = tuple(record.items("args", 64))
        kwargs = record.table("kwargs") if record.has("kwargs") else {}
        used = {
            index
            for each in (*args, *kwargs.values())
            for index in _check_template(each, record.where, values, symbols)
        }
        step = TorchStep(name, args, reads, writes, kwargs, origin, when)
        needed = used
    else:
        name = record.text("kernel")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", name):
            raise ArtifactError(f"{MANIFEST}: {record.where} names the kernel {name[:60]!r}")
        read_args = tuple(
            _read_arg(_Record(each, f"argument {i} of {record.where}"), values, symbols)
            for i, each in enumerate(record.items("args", 256))
        )
        grid = _read_grid(record, symbols) if record.has("grid") else ()
        late = _read_indices(record, "late", values) if record.has("late") else ()
        step = KernelStep(name, read_args, reads, writes, origin, when, grid, late)
        needed = {arg.value for arg in read_args if isinstance(arg, ValueArg)}
    record.done()
    listed = {*reads, *writes} if isinstance(step, KernelStep) else set(reads)
    for index in needed - listed:
        raise ArtifactError(
            f"{MANIFEST}: {record.where} ({name}) uses value {values[index].name!r} "
            "without listing it in reads or writes"
        )
    for index in writes:
        if values[index].kind in ("weight", "input"):
            raise ArtifactError(
                f"{MANIFEST}: {record.where} ({name}) writes to the {values[index].kind} "
                f"{values[index].name!r}"
            )
    return step


def _read_when(record: _Record, symbols: Iterable[str]) -> Mapping[str, tuple[int, int | None]]:
    result: dict[str, tuple[int, int | None]] = {}
    for symbol, span in record.table("when").items():
        size = _read_dim(symbol, symbols, f'"when" of {record.where}')
        if PAST in size.symbols or not size.symbols:
            raise ArtifactError(f"{MANIFEST}: {record.where} depends on the size {symbol[:60]!r}")
        match span:
            case [int(low), (int() | None) as high] if type(low) is int and type(high) is not bool:
                result[symbol] = (low, high)
            case _:
                raise ArtifactError(
                    f'{MANIFEST}: "when" of {record.where} needs ranges [low, high or null]'
                )
    return result


def _read_grid(record: _Record, symbols: Iterable[str]) -> tuple[Dim, ...]:
    grid = record.items("grid", 3)
    if len(grid) != 3:
        raise ArtifactError(f'{MANIFEST}: "grid" of {record.where} must have three sizes')
    for dim in grid:
        if PAST in _read_dim(dim, symbols, f"the grid of {record.where}").symbols:
            raise ArtifactError(f'{MANIFEST}: the grid of {record.where} may not use "{PAST}"')
    return tuple(grid)


_ARCHITECTURE = re.compile("(sm|ptx)_[0-9]{2,3}|gfx[0-9a-f]{3,4}")
_PARAMETERS = ("pointer", "i32", "i64")
_MOST_SHARED = 2**20


def _read_code(top: _Record) -> dict[str, Code]:
    found = {}
    for name, content in top.table("code").items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", name):
            raise ArtifactError(f"{MANIFEST}: {name[:60]!r} cannot name a kernel")
        record = _Record(content, f"kernel {name!r}")
        parameters = record.items("parameters", 256)
        if any(each not in _PARAMETERS for each in parameters):
            raise ArtifactError(
                f"{MANIFEST}: the parameters of kernel {name!r} must be of {', '.join(_PARAMETERS)}"
            )
        found[name] = Code(
            record.take(
                "function",
                "the name of a function",
                lambda v: v if isinstance(v, str) and re.fullmatch(r"\w{1,200}", v) else None,
            ),
            record.integer("warps", 1, 32),
            tuple(parameters),
            tuple(
                _read_binary(_Record(each, f"a binary of kernel {name!r}"))
                for each in record.items("binaries", 64)
            ),
            record.take("constants", "numbers and texts by name", _constants)
            if record.has("constants")
            else {},
            record.take("overlaps", "true or false", _boolean) if record.has("overlaps") else False,
        )
        record.done()
    return found


def _constants(content: object) -> dict[str, int | float | bool | str] | None:
    if not isinstance(content, dict):
        return None
    plain = all(isinstance(each, int | float | bool | str) for each in content.values())
    return content if plain else None


def _read_binary(record: _Record) -> Binary:
    binary = Binary(
        record.take(
            "architecture",
            'an architecture, such as "sm_90"',
            lambda v: v if isinstance(v, str) and _ARCHITECTURE.fullmatch(v) else None,
        ),
        record.take(
            "file",
            "the name of a file",
            lambda v: v if isinstance(v, str) and is_file_name(v) else None,
        ),
        record.integer("shared", 0, _MOST_SHARED),
    )
    record.done()
    return binary


def _read_golden(
    top: _Record, steps: tuple[Step, ...], values: tuple[Value, ...], symbols: Iterable[str]
) -> tuple[GoldenCheck, ...]:
    return tuple(
        _read_check(_Record(each, f"golden check {i}"), steps, values, symbols)
        for i, each in enumerate(top.items("golden"))
    )


def _read_check(
    record: _Record, steps: tuple[Step, ...], values: tuple[Value, ...], symbols: Iterable[str]
) -> GoldenCheck:
    numbers = record.items("steps", 64)
    if not numbers or any(type(each) is not int or not 0 <= each < len(steps) for each in numbers):
        raise record.fail("steps", f"numbers of the {len(steps)} steps")
    sizes = record.table("sizes")
    for symbol, size in sizes.items():
        if symbol not in symbols or type(size) is not int or not 0 <= size <= _MOST_CONTEXT:
            raise ArtifactError(f"{MANIFEST}: {record.where} gives {symbol[:60]!r} no size")
    inputs = record.table("inputs")
    for index, tensor in inputs.items():
        number = int(index) if re.fullmatch("[0-9]{1,9}", index) else -1
        _check_index(number, values, f'"inputs" of {record.where}')
        if not isinstance(tensor, str):
            raise record.fail("inputs", "names of tensors by values")
    check = GoldenCheck(
        tuple(numbers),
        sizes,
        inputs,
        _check_index(record.take("result", "a value", lambda v: v), values, record.where),
        record.text("expected"),
        record.take(
            "tolerance",
            "a number from 0 to 1",
            lambda v: float(v) if type(v) in (int, float) and 0 <= v <= 1 else None,
        ),
    )
    record.done()
    return check


def _read_arg(
    record: _Record, values: tuple[Value, ...], symbols: Iterable[str]
) -> ValueArg | Scalar:
    if record.has("symbol"):
        dim: Dim = record.content.pop("symbol")
        _read_dim(dim, symbols, record.where)
        record.done()
        return Scalar(dim)
    index = record.take("value", "the index of a value", lambda v: v)
    _check_index(index, values, record.where)
    shape = _read_shape(record, symbols) if record.has("shape") else None
    offset: Dim = record.content.pop("offset", 0)
    _read_dim(offset, symbols, f"the offset of {record.where}")
    record.done()
    return ValueArg(index, shape, offset)


def _check_template(
    content: object,
    where: str,
    values: tuple[Value, ...],
    symbols: Iterable[str],
    depth: int = 0,
) -> set[int]:
    """Check one argument of a torch step; return the values that it uses."""
    if depth > 4:
        raise ArtifactError(f"{MANIFEST}: an argument of {where} is nested too deeply")
    if content is None or isinstance(content, bool | int | float | str):
        return set()
    if isinstance(content, list) and len(content) <= 4096:
        return {
            i for each in content for i in _check_template(each, where, values, symbols, depth + 1)
        }
    record = _Record(content, f"an argument of {where}")
    used = set()
    if record.has("value"):
        index = _check_index(record.content.pop("value"), values, record.where)
        used.add(index)
        if record.has("shape"):
            _read_shape(record, symbols)
    elif record.has("symbol"):
        _read_dim(record.content.pop("symbol"), symbols, record.where)
    else:
        record.take(
            "dtype",
            "one of " + ", ".join(DTYPES),
            lambda v: v if isinstance(v, str) and v in DTYPES else None,
        )
    record.done()
    return used


def _read_signature(
    top: _Record, key: Literal["inputs", "outputs"], values: tuple[Value, ...]
) -> tuple[str, ...]:
    kind = key[:-1]
    declared = {value.name for value in values if value.kind == kind}
    names = top.items(key)
    for name in names:
        if not isinstance(name, str) or name not in declared:
            hint = nearest(str(name), declared)
            raise ArtifactError(
                f"{MANIFEST}: {key} lists {str(name)[:60]!r}, no {kind} value{hint}"
            )
    _refuse_duplicates(kind, names)
    for name in sorted(declared - set(names)):
        raise ArtifactError(f"{MANIFEST}: the {kind} value {name!r} is missing in {key}")
    return tuple(names)


def _read_generate(top: _Record, values: tuple[Value, ...], code: Mapping[str, Code]) -> Generate:
    record = _Record(top.table("generate"), "generate")
    by_name = {value.name: value for value in values}
    tokens = by_name.get(record.text("tokens"))
    logits = by_name.get(record.text("logits"))
    if (
        tokens is None
        or tokens.kind != "input"
        or not tokens.element.is_integer
        or len(tokens.shape) != 2
    ):
        raise ArtifactError(
            f'{MANIFEST}: "tokens" of generate must name an input [batch, seq] of ids'
        )
    if (
        logits is None
        or logits.kind != "output"
        or not logits.element.is_float
        or len(logits.shape) != 3
    ):
        raise ArtifactError(
            f'{MANIFEST}: "logits" of generate must name an output [batch, keep, vocabulary]'
        )
    eos = record.items("eos", 1000) if record.has("eos") else []
    if not all(type(each) is int and 0 <= each < 2**31 for each in eos):
        raise record.fail("eos", "a list of token ids")

    def token(key: str) -> int | None:
        return record.integer(key, 0, 2**31) if record.has(key) else None

    generate = Generate(
        tokens=tokens.name,
        logits=logits.name,
        eos=tuple(eos),
        bos=token("bos"),
        pad=token("pad"),
        top_k=token("top_k"),
        top_p=record.take(
            "top_p",
            "a number above 0 and at most 1",
            lambda v: float(v) if type(v) in (int, float) and 0 < v <= 1 else None,
        )
        if record.has("top_p")
        else None,
        chunk=record.integer("chunk", 1, 2**20) if record.has("chunk") else DEFAULT_CHUNK,
        sampler=_read_sampler(record, logits, code) if record.has("sampler") else (),
    )
    record.done()
    return generate


SAMPLER_POINTERS = 3, 5
"""How many pointers the kernels of a sampler take."""


def _read_sampler(record: _Record, logits: Value, code: Mapping[str, Code]) -> tuple[str, ...]:
    """Read the names of the two kernels that choose tokens."""
    names = record.items("sampler", 2)
    kinds = [code[name].parameters if name in code else None for name in names]
    if names and kinds != [(*("pointer",) * count, "i32") for count in SAMPLER_POINTERS]:
        raise record.fail("sampler", "the two kernels of qc/runtime/cuda/sampling.py")
    if names and (logits.dtype != "f32" or type(logits.shape[-1]) is not int):
        raise record.fail("sampler", "empty where logits are not f32 of a known vocabulary")
    return tuple(names)


def _read_files(top: _Record) -> dict[str, FileEntry]:
    files = {}
    for name, content in top.table("files").items():
        if not is_file_name(name) or name == MANIFEST:
            raise ArtifactError(f"{MANIFEST}: {name[:80]!r} cannot be a file of an artifact")
        record = _Record(content, f"file {name!r}")
        files[name] = FileEntry(
            record.integer("bytes", 0, 2**62),
            record.take(
                "sha256",
                "64 hexadecimal digits",
                lambda v: v if isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) else None,
            ),
        )
        record.done()
    return files


def _check_whole(manifest: Manifest) -> None:
    """Check what no part can see alone."""
    written: set[int] = set()
    for step in manifest.steps:
        for index in step.reads:
            value = manifest.values[index]
            if value.kind in ("scratch", "output") and index not in written:
                raise ArtifactError(
                    f"{MANIFEST}: value {value.name!r} is read before any step writes it"
                )
        written.update(step.writes)
    if manifest.executor == TORCH and manifest.steps:
        raise ArtifactError(f"{MANIFEST}: the torch executor takes no steps")
    if manifest.executor in ON_GPUS:
        for at, step in enumerate(manifest.steps):
            _check_launch(at, step, manifest.code)
    for index, value in enumerate(manifest.values):
        if manifest.executor != TORCH and value.kind == "output" and index not in written:
            raise ArtifactError(f"{MANIFEST}: no step writes the output {value.name!r}")
    given = {
        parse_expression(dim).text
        for value in manifest.values
        if value.kind == "input"
        for dim in value.shape
        if parse_expression(dim).is_symbol
    }
    for symbol in manifest.symbols:
        if symbol not in BOUND_BY_EXECUTOR and symbol not in given:
            raise ArtifactError(
                f"{MANIFEST}: no input has a dimension {symbol!r}, so its size is never known"
            )
    stateful = any(value.kind == "state" for value in manifest.values)
    if stateful and (manifest.context_length is None or manifest.generate is None):
        raise ArtifactError(f"{MANIFEST}: a model with state needs context_length and generate")


def _check_launch(at: int, step: Step, code: Mapping[str, Code]) -> None:
    """Compare a launch with the kernel: a wrong argument would be read as an address."""
    if not isinstance(step, KernelStep):
        raise ArtifactError(f"{MANIFEST}: step {at} calls torch, which a GPU artifact cannot")
    if step.kernel not in code:
        raise ArtifactError(f"{MANIFEST}: step {at} calls the kernel {step.kernel!r}, not in code")
    if len(step.grid) != 3:
        raise ArtifactError(f"{MANIFEST}: step {at} ({step.kernel}) has no grid")
    expected = code[step.kernel].parameters
    if len(step.args) != len(expected):
        raise ArtifactError(
            f"{MANIFEST}: step {at} passes {len(step.args)} arguments; {step.kernel} takes "
            f"{len(expected)}"
        )
    for number, (argument, kind) in enumerate(zip(step.args, expected, strict=True)):
        moves = isinstance(argument, Scalar) and PAST in parse_expression(argument.symbol).symbols
        if (isinstance(argument, ValueArg) or moves) != (kind == "pointer"):
            raise ArtifactError(
                f"{MANIFEST}: argument {number} of step {at} is no {kind}, "
                f"which {step.kernel} takes"
            )
    if code[step.kernel].overlaps and (not step.args or step.args[-1] != Scalar(0)):
        raise ArtifactError(
            f"{MANIFEST}: step {at} must pass 0 last: {step.kernel} is told there whether it may "
            "begin early"
        )
