"""Load a compiled model from its folder, and use it.

artifact = load("smollm2.qc")
artifact([1, 2, 3])                                    # logits
for piece in artifact.stream_text("Hello", chat=True): print(piece, end="")
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qc.errors import ArtifactError, ContextLengthError, InputError, UnsupportedError, nearest
from qc.runtime.arrays import as_array, give_back
from qc.runtime.executor import Executor, Program
from qc.runtime.explanation import FIGURES, Explanation, read_explanation
from qc.runtime.library import Library
from qc.runtime.machine import check_machine
from qc.runtime.manifest import (
    CUDA,
    LIBRARY,
    MANIFEST,
    NATIVE,
    ROCM,
    TORCH,
    WEIGHTS,
    KernelStep,
    Manifest,
    Scalar,
    Step,
    TorchStep,
    ValueArg,
)
from qc.runtime.package import copy_artifact, file_entry
from qc.runtime.safetensors_file import SafetensorsFile
from qc.runtime.sampling import Sampling
from qc.runtime.session import Session, as_float, generation_of
from qc.runtime.strict_json import parse_object
from qc.runtime.tables import KernelTime, Profile, Report, Verification
from qc.runtime.text import Message, TextModel, stream_pieces

__all__ = ["Artifact", "load"]

_DEFAULT_NEW_TOKENS = 128
_IDLE_EXECUTORS = 2


def load(
    path: str | os.PathLike[str], *, verify: bool = False, temporary: bool = False
) -> Artifact:
    """Load an artifact. Nothing but the small files is read: weights are mapped into memory.

    `verify` also compares the SHA-256 of every file. `temporary` deletes the folder when the
    artifact is no longer used. An artifact holds machine code: load only what you would run. Raises
    ArtifactError for a folder that is missing, corrupt, of another format, or for another machine.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest.executor == TORCH:
        raise ArtifactError(f"{folder} runs on {manifest.executor}: load it with qc.load")
    return open_artifact(folder, manifest, compiled_program, verify=verify, temporary=temporary)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artifact that this machine can run. Raises ArtifactError."""
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as error:
        what = "is not an artifact (no manifest.json)" if folder.is_dir() else "does not exist"
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            what = f"cannot be read: {error.strerror}"
        raise ArtifactError(f"{folder} {what}") from None
    manifest = Manifest.parse(raw)
    check_machine(manifest.target)
    return manifest


def open_artifact(
    folder: Path,
    manifest: Manifest,
    open_program: Callable[[Path, Manifest], Program],
    *,
    verify: bool = False,
    temporary: bool = False,
) -> Artifact:
    """Check the files of an artifact and open its program; see `load`."""
    _check_files(folder, manifest, verify)
    artifact = Artifact(folder, open_program(folder, manifest))
    if temporary:
        weakref.finalize(artifact, shutil.rmtree, folder.absolute(), ignore_errors=True)
    return artifact


def compiled_program(folder: Path, manifest: Manifest) -> Program:
    """Open a program that holds its own machine code."""
    if manifest.executor == CUDA:
        from qc.runtime.cuda.executor import open_cuda_program

        return open_cuda_program(folder, manifest)
    if manifest.executor == ROCM:
        from qc.runtime.cuda.hip import open_hip_program

        return open_hip_program(folder, manifest)
    return native_program(folder, manifest)


def native_program(folder: Path, manifest: Manifest) -> Program:
    """Open the library and map the weights."""
    has_kernels = any(isinstance(step, KernelStep) for step in manifest.steps)
    library = (
        Library.open(folder / LIBRARY, manifest.files[LIBRARY].sha256) if has_kernels else None
    )
    if library is not None and "amx_tile" in manifest.target.features:
        library.request_tiles()
    weights = SafetensorsFile(folder / WEIGHTS) if WEIGHTS in manifest.files else {}
    return Program(manifest, weights, library)


def _check_files(folder: Path, manifest: Manifest, verify: bool) -> None:
    """Compare the files with the manifest: those it needs are listed, those listed are there."""
    native = manifest.executor == NATIVE
    needed = {LIBRARY: native and any(isinstance(step, KernelStep) for step in manifest.steps)}
    needed |= {each.file: True for code in manifest.code.values() for each in code.binaries}
    needed[WEIGHTS] = any(value.kind == "weight" for value in manifest.values)
    needed["tokenizer.json"] = manifest.tokenizer
    for name, is_needed in needed.items():
        if is_needed and name not in manifest.files:
            raise ArtifactError(f"{MANIFEST} lists no {name}, which the model needs")
    root = folder.resolve()
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(root) or not path.is_file():
            raise ArtifactError(f"{folder} has no file {name}")
        size = path.stat().st_size
        if size != entry.bytes:
            raise ArtifactError(f"{path} is corrupt: it has {size} bytes instead of {entry.bytes}")
        if verify and file_entry(path) != entry:
            raise ArtifactError(f"{path} is corrupt: its SHA-256 is not that of the manifest")


class Artifact:
    """Use a compiled model. Threads may share an artifact: each call has its own state."""

    def __init__(self, path: Path, program: Program) -> None:
        self.path = path
        self.manifest = program.manifest
        self._program = program
        self._idle: list[Executor] = []

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r}, target={self.manifest.target.name!r})"

    # ---- Running ------------------------------------------------------------------------------

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return the first output for these inputs: for a language model, logits of all tokens.

        Inputs are lists, numpy arrays or torch tensors, in the order of the model's signature or by
        name; token ids may be [batch, tokens], or [tokens], where the result has no batch either.
        The result is a numpy array, or a torch tensor if one came in; float16 and bfloat16 results
        come as float32. Raises InputError, ContextLengthError.
        """
        given = self._match_inputs(inputs, named)
        arrays = {name: as_array(each, self._program.value(name)) for name, each in given.items()}
        value = self._program.value(self.manifest.inputs[0])
        drop_batch = len(arrays) == 1 and len(value.shape) == 2 and arrays[value.name].ndim == 1
        if drop_batch:
            arrays = {value.name: arrays[value.name][None]}
        with self._executor() as executor:
            result = self._run_all(executor, arrays)
        return give_back(result[0] if drop_batch else result, like=list(given.values()))

    def _match_inputs(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        names = self.manifest.inputs
        if len(inputs) > len(names):
            raise InputError(f"{len(inputs)} inputs came; the model takes {', '.join(names)}")
        given = dict(zip(names, inputs, strict=False))
        for name, each in named.items():
            if name not in names or name in given:
                fault = "came twice" if name in given else f"is unknown{nearest(name, names)}"
                raise InputError(f"input {name!r} {fault}; the model takes {', '.join(names)}")
            given[name] = each
        for name in names:
            if name not in given:
                raise InputError(f"input {name!r} is missing; the model takes {', '.join(names)}")
        return given

    def _run_all(self, executor: Executor, arrays: dict[str, NDArray[Any]]) -> NDArray[Any]:
        """Run one call, a prompt in chunks; return a copy of the first output for all positions."""
        name = self.manifest.outputs[0]
        value = self._program.value(name)
        generate = self.manifest.generate
        if not self._program.has_state or generate is None:
            return as_float(executor.run(arrays).outputs[name], value.dtype)
        tokens = arrays.pop(generate.tokens)
        if tokens.ndim != 2 or tokens.size == 0:
            raise InputError(
                f"input {generate.tokens!r} must have shape [batch, seq], not {list(tokens.shape)}"
            )
        executor.reserve(tokens.shape[0], tokens.shape[1])
        pieces = [
            as_float(
                executor.run(
                    arrays | {generate.tokens: tokens[:, start : start + generate.chunk]}
                ).outputs[name],
                value.dtype,
            )
            for start in range(0, tokens.shape[1], generate.chunk)
        ]
        along = next((i for i, dim in enumerate(value.shape) if dim in ("keep", "seq")), None)
        return pieces[-1] if along is None else np.concatenate(pieces, axis=along)

    @contextmanager
    def _executor(self) -> Iterator[Executor]:
        """Lend an executor that nobody else uses; its memory and bindings are kept for the next."""
        try:
            executor = self._idle.pop()  # atomic, like append below
        except IndexError:
            executor = self._program.executor()
        try:
            yield executor
        finally:
            executor.reset()
            if len(self._idle) < _IDLE_EXECUTORS:
                self._idle.append(executor)

    def session(self, batch: int = 1) -> Session:
        """Start an empty session: `prefill` tokens, then `step` one by one."""
        return Session(self._program.executor(), batch)

    def set_threads(self, count: int | None = None) -> int:
        """Run on `count` threads, or one for each CPU of this process; return how many that is."""
        return self._program.library.set_threads(count) if self._program.library else 0

    # ---- Generating ---------------------------------------------------------------------------

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_tokens: Sequence[int] = (),
        chunk: int | None = None,
    ) -> Any:
        """Return the ids of the prompt and of what follows it, as the kind that came in.

        `input_ids` is [tokens] or [batch, tokens], as list, numpy or torch; a list of lists of
        unequal lengths runs row after row. A row ends with `max_new_tokens` (default 128, or what
        fits), the model's end marks or `stop_tokens`; rows that end early are filled up with the
        padding token. Temperature 0 takes the most likely token; above, tokens are drawn with
        `seed`, from the `top_k` / `top_p` most likely (default: the model's). Raises InputError,
        ContextLengthError.
        """
        sampling = self._sampling(temperature, top_k, top_p)
        if _is_ragged(input_ids):
            return [
                self.generate(
                    row,
                    max_new_tokens,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    seed=seed,
                    stop_tokens=stop_tokens,
                    chunk=chunk,
                )
                for row in input_ids
            ]
        ids = self._prompt(input_ids)
        rows = ids[None] if ids.ndim == 1 else ids
        new = list(self._follow(rows, max_new_tokens, sampling, seed, stop_tokens, chunk))
        result = np.concatenate(
            [rows, np.array(new, rows.dtype).reshape(-1, rows.shape[0]).T], axis=1
        )
        result = result[0] if ids.ndim == 1 else result
        return (
            result.tolist()
            if isinstance(input_ids, list | tuple)
            else give_back(result, [input_ids])
        )

    def stream(
        self,
        input_ids: Any,
        max_new_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_tokens: Sequence[int] = (),
        chunk: int | None = None,
    ) -> Iterator[int]:
        """Yield the new token ids of one row as they are chosen; see `generate`."""
        sampling = self._sampling(temperature, top_k, top_p)
        ids = self._prompt(input_ids)
        rows = ids[None] if ids.ndim == 1 else ids
        if rows.shape[0] != 1:
            raise InputError(f"streaming takes one row of token ids, not {rows.shape[0]}")
        follow = self._follow(rows, max_new_tokens, sampling, seed, stop_tokens, chunk)
        return (row[0] for row in follow)

    def stream_text(
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int | None = None,
        *,
        chat: bool = False,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Yield the continuation of a text in pieces, or with `chat` the answer to it (or to
        messages).

        No piece ends within a character. See `generate` for the other arguments.
        """
        model = self.text
        if chat or not isinstance(prompt, str):
            ids = model.encode_chat(prompt)
        else:
            ids = model.encode(prompt)
        if not ids and self.manifest.generate and self.manifest.generate.bos is not None:
            ids = [self.manifest.generate.bos]
        tokens = self.stream(
            ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        return stream_pieces(model, tokens, ids)

    def _sampling(self, temperature: float, top_k: int | None, top_p: float | None) -> Sampling:
        generate = generation_of(self.manifest)
        return Sampling(
            temperature,
            generate.top_k if top_k is None else top_k,
            generate.top_p if top_p is None else top_p,
        )

    def _prompt(self, input_ids: Any) -> NDArray[Any]:
        """Return a prompt as an array of one or two dimensions."""
        generate = generation_of(self.manifest)
        ids = as_array(input_ids, self._program.value(generate.tokens))
        if ids.ndim not in (1, 2) or ids.size == 0:
            raise InputError(
                f"a prompt has at least one token id; this has shape {list(ids.shape)}"
            )
        return ids

    def _follow(
        self,
        rows: NDArray[Any],
        max_new_tokens: int | None,
        sampling: Sampling,
        seed: int | None,
        stop_tokens: Sequence[int],
        chunk: int | None,
    ) -> Iterator[list[int]]:
        """Check the lengths now, then yield one new token of every row at a time."""
        generate = generation_of(self.manifest)
        room = (self.manifest.context_length or 2**62) - rows.shape[1]
        count = min(_DEFAULT_NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens
        if count < 0 and max_new_tokens is not None:
            raise InputError(f"max_new_tokens must be 0 or more, not {count}")
        if count > room or room < 0:
            raise ContextLengthError(
                f"{rows.shape[1]} tokens of prompt and {max(count, 0)} new ones do not fit: "
                f"the context of this model holds {self.manifest.context_length}"
            )
        stop = frozenset(stop_tokens) | frozenset(generate.eos)
        pad = next((t for t in (generate.pad, *generate.eos, *stop_tokens) if t is not None), 0)
        random = np.random.default_rng(seed)

        def run() -> Iterator[list[int]]:
            alive = [True] * rows.shape[0]
            if count == 0:
                return
            with self._executor() as executor:
                session = Session(executor, rows.shape[0])
                session.reserve(rows.shape[1] + count)
                chosen = sampling.choose_rows(session.prefill(rows, chunk), random, alive, pad)
                for left in range(count - 1, -1, -1):
                    alive = [
                        going and token not in stop
                        for token, going in zip(chosen, alive, strict=True)
                    ]
                    yield chosen
                    if not left or not any(alive):
                        return
                    chosen = session.choose(chosen, sampling, random, alive, pad)

        return run()

    # ---- Text ---------------------------------------------------------------------------------

    @cached_property
    def text(self) -> TextModel:
        """The tokenizer and chat template. Raises UnsupportedError if the model came without."""
        if not self.manifest.tokenizer:
            raise UnsupportedError("this artifact has no tokenizer: use token ids")
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        return TextModel(
            {n: (self.path / n).read_bytes() for n in names if n in self.manifest.files}
        )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, of the `tokenizers` library."""
        return self.text.tokenizer

    # ---- Looking inside -----------------------------------------------------------------------

    def report(self) -> Report:
        """Return what the compiler did with each layer, and the sums; print it for a table."""
        return Report(self.manifest.report)

    def explain(self) -> Explanation:
        """Return where the loss of quantization comes from, by layer and by pass, as it was
        measured when this was compiled with `explain`. Raises InputError where it was not."""
        if FIGURES not in self.manifest.files:
            raise InputError(
                "this artifact holds no explanation: compile it with explain=True (--explain), or "
                "run `qc explain MODEL` with the same target and recipe"
            )
        return read_explanation(parse_object((self.path / FIGURES).read_bytes(), FIGURES))

    @property
    def plan(self) -> str:
        """The steps of the program, one a line."""
        return "\n".join(
            f"{at:4d}  {self._describe(step)}" for at, step in enumerate(self.manifest.steps)
        )

    def _describe(self, step: Step) -> str:
        values = self.manifest.values

        def show(arg: Any) -> str:
            if isinstance(arg, Scalar):
                return str(arg.symbol)
            if isinstance(arg, ValueArg):
                at = f" from {arg.offset}" if arg.offset != 0 else ""
                shape = "" if arg.shape is None else f"[{', '.join(map(str, arg.shape))}]"
                return f"%{values[arg.value].name}{shape}{at}"
            if isinstance(arg, dict) and "value" in arg:
                return f"%{values[arg['value']].name}"
            if isinstance(arg, dict):
                return str(next(iter(arg.values())))
            return str(arg)

        results = ", ".join(f"%{values[index].name}" for index in step.writes)
        name = step.torch if isinstance(step, TorchStep) else step.kernel
        args = ", ".join(map(show, step.args))
        when = ", ".join(f"{s} in {low}..{high or ''}" for s, (low, high) in step.when.items())
        comment = "; ".join(part for part in (step.origin, f"if {when}" if when else "") if part)
        return f"{results} = {name}({args})" + (f"   # {comment}" if comment else "")

    def source(self, kernel: str) -> str:
        """Return the generated source of a kernel. Raises InputError."""
        return self._read_text("source", kernel, "kernel source")

    def ir(self, stage: str) -> str:
        """Return the printed graph of a stage ("captured", "quantized", ...). Raises InputError."""
        return self._read_text("ir", stage, "stage")

    @property
    def sources(self) -> list[str]:
        """The kernels whose source is there."""
        return list(self._texts("source"))

    @property
    def stages(self) -> list[str]:
        """The stages whose graph is there."""
        return list(self._texts("ir"))

    def _texts(self, folder: str) -> dict[str, str]:
        """Return the files of a folder by the part of their name before the first dot."""
        return {
            name.partition("/")[2].split(".")[0]: name
            for name in self.manifest.files
            if name.startswith(f"{folder}/")
        }

    def _read_text(self, folder: str, name: str, what: str) -> str:
        texts = self._texts(folder)
        if name not in texts:
            raise InputError(f"this artifact has no {what} {name!r}{nearest(name, texts)}")
        return (self.path / texts[name]).read_text(encoding="utf-8", errors="replace")

    def profile(self, input_ids: Any = None, *, new_tokens: int = 16, **inputs: Any) -> Profile:
        """Time every kernel: prefill of `input_ids` (default: 64 tokens), then one decode step.

        Times of decode are means over `new_tokens` steps. A model that does not generate has one
        phase, "run", for the given inputs. The first run, which wakes threads and fills caches, is
        left out.
        """
        phases: dict[str, dict[str, list[float]]] = {}
        with self._executor() as executor:
            if self.manifest.generate is None or inputs or not self._program.has_state:
                given = self._match_inputs(() if input_ids is None else (input_ids,), inputs)
                arrays = {n: as_array(v, self._program.value(n)) for n, v in given.items()}
                binding = executor.run(arrays)
                return _profile_of({"run": _sum_up(binding.steps, [binding.profile()])})
            generate = generation_of(self.manifest)
            most = min(64, (self.manifest.context_length or 2**62) - new_tokens)
            ids = self._prompt([0] * most if input_ids is None else input_ids)
            rows = (ids[None] if ids.ndim == 1 else ids)[:, : generate.chunk]
            executor.reserve(rows.shape[0], rows.shape[1] + new_tokens)
            binding = executor.run({generate.tokens: rows}, keep=1)
            phases["prefill"] = _sum_up(binding.steps, [binding.profile(0)])
            binding = executor.run({generate.tokens: rows[:, :1]}, keep=1)
            seconds = [binding.profile(rows.shape[1] + at) for at in range(new_tokens)]
            phases["decode"] = _sum_up(binding.steps, seconds)
        return _profile_of(phases)

    def verify(self) -> Verification:
        """Run every kernel once on stored inputs and compare with stored outputs; say of each
        whether it is right. UnsupportedError for artifacts that hold none."""
        if not self.manifest.golden:
            raise UnsupportedError(
                f"this artifact holds no golden outputs: only those for GPUs do, and this one is "
                f"for {self.manifest.target.name}"
            )
        from qc.runtime.cuda.verify import verify_program

        return verify_program(self._program, self.path)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Copy the artifact to `path`, whole or not at all; an artifact there is replaced."""
        return copy_artifact(self.path, self.manifest, path)


def _is_ragged(ids: Any) -> bool:
    """Whether this is a list of rows whose lengths differ."""
    if not isinstance(ids, list | tuple) or not ids:
        return False
    return all(hasattr(row, "__len__") for row in ids) and len({len(row) for row in ids}) > 1


def _sum_up(
    steps: Sequence[Step], seconds: Sequence[NDArray[np.float64]]
) -> dict[str, list[float]]:
    """Sum the milliseconds of steps by kernel, as means over runs."""
    mean = 1e3 * np.mean(seconds, axis=0)
    by_kernel: dict[str, list[float]] = defaultdict(list)
    for step, milliseconds in zip(steps, mean, strict=True):
        name = step.kernel if isinstance(step, KernelStep) else step.torch
        by_kernel[name].append(float(milliseconds))
    return by_kernel


def _profile_of(phases: dict[str, dict[str, list[float]]]) -> Profile:
    rows = [
        KernelTime(phase, kernel, len(times), sum(times))
        for phase, kernels in phases.items()
        for kernel, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))
    ]
    return Profile(tuple(rows))
