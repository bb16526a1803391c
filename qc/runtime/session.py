"""Keep the state of one conversation with a model, and go through it token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qc.errors import ArtifactError, ContextLengthError, InputError, UnsupportedError
from qc.runtime.executor import Binding, Executor
from qc.runtime.manifest import Generate, Manifest
from qc.runtime.sampling import NOT_NUMBERS, Sampling

__all__ = ["Session", "as_float", "generation_of"]

Ids = NDArray[np.integer[Any]]


def generation_of(manifest: Manifest) -> Generate:
    """Return how this model generates. Raises UnsupportedError if it does not."""
    if manifest.generate is None:
        raise UnsupportedError("this model does not generate tokens; call it instead")
    if manifest.inputs != (manifest.generate.tokens,):
        raise UnsupportedError(
            f"this model needs the inputs {', '.join(manifest.inputs)}; "
            "generating takes token ids alone"
        )
    return manifest.generate


def as_float(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Copy an array, bfloat16 (held as uint16) and float16 as float32."""
    if dtype == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32 if dtype == "f16" else array.dtype)


class Session:
    """Hold the keys and values of `batch` rows of tokens, all of equal length.

    One thread at a time runs a session (others wait); sessions are independent of each other.
    """

    def __init__(self, executor: Executor, batch: int = 1) -> None:
        manifest = executor.program.manifest
        self._generate = generation_of(manifest)
        self._executor = executor
        self._limit = manifest.context_length or 2**62
        self._logits_dtype = executor.program.value(self._generate.logits).dtype
        self._below = executor.program.value(self._generate.tokens).below or 2**62
        self._element = executor.program.value(self._generate.tokens).element.numpy
        self._history = np.empty((batch, 0), np.int64)  # only of models without state
        self.batch = batch

    @property
    def past(self) -> int:
        """How many tokens of each row the session holds."""
        if self._executor.program.has_state:
            return self._executor.past
        return self._history.shape[1]

    @property
    def capacity(self) -> int:
        """How many tokens fit before the state is moved to larger memory."""
        return self._executor.capacity

    def reserve(self, positions: int) -> None:
        """Make room for `positions` tokens at once. Raises ContextLengthError."""
        with self._executor.lock:
            self._executor.reserve(self.batch, positions)

    def rewind(self, past: int) -> None:
        """Keep the first `past` tokens of each row and forget the others."""
        if not 0 <= past <= self.past:
            raise InputError(f"cannot rewind to {past} tokens: the session holds {self.past}")
        with self._executor.lock:
            self._history = self._history[:, :past]
            if self._executor.program.has_state:
                self._executor.past = past

    def prefill(self, ids: Any, chunk: int | None = None) -> NDArray[np.float32]:
        """Append tokens, `chunk` a call; return the logits after the last, [batch, vocabulary].

        `ids` is [tokens] or [batch, tokens]. Raises InputError, ContextLengthError.
        """
        rows = np.asarray(ids)
        rows = rows[None] if rows.ndim == 1 else rows
        if rows.ndim != 2 or rows.shape[0] != self.batch or rows.shape[1] == 0:
            raise InputError(
                f"this session takes ids of shape [{self.batch}, tokens], not {list(rows.shape)}"
            )
        if rows.dtype.kind not in "iu":
            raise InputError(f"token ids must be integers, not {rows.dtype}")
        self._check_range(int(rows.min()), int(rows.max()))
        with self._executor.lock:
            needed = self.past + rows.shape[1]
            if needed > self._limit:
                raise ContextLengthError(
                    f"{self.past} tokens and {rows.shape[1]} more are {needed}; "
                    f"the context of this model holds {self._limit}"
                )
            return self._last_logits(self._append(rows, chunk or self._generate.chunk)).copy()

    def step(self, ids: int | Any) -> NDArray[np.float32]:
        """Append one token to each row; return the logits after it, [batch, vocabulary]."""
        return self.advance([ids] if isinstance(ids, int) else list(ids)).copy()

    def advance(self, ids: list[int]) -> NDArray[np.float32]:
        """Do what `step` does, with a result that holds until the next call only."""
        executor = self._executor
        if not executor.program.has_state:
            return self.prefill(np.array(ids)[:, None])
        with executor.lock:
            binding = self._bind_step(ids)
            binding.run(executor.past)
            executor.past += 1
            return self._last_logits(binding)

    def choose(
        self, ids: list[int], sampling: Sampling, random: np.random.Generator,
        alive: Sequence[bool], pad: int,
    ) -> list[int]:  # fmt: skip
        """Append one token to each row; return the next of every row that is alive, `pad` of
        others. Where the program can, tokens are chosen without the logits coming here."""
        executor = self._executor
        if executor.program.has_state:
            with executor.lock:
                binding = self._bind_step(ids)
                if binding.can_choose:
                    found = binding.choose(sampling.settings(random, alive), executor.past)
                    executor.past += 1
                    chosen = [t if going else pad for t, going in zip(found, alive, strict=True)]
                    if min(chosen) < 0:
                        raise ArtifactError(NOT_NUMBERS)
                    return chosen
        return sampling.choose_rows(self.advance(ids), random, alive, pad)

    def _bind_step(self, ids: list[int]) -> Binding:
        """Return the binding of a step for one token of each row, filled. The lock is held."""
        executor = self._executor
        if len(ids) != self.batch:
            raise InputError(f"this session has {self.batch} rows; {len(ids)} ids came")
        self._check_range(min(ids), max(ids))
        past = executor.past
        if past >= self._limit:
            raise ContextLengthError(
                f"token {past + 1} is one too many: the context holds {self._limit}"
            )
        executor.reserve(self.batch, past + 1)
        binding = executor.bind(
            {"batch": self.batch, "seq": 1, "keep": 1, "context": executor.capacity}
        )
        binding.inputs[self._generate.tokens][:, 0] = ids
        return binding

    def _check_range(self, least: int, greatest: int) -> None:
        if least < 0 or greatest >= self._below:
            wrong = least if least < 0 else greatest
            raise InputError(f"token id {wrong} is not in the vocabulary of {self._below} tokens")

    def _append(self, rows: Ids, chunk: int) -> Binding:
        executor, name = self._executor, self._generate.tokens
        rows = rows.astype(self._element)
        if not executor.program.has_state:  # all tokens again, every time
            history = np.concatenate([self._history.astype(self._element), rows], axis=1)
            binding = executor.run({name: history}, keep=1)
            self._history = history
            return binding
        executor.reserve(self.batch, executor.past + rows.shape[1])
        for start in range(0, rows.shape[1], chunk):
            binding = executor.run({name: rows[:, start : start + chunk]}, keep=1)
        return binding

    def _last_logits(self, binding: Binding) -> NDArray[np.float32]:
        logits = binding.outputs[self._generate.logits][:, -1]
        return logits if self._logits_dtype == "f32" else as_float(logits, self._logits_dtype)
