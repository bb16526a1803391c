"""Calibration data: texts, token ids, files, data sets, cut into sequences of tokens; and inputs by
name for models that read no tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qc.errors import InputError

Encode = Callable[[str], list[int]]
"""Text -> token ids, without special tokens."""

TOKENS_AT_ONCE = 2048
"""Tokens of a batch: attention scores of a few sequences stay near the caches, and the products
are large enough for full speed."""

TEXT_FIELDS = ("text", "content", "extract")
TOKEN_FIELDS = ("input_ids", "tokens")


Inputs = Mapping[str, Tensor]
"""Values of a model's inputs by name, with a batch axis in front."""


def read_data(data: Any, encode: Encode | None, count: int, length: int) -> list[Tensor | Inputs]:
    """Return at most `count` sequences i64[<= length], or records of inputs with at most so many
    rows, the first of the data, in their order.

    Texts are joined by one blank line and tokenized as one stream, which is cut without overlap;
    a rest shorter than a sequence is used only where there is nothing else. Token ids stay the
    sequences that they are, cut at `length`. InputError where there is nothing to read.
    """
    items = list(entries(data))
    if items and all(is_inputs(item) for item in items):
        return list(first_rows(items, count))
    found = list(sequences_of(items, encode, count, length))[:count]
    if not found:
        raise InputError("the calibration data holds no text and no tokens")
    return list(found)


def is_inputs(item: Any) -> bool:
    """Say whether an item is a record of tensors by name, and neither a text nor token ids."""
    fields = (*TEXT_FIELDS, *TOKEN_FIELDS)
    return (
        isinstance(item, Mapping)
        and bool(item)
        and not any(field in item for field in fields)
        and all(isinstance(value, Tensor) and value.ndim for value in item.values())
    )


def first_rows(records: Iterable[Inputs], count: int) -> Iterator[Inputs]:
    """Yield records until there are `count` rows; the last may lose some of its own."""
    left = count
    for record in records:
        rows = {name: len(value) for name, value in record.items()}
        if len(set(rows.values())) > 1:
            raise InputError(
                "a calibration record holds inputs with one batch axis in front, of one size, "
                f"not of {', '.join(f'{size} ({name})' for name, size in rows.items())}"
            )
        if left > 0:
            yield {name: value[:left] for name, value in record.items()}
        left -= next(iter(rows.values()))


def sequences_of(
    items: Iterable[Any], encode: Encode | None, count: int, length: int
) -> Iterator[Tensor]:
    """Yield sequences of tokens from texts, token ids and records of either."""
    texts: list[str] = []
    for item in items:
        text, tokens = text_of(item), tokens_of(item)
        if text is not None:
            texts.append(text)
        elif tokens is not None:
            yield from (row[:length] for row in tokens if len(row) > 1)
        else:
            fields = " or ".join((*TEXT_FIELDS, *TOKEN_FIELDS))
            raise InputError(
                f"a calibration item is a text, token ids, a record with {fields}, or a record of "
                f"tensors by the names of the model's inputs, not {describe(item)}"
            )
    if texts:
        yield from cut(tokenized("\n\n".join(texts), encode), count, length)


def tokenized(text: str, encode: Encode | None) -> Tensor:
    """Tokenize a text; InputError for a model that has no tokenizer."""
    if encode is None:
        raise InputError(
            "this model has no tokenizer, so it cannot be calibrated on text: give token ids"
        )
    return torch.tensor(encode(text), dtype=torch.int64)


def cut(stream: Tensor, count: int, length: int) -> list[Tensor]:
    """Cut a stream into whole sequences; the only one may be shorter."""
    whole = min(count, len(stream) // length)
    if not whole:
        return [stream] if len(stream) > 1 else []
    return list(stream[: whole * length].view(whole, length))


def entries(data: Any) -> Iterator[Any]:
    """Yield the items of whatever holds calibration data."""
    if isinstance(data, Path) or (isinstance(data, str) and is_file(data)):
        yield from read_file(Path(data))
    elif isinstance(data, str | Tensor | Mapping):
        yield data
    elif isinstance(data, Iterable):
        yield from data
    else:
        raise InputError(f"calibration data is a file, texts, token ids or 'self', not {data!r}")


def is_file(text: str) -> bool:
    """Say whether a text names a file; a name of one that is missing is refused."""
    named = text.endswith((".txt", ".jsonl", ".json")) and "\n" not in text
    if named and not Path(text).is_file():
        raise InputError(f"cannot read the calibration data {text}: there is no such file")
    return named


def read_file(path: Path) -> Iterator[Any]:
    """Yield the text of a .txt file, or the records of a .jsonl file."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read the calibration data {path}: {reason}") from None
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number} is not JSON: {error.msg}") from None


def text_of(item: Any) -> str | None:
    """Return the text of an item; None where it has none."""
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        return next((item[f] for f in TEXT_FIELDS if isinstance(item.get(f), str)), None)
    return None


def tokens_of(item: Any) -> Tensor | None:
    """Return the token ids of an item, i64[sequences, tokens]; None where it has none."""
    if isinstance(item, Mapping):
        return next((tokens_of(item[f]) for f in TOKEN_FIELDS if f in item), None)
    try:
        ids = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError):
        return None
    if ids.is_floating_point() or ids.ndim not in (1, 2) or not ids.numel():
        return None
    return ids.to(torch.int64).reshape(-1, ids.shape[-1])


def describe(item: Any) -> str:
    """Say what an item is, briefly."""
    if isinstance(item, Mapping):
        return f"a record with {', '.join(map(str, item)) or 'nothing'}"
    return f"{type(item).__name__} {str(item)[:60]!r}"


def batched(sequences: Sequence[Tensor]) -> list[Tensor]:
    """Put neighbours of equal length into batches i64[sequences, length] of few tokens."""
    batches: list[list[Tensor]] = []
    for sequence in sequences:
        last = batches[-1] if batches else []
        fits = last and len(last[0]) == len(sequence)
        if fits and (len(last) + 1) * len(sequence) <= TOKENS_AT_ONCE:
            last.append(sequence)
        else:
            batches.append([sequence])
    return [torch.stack(each) for each in batches]
